"""Recurrent layers as affine maps of `x_t` and of the state before it, `h_(t-1)`: the gates' values before activation.

See `nn.LSTM`, `nn.GRU` and `nn.RNN` for their equations. In the third gate of a GRU the map of the state is multiplied
with another gate, so that this gate has two maps: one of the input, one of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_roulette.large.precision import full_precision
from lightning_roulette.network.layers import Columns, Layer, Rows, free, some_outputs
from lightning_roulette.network.windows import Chosen

_RUNS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def has_state(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a recurrent module's forward is given initial states that are not all zero."""
    return any(bool(one.any()) for one in _initial_states(arguments, named))


def recurrent_layers(part: nn.RNNBase, path: str, shared: Collection[str]) -> list[Layer]:
    """The maps of a recurrent module. Those of a later layer have a higher turn.

    Args:
        part: The module.
        path: Prefix of the names of its parameters.
        shared: Names of parameters that are tied to others.
    """
    return [layer for cell in _cells(part) for layer in cell.layers(path, shared)]


@dataclass(frozen=True)
class _Cell:
    """One layer of a recurrent module, in one direction.

    Attributes:
        part: The module.
        depth: Number of the layer, from 0.
        backward: Whether it runs from the last time step to the first.
    """

    part: nn.RNNBase
    depth: int
    backward: bool

    def name(self, word: str) -> str:
        """Name of a parameter in the module, for example of `"weight_ih"`."""
        return f"{word}_l{self.depth}{'_reverse' if self.backward else ''}"

    def value(self, word: str) -> Tensor:
        """The value of a parameter."""
        found: Tensor = getattr(self.part, self.name(word))
        return found.detach()

    @property
    def words(self) -> list[str]:
        """Its parameters, in the order of torch's functions."""
        biases = ["bias_ih", "bias_hh"] if self.part.bias else []
        return ["weight_ih", "weight_hh", *biases, *(["weight_hr"] if self.part.proj_size else [])]

    def layers(self, path: str, shared: Collection[str]) -> list[Layer]:
        """Its maps: the gates, and the projection of an LSTM with `proj_size`."""
        size = self.part.hidden_size
        if self.part.mode == "GRU":
            joint, third = slice(0, 2 * size), slice(2 * size, 3 * size)
            maps = [(joint, ("ih", "hh")), (third, ("ih",)), (third, ("hh",))]
        else:
            maps = [(slice(0, len(self.value("weight_ih"))), ("ih", "hh"))]
        found = [self._layer(path, shared, outputs, sides) for outputs, sides in maps]
        if self.part.proj_size:
            columns = Columns(f"{path}{self.name('weight_hr')}", some_outputs(slice(0, None)), self._rows(_projected))
            found.append(Layer((columns,), self.part, None, turn=self.depth, recurrent=True))
        return found

    def _layer(self, path: str, shared: Collection[str], outputs: slice, sides: tuple[str, ...]) -> Layer:
        inputs = {"ih": _inputs, "hh": _states}
        columns = [
            Columns(f"{path}{self.name(f'weight_{side}')}", some_outputs(outputs), self._rows(inputs[side]))
            for side in sides
        ]
        biases = (free(self.part, path, self.name(f"bias_{side}"), shared) for side in sides)
        bias = next((one for one in biases if one is not None), None)  # where there are two, one suffices
        return Layer(tuple(columns), self.part, bias, outputs, turn=self.depth, recurrent=True)

    def _rows(self, values: Callable[[_Cell, _Sequences], Tensor]) -> Rows:
        def rows(arguments: tuple[Any, ...], named: Mapping[str, Any], chosen: Chosen) -> Tensor:
            given = _Sequences.of(self, arguments, named)
            with full_precision(given.data.device):
                found = values(self, given)
            return found[given.order[chosen(len(found)).to(found.device)]].unsqueeze(0)

        return rows


def _cells(part: nn.RNNBase) -> list[_Cell]:
    """All layers and directions, in the order of torch's parameters."""
    directions = [False, True] if part.bidirectional else [False]
    return [_Cell(part, depth, backward) for depth in range(part.num_layers) for backward in directions]


