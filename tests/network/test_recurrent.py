"""Rows and matrices of recurrent modules, against a loop over single steps of single sequences."""

from __future__ import annotations

from itertools import chain, product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from lightning_roulette.network.parameters import prunable_parameters
from lightning_roulette.network.refittable import layers_of
from tests.support.networks import known, numbers

KINDS = {
    "LSTM": nn.LSTM,
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "ReLU": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, layers: int = 2, **options) -> nn.RNNBase:
    return known(KINDS[kind](3, 4, num_layers=layers, **options)).eval()


def step(part: nn.RNNBase, tail: str, x, state):
    """One step for one sequence: the values before activation, what is projected, and the next state."""
    w, v, b, c = (getattr(part, f"{word}_{tail}") for word in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    if part.mode == "GRU":
        (r, z, n), (rh, zh, nh) = (w @ x + b).chunk(3), (v @ state[0] + c).chunk(3)
        gates = [torch.cat([r + rh, z + zh]), n, nh]
        new = torch.tanh(n + torch.sigmoid(r + rh) * nh)
        keep = torch.sigmoid(z + zh)
        return gates, None, ((1 - keep) * new + keep * state[0],)
    before = w @ x + b + v @ state[0] + c
    if part.mode != "LSTM":
        return [before], None, (before.tanh() if part.mode == "RNN_TANH" else before.relu(),)
    i, f, g, o = before.chunk(4)
    memory = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    unit = o.sigmoid() * memory.tanh()
    projected = getattr(part, f"weight_hr_{tail}") @ unit if part.proj_size else unit
    return [before], unit, (projected, memory)


def walked(part: nn.RNNBase, sequences, start):
    """For each layer and direction, the values before activation and the outputs, one sequence after the other."""
    found, directions = {}, 2 if part.bidirectional else 1
    for depth in range(part.num_layers):
        outputs = [[[] for _ in sequence] for sequence in sequences]
        for direction in range(directions):
            tail, place = f"l{depth}" + "_reverse" * direction, depth * directions + direction
            rows = found[tail] = [[None] * len(sequence) for sequence in sequences]
            for number, sequence in enumerate(sequences):
                state = [one[place, number] for one in start]
                times = range(len(sequence))
                for time in reversed(times) if direction else times:
                    gates, unit, state = step(part, tail, sequence[time], state)
                    rows[number][time] = (*gates, *([unit] if part.proj_size else []))
                    outputs[number][time].append(state[0])
        sequences = [torch.stack([torch.cat(both) for both in one]) for one in outputs]
    return {tail: [torch.stack(one) for one in zip(*chain(*rows), strict=True)] for tail, rows in found.items()}


def begun(part: nn.RNNBase, sequences: int):
    count = part.num_layers * (2 if part.bidirectional else 1)
    sizes = [part.proj_size or 4, 4] if part.mode == "LSTM" else [4]
    return tuple(numbers(count, sequences, size, seed=7 + size) for size in sizes)


@torch.no_grad()
def assert_applies(part: nn.RNNBase, arguments, sequences, start, named=None) -> None:
    layers, left = layers_of(part, list(prunable_parameters(part)))
    assert left == {}
    parameters, expected = dict(part.named_parameters()), walked(part, sequences, start)
    assert {name for layer in layers for name in layer.names} == {*prunable_parameters(part)}
    seen = {tail: [] for tail in expected}
    for layer in layers:
        tail = layer.names[0].split("_", 2)[2]
        assert layer.turn == int(tail[1])
        rows = layer.rows(arguments, named or {}, torch.arange)
        values = rows[0] @ layer.matrices(parameters)[0].mT
        if layer.names[0].startswith("weight_hr"):
            values = rows[0]
            assert torch.equal(layer.matrices(parameters)[0], parameters[layer.names[0]])
        for name in layer.names if part.bias else ():
            bias = name.replace("weight", "bias")
            values = values + parameters[bias][layer.offsets] if bias in parameters else values
        seen[tail].append(values)
        some = torch.tensor([len(values) - 1, 0, len(values) // 2])
        assert torch.equal(layer.rows(arguments, named or {}, lambda _, some=some: some), rows[:, some])
    for tail, values in seen.items():
        assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(values, expected[tail], strict=True))


def starts(part: nn.RNNBase, start):
    return start if part.mode == "LSTM" else start[0]


@kinds
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_of_equally_long_sequences_give_the_gates(kind, both, batch_first):
    part = made(kind, batch_first=batch_first, bidirectional=both, dropout=0.5)
    x, start = numbers(3, 5, 3), begun(part, 3)
    given = x if batch_first else x.transpose(0, 1)
    assert_applies(part, (given, starts(part, start)), list(x), start)
    assert_applies(part, (), list(x), start, {"input": given, "hx": starts(part, start)})
    assert_applies(part, (given,), list(x), [torch.zeros_like(one) for one in start])


@kinds
@pytest.mark.parametrize(("both", "ordered"), [*product([False, True], repeat=2)])
def test_rows_of_packed_sequences_give_the_gates(kind, both, ordered):
    part = made(kind, bidirectional=both)
    lengths = [5, 3, 3, 1] if ordered else [2, 5, 1, 3]
    sequences, start = [numbers(size, 3, seed=size) for size in lengths], begun(part, 4)
    packed = pack_sequence(sequences, enforce_sorted=ordered)
    assert_applies(part, (packed, starts(part, start)), sequences, start)
    padded = pack_padded_sequence(nn.utils.rnn.pad_sequence(sequences), torch.tensor(lengths), enforce_sorted=ordered)
    assert isinstance(padded, PackedSequence)
    assert_applies(part, (padded,), sequences, [torch.zeros_like(one) for one in start])


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_of_one_sequence_without_a_batch_give_the_gates(kind, batch_first):
    part = made(kind, 1, batch_first=batch_first, bidirectional=True)
    x, start = numbers(4, 3), begun(part, 1)
    assert_applies(part, (x, starts(part, tuple(one[:, 0] for one in start))), [x], start)


@kinds
def test_a_module_without_biases_has_gates_without_them(kind):
    part, x = made(kind), numbers(2, 3, 3)
    for name, one in part.named_parameters():
        one.data *= not name.startswith("bias")
    bare, start = made(kind, bias=False), begun(part, 3)
    bare.load_state_dict({name: one for name, one in part.state_dict().items() if not name.startswith("bias")})
    expected = walked(part, list(x.transpose(0, 1)), start)
    layers, _ = layers_of(bare, list(prunable_parameters(bare)))
    assert {layer.bias for layer in layers} == {None}
    own, gates = dict(bare.named_parameters()), [layer for layer in layers if "hr" not in layer.names[0]]
    found = [layer.rows((x, starts(bare, start)), {}, torch.arange)[0] @ layer.matrices(own)[0].mT for layer in gates]
    wanted = [one for tail in expected for one in expected[tail][: len(gates) // 2]]
    assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(found, wanted, strict=True))


def test_weights_that_a_mask_does_not_name_are_left_out_of_the_matrices():
    part = made("LSTM", 1)
    (layer,), left = layers_of(part, ["weight_hh_l0"])
    assert left == {}
    assert (layer.names, layer.bias) == (("weight_hh_l0",), "bias_ih_l0")
    assert layer.matrices(dict(part.named_parameters())).shape == (1, 16, 4)


def test_one_bias_of_two_changes_and_a_frozen_one_does_not():
    part = made("GRU", 1)
    names = list(prunable_parameters(part))
    assert [layer.bias for layer in layers_of(part, names)[0]] == ["bias_ih_l0", "bias_ih_l0", "bias_hh_l0"]
    part.bias_ih_l0.requires_grad_(False)
    assert [layer.bias for layer in layers_of(part, names)[0]] == ["bias_hh_l0", None, "bias_hh_l0"]


class Sums(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0].sum(1)


def test_a_recurrent_module_with_its_own_forward_is_not_supported():
    assert layers_of(Sums(2, 2), ["weight_ih_l0"]) == (
        [],
        {"weight_ih_l0": "not supported for Sums: it overrides forward"},
    )
