"""The steps of a network: the layers it calls one after the other, seen while it runs on calibration batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.large.devices import with_float64
from lightning_roulette.large.limits import limits
from lightning_roulette.network.hooks import Enough, run_with_hooks
from lightning_roulette.network.layers import Layer, batch_norms_of, layers_of
from lightning_roulette.network.lending import named_tensors
from lightning_roulette.refit.least_squares import Moments
from lightning_roulette.wheel.chance import random_bits, stream

_HELD_BACK = 8  # the last of so many rows judge a fit

# What a step is called with: arguments by place and by name.
Given = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Step:
    """What one call of a module gives its inputs to: layers, or a batch normalisation.

    Attributes:
        module: That is called.
        layers: None of a batch normalisation.
        prefix: Of the names of its buffers.
    """

    module: nn.Module
    layers: tuple[Layer, ...] = ()
    prefix: str = ""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a layer's input in one call, with a last column of ones where it has a bias.

    Attributes:
        values: Float64, shape `(groups, rows, inputs)`.
        count: How many there are to choose from.
        held: How many of them, the last, are held back from a fit.
    """

    values: Tensor
    count: int
    held: int


class Steps:
    """The steps that a network takes on some batches, and what its layers give while it is dense.

    Args:
        module: The network; dense while the steps are found.
        names: The weights that are of interest.
        layers: Whether layers are steps, or batch normalisations alone.
        run: Runs the network on the batch of a number.
        batches: How many batches there are.
        most: How many rows of a layer are chosen of one call at most.
        seed: Of that choice.

    Attributes:
        tensors: All that a refit may change, by name: parameters and buffers of the network.
        left_alone: The weights that it cannot, and why.
        order: The steps in the order of their first calls.
        calls: How often a batch calls a step.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        layers: bool,
        run: Callable[[int], object],
        batches: int,
        most: int,
        seed: int,
    ) -> None:
        self._run, self._most, self._seed, self.batches = run, max(_HELD_BACK, most), seed, batches
        found, self.left_alone = layers_of(module, names) if layers else ([], {})
        norms = batch_norms_of(module)
        by_module: dict[nn.Module, list[Layer]] = {}
        for layer in found:
            by_module.setdefault(layer.module, []).append(layer)
        self._steps = [Step(part, tuple(its)) for part, its in by_module.items()]
        self._steps += [Step(part, prefix=prefix) for prefix, part in norms.items()]
        tensors = named_tensors(module)
        biases = dict.fromkeys(layer.bias for layer in found if layer.bias is not None)
        self.tensors: dict[str, Tensor] = {name: tensors[name] for name in (*names, *biases)}
        for prefix in norms:
            self.tensors |= {f"{prefix}{own}": tensors[f"{prefix}{own}"] for own in ("running_mean", "running_var")}
        self.calls: Counter[tuple[Step, int]] = Counter()
        self._dense: dict[tuple[Step, int], list[tuple[tuple[int, Tensor], ...]]] = {}
        self._bytes = 0
        self.order: tuple[Step, ...] = self._look()
        unseen = [layer.name for step in self._steps if step not in self.order for layer in step.layers]
        self.left_alone |= dict.fromkeys(unseen, "the network does not call it on the calibration inputs")

    def watch(self, batch: int, meet: Callable[[Step, int, Given], None]) -> None:
        """Run the network on a batch, and tell `meet` of each call of a step, the how manieth it is, from 0."""
        met: Counter[Step] = Counter()
        steps = {step.module: step for step in self._steps}

        def hook(part: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            step = steps[part]
            met[step] += 1
            meet(step, met[step] - 1, (arguments, named))

        run_with_hooks(lambda: self._run(batch), steps, before=hook)

    def rows(self, layer: Layer, batch: int, call: int, given: Given) -> Rows:
        """Rows that a layer is given: the same positions whatever the network's weights are."""
        size = held = 0

        def chosen(count: int) -> Tensor:
            nonlocal size, held
            index = torch.arange(min(count, self._most))
            if count > self._most:
                key = stream(self._seed, batch, call, f"rows of {layer.name} {layer.outputs.start}")
                index = random_bits(key, index).remainder(count).sort().values
            size, held = count, int((index >= count - count // _HELD_BACK).sum())
            return index

        found = layer.rows(*given, chosen)
        if layer.bias is not None:
            found = torch.cat([found, found.new_ones(*found.shape[:2], 1)], 2)
        return Rows(found, size, held)

    def maps(self, layer: Layer) -> Tensor:
        """A layer's weight, and its bias as a last column, float64, shape `(groups, outputs, inputs)`."""
        maps = layer.matrices(with_float64(self.tensors[layer.name])).to(torch.float64)
        if layer.bias is None:
            return maps
        bias = self.tensors[layer.bias].detach()[layer.offsets].to(maps)
        return torch.cat([maps, bias.view(*maps.shape[:2], 1)], 2)

    def kept(self, layer: Layer, mask: Mapping[str, Tensor]) -> Tensor:
        """Which entries of `maps` a mask keeps; biases that it does not name always."""
        kept = layer.matrices(with_float64(mask[layer.name]))
        if layer.bias is None:
            return kept
        biases = mask[layer.bias][layer.offsets].to(kept) if layer.bias in mask else kept.new_ones(kept.shape[:2])
        return torch.cat([kept, biases.view(*kept.shape[:2], 1)], 2)

    @torch.no_grad()
    def write(self, layer: Layer, maps: Tensor) -> None:
        """Write what `maps` gave into the network."""
        outputs = self.tensors[layer.name][layer.outputs]
        outputs.copy_(maps[..., : outputs[0].numel()].reshape(outputs.shape))
        if layer.bias is not None:
            self.tensors[layer.bias][layer.offsets].copy_(maps[..., -1].flatten())

    def dense(self, step: Step, batch: int, call: int) -> tuple[tuple[int, Tensor], ...]:
        """For each layer of a step how many rows the dense network has there, and its outputs of those chosen."""
        return self._dense[step, batch][call]

    def knows(self, step: Step, batch: int) -> bool:
        """Whether all is at hand that the dense layers of a step give on a batch."""
        return not step.layers or (step, batch) in self._dense

    def fetch(self, step: Step, batch: int) -> None:
        """Have at hand what the layers of one step more give; the network must be dense."""
        found: list[tuple[tuple[int, Tensor], ...]] = []

        def meet(met: Step, call: int, given: Given) -> None:
            if met is step:
                found.append(self._outputs(step, batch, call, given))
                if len(found) == self.calls[step, batch]:
                    raise Enough

        self.watch(batch, meet)
        self._dense[step, batch] = found

    def forget(self, step: Step, batch: int) -> None:
        """Free what `fetch` got."""
        self._dense.pop((step, batch), None)

    @property
    def first_is_known(self) -> bool:
        """Whether the first step has layers, and no pruned weight can change what they are given."""
        first = self.order[0]
        once = all(self.calls[first, batch] <= 1 for batch in range(self.batches))
        return bool(first.layers) and once and not self.left_alone and self._leads == {first}

    def sums(self) -> dict[Layer, Moments]:
        """Sums of products of each layer's inputs and outputs, in the network as it is."""
        found: dict[Layer, Moments] = {}
        for batch in range(self.batches):

            def meet(step: Step, call: int, given: Given, batch: int = batch) -> None:
                for layer in step.layers:
                    rows = self.rows(layer, batch, call, given).values
                    found.setdefault(layer, Moments()).add(rows, rows @ self.maps(layer).mT)

            self.watch(batch, meet)
        return found

    def _look(self) -> tuple[Step, ...]:
        order: dict[Step, None] = {}
        self._leads: set[Step] = set()  # what a batch calls first
        for batch in range(self.batches):

            def meet(step: Step, call: int, given: Given, batch: int = batch) -> None:
                order.setdefault(step)
                if not any(self.calls[other, batch] for other in order):
                    self._leads.add(step)
                self.calls[step, batch] += 1
                if self._bytes < limits().dense_output_bytes:
                    outputs = self._outputs(step, batch, call, given)
                    self._bytes += sum(values.nbytes for _, values in outputs)
                    self._dense.setdefault((step, batch), []).append(outputs)

            self.watch(batch, meet)
        for step, batch in [key for key, known in self._dense.items() if len(known) < self.calls[key]]:
            del self._dense[step, batch]
        return tuple(order)

    def _outputs(self, step: Step, batch: int, call: int, given: Given) -> tuple[tuple[int, Tensor], ...]:
        found = []
        for layer in step.layers:
            rows = self.rows(layer, batch, call, given)
            outputs = rows.values @ self.maps(layer).mT
            kept_in = torch.promote_types(self.tensors[layer.name].dtype, torch.float32)
            found.append((rows.count, outputs.to(kept_in)))
        return tuple(found)