@dataclass(frozen=True)
class _Sequences:
    """The input of a recurrent module: sequences of possibly different lengths, the longest first.

    Attributes:
        data: Shape `(rows, inputs)`: the entries of all sequences at the first time step, at the second, and so on.
        sizes: Number of sequences at each time step.
        start: The initial states, each of shape `(layers * directions, sequences, size)`: `h`, for an LSTM also `c`.
        order: Indices of the rows, one sequence after the other, in the order in which they were passed.
    """

    data: Tensor
    sizes: Tensor
    start: tuple[Tensor, ...]
    order: Tensor

    @classmethod
    def of(cls, cell: _Cell, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> _Sequences:
        """The arguments of the module's forward, of the type of its weights; autocast lets both differ."""
        part, kind = cell.part, cell.value("weight_hh").dtype
        given = arguments[0] if arguments else named["input"]
        start = _initial_states(arguments, named)
        if isinstance(given, PackedSequence):
            data, sizes, places = given.data, given.batch_sizes, given.sorted_indices
            start = start if places is None else tuple(one.index_select(1, places) for one in start)
        else:
            data, sizes, places = *_packed(part, given), None
            start = start if given.dim() == 3 else tuple(one.unsqueeze(1) for one in start)
        sequences = torch.cat([torch.arange(int(size)) for size in sizes]).to(data.device)
        order = (sequences if places is None else places[sequences]).argsort(stable=True)
        data, start = data.detach().to(kind), tuple(one.detach().to(kind) for one in start)
        return cls(data, sizes, start or _zeros(part, data, int(sizes[0])), order)

    def by_time(self, values: Tensor) -> list[Tensor]:
        """Values of all rows, one tensor for each time step."""
        return list(values.split(self.sizes.tolist()))


def _initial_states(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The argument `hx`: `h`, for an LSTM also `c`; empty if it is not given."""
    first = arguments[1] if len(arguments) > 1 else named.get("hx")
    return () if first is None else tuple(first) if isinstance(first, tuple | list) else (first,)


def _packed(part: nn.RNNBase, given: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of sequences of equal length by time step, and their number at each time step."""
    batch = given if given.dim() == 3 else given.unsqueeze(0 if part.batch_first else 1)
    batch = batch.transpose(0, 1) if part.batch_first else batch
    return batch.flatten(0, 1), torch.full((batch.shape[0],), batch.shape[1], device="cpu")


def _zeros(part: nn.RNNBase, data: Tensor, sequences: int) -> tuple[Tensor, ...]:
    sizes = [part.proj_size or part.hidden_size, *([part.hidden_size] if part.mode == "LSTM" else [])]
    return tuple(data.new_zeros(len(_cells(part)), sequences, size) for size in sizes)


def _run(part: nn.RNNBase, given: _Sequences, data: Tensor, depths: range) -> Tensor:
    """The outputs of successive layers for the input of the first of them, shape (rows, directions * size)."""
    if not depths:
        return data
    cells = _cells(part)
    some = slice(len(cells) // part.num_layers * depths.start, len(cells) // part.num_layers * depths.stop)
    weights = [cell.value(word) for cell in cells[some] for word in cell.words]
    start = tuple(one[some].contiguous() for one in given.start)
    states = start if part.mode == "LSTM" else start[0]
    sizes = given.sizes
    return _RUNS[part.mode](data, sizes, states, weights, part.bias, len(depths), 0.0, False, part.bidirectional)[0]


def _inputs(cell: _Cell, given: _Sequences) -> Tensor:
    """The input of a layer."""
    return _run(cell.part, given, given.data, range(cell.depth))


def _states(cell: _Cell, given: _Sequences) -> Tensor:
    """The state `h` before each row."""
    outputs = _run(cell.part, given, _inputs(cell, given), range(cell.depth, cell.depth + 1))
    own = outputs.chunk(2, 1)[cell.backward] if cell.part.bidirectional else outputs
    return torch.cat(_before(cell, given.by_time(own), _start(cell, given, 0)))


def _start(cell: _Cell, given: _Sequences, which: int) -> Tensor:
    """The initial state `h` (0) or `c` (1) of a layer, shape (sequences, size)."""
    return given.start[which][_cells(cell.part).index(cell)]


def _before(cell: _Cell, states: list[Tensor], start: Tensor) -> list[Tensor]:
    """The states before those of each time step. A sequence that begins there has its initial state."""
    sizes = [len(one) for one in states]
    if not cell.backward:
        return [before[:size] for before, size in zip([start, *states], sizes, strict=False)]
    following = [*states[1:], start[:0]]
    return [torch.cat([one, start[len(one) : size]]) for one, size in zip(following, sizes, strict=True)]


def _projected(cell: _Cell, given: _Sequences) -> Tensor:
    """What an LSTM with `proj_size` projects: `o * tanh(c)`."""
    gates = _inputs(cell, given) @ cell.value("weight_ih").mT + _states(cell, given) @ cell.value("weight_hh").mT
    if cell.part.bias:
        gates = gates + cell.value("bias_ih") + cell.value("bias_hh")
    admit, forget, update, output = gates.chunk(4, 1)
    added, kept = given.by_time(admit.sigmoid() * update.tanh()), given.by_time(forget.sigmoid())
    times = range(len(added))
    memory, found = _start(cell, given, 1), added
    for time in reversed(times) if cell.backward else times:
        size = len(added[time])
        begun = torch.cat([memory, _start(cell, given, 1)[len(memory) : size]])[:size]
        memory = found[time] = kept[time] * begun + added[time]
    return output.sigmoid() * torch.cat(found).tanh()
