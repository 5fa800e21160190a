"""A pruned network refitted to calibration inputs, and what its layers are given there.

Layers are refitted one after the other, on inputs from the already pruned network, as in Dong, Chen and Pan, "Learning
to prune deep neural networks via layer-wise optimal brain surgeon" (NeurIPS 2017), and in Frantar and Alistarh,
"Optimal brain compression" (NeurIPS 2022). Which weights go is settled before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_roulette.mask.mask import Mask, fill_pruned
from lightning_roulette.network.hooks import Enough
from lightning_roulette.network.layers import Layer, channels
from lightning_roulette.network.lending import copy_into, lent, named_tensors
from lightning_roulette.network.samples import pieces_of
from lightning_roulette.refit.least_squares import Moments, Spread, fitted, inverse_diagonals
from lightning_roulette.refit.sensitivity import Sensitivity
from lightning_roulette.refit.traversal import Given, Step, Steps
from lightning_roulette.settings import LeastSquares, Refit, refit_of

_ROUNDING = 1e-9  # in the error of a layer that nothing was taken from, as a share of its outputs' mean square


@dataclass(frozen=True, eq=False)
class Refitted:
    """What a refit made of a pruned network.

    Attributes:
        values: Name to tensor, all that may differ from the dense network: weights (zero where pruned), biases, running
            statistics. None of a network that was not refitted.
        undone: The weights of layers that were left as they were pruned, by name, and why.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    undone: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Survivors:
    """What a refit changed, on the CPU: of each pruned weight the survivors alone, and all else whole."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, mask: Mask, values: Mapping[str, Tensor]) -> Survivors:
        """Those of the network that `values` and a mask make."""
        kept = {name: value[mask[name].to(value.device)] if name in mask else value for name, value in values.items()}
        return cls({name: value.detach().cpu() for name, value in kept.items()})

    def spread(self, mask: Mask, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New tensors, zero where the mask prunes, each weight on the device of the dense one."""
        found = {name: value for name, value in self.values.items() if name not in mask}
        for name in self.values.keys() & mask.keys():
            whole = torch.zeros_like(dense[name].detach())
            whole[mask[name].to(whole.device)] = self.values[name].to(whole.device)
            found[name] = whole
        return found


class Calibration:
    """A network and some batches of inputs, without labels: what refits it and tells the inputs of its layers.

    The network is lent for each call and given back bit for bit. Of what a layer is given in one call `rows / batches`
    rows are looked at, eight at least, a random choice where there are more; a row is one position of one sample.

    Beside the batches and two copies of the weights it takes the memory of the rows of one layer in one batch, of the
    sums of products of one layer's inputs and of the first layer's (`inputs ** 2` float64 for each group), of 2**26
    bytes, and of the dense network's outputs of the rows, up to 2**29 bytes: if they are more, it is run again.

    Args:
        module: The network, with its dense weights whenever it is asked.
        batches: What its forward takes, each a tensor or a tuple of arguments; or how many batches `run` knows.
        run: Runs the network on the batch of a number, in evaluation mode. None: its forward on `batches`.
        pieces: Each runs the network on a few samples, for what takes the memory of a training step. None: the first
            2,048 of `batches`, 256 at a time where the first dimension is that of samples; with `run`, whole batches.
        rows: See above.
        seed: Of all chance: of the choice of rows, and of directions.

    Attributes:
        batches: How many there are.

    Raises:
        TypeError: If `batches` is neither a list nor a number, or a number and there is no `run`.
        ValueError: If there is no batch.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Any] | int,
        *,
        run: Callable[[int], object] | None = None,
        pieces: Sequence[Callable[[], object]] | None = None,
        rows: int = 2**16,
        seed: int = 0,
    ) -> None:
        if not isinstance(batches, int | Sequence):
            kind = type(batches).__name__
            raise TypeError(f"batches is a {kind}, but must be a list of batches, or a number. Pass list(...) of it.")
        self._module, self._rows, self._seed = module, rows, seed
        self.batches = batches if isinstance(batches, int) else len(batches)
        if self.batches < 1:
            raise ValueError("batches is empty, but there must be at least one batch of inputs.")
        if run is None and isinstance(batches, int):
            raise TypeError(f"batches is {batches}, but must be the inputs themselves where there is no run.")
        if run is None:
            few = pieces_of(cast("Sequence[Any]", batches))
            run, small = _forward(module, cast("Sequence[Any]", batches)), _forward(module, few)
            whole = [partial(small, number) for number in range(len(few))]
        else:
            whole = [partial(run, number) for number in range(self.batches)]
        self._run, self._pieces = run, whole if pieces is None else pieces
        self._known: dict[tuple[Any, ...], Steps] = {}
        self._first: dict[Steps, list[_Sums]] = {}
        self._sensitivities: dict[tuple[str, ...], Sensitivity] = {}

    def refit(self, mask: Mask, how: str | Refit = "least_squares") -> Refitted:
        """The network pruned by a mask and refitted: a function of the dense network, the mask and the batches alone.

        In the order in which the network calls them, each layer of which `mask` names the weight gets the survivors,
        and the bias, whose outputs are closest to the dense network's, on inputs that the already refitted layers
        before it produce: see `fitted`. A fit that is worse than none on rows held back from it, or not finite, is
        undone. Running statistics of batch normalisations become mean and variance of what they are given.

        Args:
            mask: Which weights are kept.
            how: A `LeastSquares`, or a word for one; `"batch_norm"` leaves weights and biases alone.

        Raises:
            ValueError: If there is no such word.
        """
        choices = refit_of(how)
        steps = self._steps(mask, isinstance(choices, LeastSquares))
        with lent(self._touched(steps)) as dense:
            fill_pruned(steps.tensors, mask)
            fitting = _Fitting(steps, mask, choices.damping if isinstance(choices, LeastSquares) else 0.0, dense)
            fitting.start(self._first.get(steps))
            fitting.run()
            if fitting.first is not None:
                self._first[steps] = fitting.first
            return Refitted({name: one.detach().clone() for name, one in steps.tensors.items()}, fitting.undone)

    def others(self, mask: Mask, how: Refit) -> dict[str, Tensor]:
        """Copies of what `refit` may change beside the weights of `mask`: biases and running statistics."""
        tensors = self._steps(mask, isinstance(how, LeastSquares)).tensors
        return {name: one.detach().clone() for name, one in tensors.items() if name not in mask}

    def left_alone(self, mask: Mask, how: Refit) -> dict[str, str]:
        """The weights of `mask` that `refit` does not touch, by name, and why."""
        return dict(self._steps(mask, True).left_alone) if isinstance(how, LeastSquares) else {}

    def scales(
        self, kind: str, mask: Mask, values: Mapping[str, Tensor], damping: float = 1e-3
    ) -> Mapping[str, Tensor]:
        """What a weight's magnitude is multiplied by to say how much would change without it.

        Args:
            kind: `"sensitivity"`: see `Sensitivity.scales`. Two look at the outputs of the layer itself.
                `"activation"`: the root of the mean square of the input that the weight multiplies. `"obs"`: so that
                the square of the product is by how much the mean squared change of the layer's outputs grows if the
                weight goes and the output's other survivors are chosen anew, as a share of the outputs' variance.
            mask: Of the pruned network that is looked at.
            values: What differs in it from the dense one beside the mask, as a refit gives it.
            damping: Of the Gram matrix of inputs, as in `fitted`.

        Returns:
            For each weight of `mask` float64 that broadcasts to its shape.

        Raises:
            NoGradients: If the kind is sensitivity, and the network cannot be derived.
            ValueError: If the inputs of a weight cannot be seen.
        """
        if kind == "sensitivity":
            return self._sensitivity(mask, values)
        steps = self._steps(mask, True)
        for name, why in steps.left_alone.items():
            raise ValueError(
                f"importance is {kind!r}, but what {name!r} multiplies is not known ({why}). Leave it out with "
                "exclude, or choose another importance."
            )
        with lent(self._touched(steps)):
            copy_into(steps.tensors, values)
            fill_pruned(steps.tensors, mask)
            sums = steps.sums()
        found = {name: torch.empty(kept.shape, dtype=torch.float64, device=kept.device) for name, kept in mask.items()}
        for layer, moments in sums.items():
            if not moments.finite:
                raise ValueError(
                    f"importance is {kind!r}, but some of what {layer.name!r} multiplies is not finite. Does the "
                    "network give finite outputs on the calibration inputs?"
                )
            kept = steps.kept(layer, mask)
            if kind == "activation":
                scales = (moments.gram.diagonal(dim1=1, dim2=2) / moments.rows).sqrt().unsqueeze(1).expand_as(kept)
            else:
                left = inverse_diagonals(moments.gram / moments.rows, kept, damping)
                scales = (left * moments.spread(layer.bias is not None)).rsqrt()
                scales = torch.where(moments.gram.diagonal(dim1=1, dim2=2).unsqueeze(1) > 0, scales, 0.0)
            part = found[layer.name][layer.outputs]
            part.copy_(scales[..., : part[0].numel()].reshape(part.shape))
            if layer.bias in found:
                found[layer.bias][layer.offsets] = scales[..., -1].flatten()
        return found

    def _sensitivity(self, mask: Mask, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {*mask, *values, *dict(self._module.named_buffers())}
        tensors = {name: one for name, one in named_tensors(self._module).items() if name in names}
        with lent(tensors):
            if (key := tuple(mask)) not in self._sensitivities:
                self._sensitivities[key] = Sensitivity(self._module, key, self._pieces, self._seed)
            copy_into(tensors, values)
            fill_pruned(tensors, mask)
            found = self._sensitivities[key].scales()
        return {name: found[name].to(kept.device) for name, kept in mask.items()}

    def _touched(self, steps: Steps) -> dict[str, Tensor]:
        """All that is written to: what a refit changes, and what the network writes itself."""
        return {**dict(self._module.named_buffers()), **steps.tensors}

    def _steps(self, mask: Mask, layers: bool) -> Steps:
        key = (layers, *mask)
        if key not in self._known:
            most = self._rows // self.batches
            with lent(dict(self._module.named_buffers())):
                self._known[key] = Steps(self._module, list(mask), layers, self._run, self.batches, most, self._seed)
        return self._known[key]


@dataclass(eq=False)
class _Sums:
    """Of one layer: the rows that fit it, and those that judge the fit."""

    layer: Layer
    fit: Moments = field(default_factory=Moments)
    held: Moments = field(default_factory=Moments)


class _Fitting:
    """One refit, while it goes on: a network whose first steps are refitted.

    A run on a batch ends at the first step that is not, once its inputs are noted; when the last batch arrives there
    the step is refitted on the spot, and a batch that is the only one goes on to the next.

    Args:
        steps: Of the network, which is pruned.
        mask: By which.
        damping: Of the fits.
        dense: The values of the dense network.

    Attributes:
        undone: See `Refitted`.
        first: The sums of the first step, where no pruned weight can change them.
    """

    def __init__(self, steps: Steps, mask: Mask, damping: float, dense: Mapping[str, Tensor]) -> None:
        self._steps, self._mask, self._damping, self._dense = steps, mask, damping, dense
        self._pending = list(steps.order)
        self.undone: dict[str, str] = {}
        self.first: list[_Sums] | None = None
        self._begin()

    def start(self, known: list[_Sums] | None) -> None:
        """Refit the first step, if what it is given is known."""
        if known is not None:
            self._sums = known
            self._finish()

    def run(self) -> None:
        """Refit the rest."""
        while self._pending:
            step, arrived = self._pending[0], len(self._arrived)
            for batch in range(self._steps.batches):
                if self._waits_for(step, batch):
                    self._run(step, batch)
            if self._pending[:1] == [step] and len(self._arrived) == arrived:
                self._give_up("pruned, the network does not call it as the dense one does")

    def _waits_for(self, step: Step, batch: int) -> bool:
        called = self._steps.calls[step, batch] > 0
        return called and self._pending[:1] == [step] and batch not in self._arrived

    def _run(self, step: Step, batch: int) -> None:
        steps, kept = self._steps, self._steps.knows(step, batch)
        if not kept:
            with lent(steps.tensors):
                copy_into(steps.tensors, {name: self._dense[name] for name in steps.tensors})
                steps.fetch(step, batch)
        steps.watch(batch, partial(self._meet, batch))
        if not kept:
            steps.forget(step, batch)

    def _meet(self, batch: int, step: Step, call: int, given: Given) -> None:
        if self._pending[:1] != [step]:
            return
        if not self._steps.knows(step, batch):
            raise Enough
        if (why := self._note(step, batch, call, given)) is not None:
            self._give_up(why)
            raise Enough
        calls = self._steps.calls[step, batch]
        if call + 1 < calls:
            return
        self._arrived.add(batch)
        if any(self._waits_for(step, other) for other in range(self._steps.batches)):
            raise Enough
        self._finish()
        # earlier calls were made with the weights as they were; and sums are summed in the order of the batches
        if calls > 1 or self._steps.batches > 1 or not self._pending:
            raise Enough

    def _note(self, step: Step, batch: int, call: int, given: Given) -> str | None:
        """Count in what the step is given; why that cannot be, if so."""
        if not step.layers:
            self._inputs.add(channels(*given))
            return None
        outputs = self._steps.dense(step, batch, call)
        for one, (count, wanted) in zip(self._sums, outputs, strict=True):
            rows = self._steps.rows(one.layer, batch, call, given)
            if rows.count != count:
                return f"pruned, the network gives it {rows.count} rows, but dense {count}"
            x, y, fits = rows.values, wanted.to(torch.float64), rows.values.shape[1] - rows.held
            one.fit.add(x[:, :fits], y[:, :fits])
            one.held.add(x[:, fits:], y[:, fits:])
        return None

    def _finish(self) -> None:
        """Refit the step that comes next."""
        step = self._pending[0]
        if self.first is None and len(self._pending) == len(self._steps.order) and self._steps.first_is_known:
            self.first = self._sums
        for one in self._sums:
            self._fit(one)
        if not step.layers:
            self._normalise(step)
        self._next()

    def _fit(self, one: _Sums) -> None:
        steps, layer = self._steps, one.layer
        start = steps.maps(layer)
        steps.write(layer, fitted(one.fit, start, steps.kept(layer, self._mask), self._damping))
        refitted = steps.maps(layer)  # as rounded to the weight's own type
        why = None
        if not (one.fit.finite and one.held.finite and bool(refitted.isfinite().all())):
            why = "what it is given is not finite, or the fit is not"
        elif one.held.rows and one.held.error(refitted) > one.held.error(start) + _ROUNDING * one.held.size:
            why = "the fit is worse than none on rows held back from it"
        if why is not None:
            steps.write(layer, start)
            self.undone[layer.name] = why

    def _normalise(self, step: Step) -> None:
        mean, variance = self._inputs.moments()
        if bool(mean.isfinite().all() & variance.isfinite().all()):
            found = {f"{step.prefix}running_mean": mean, f"{step.prefix}running_var": variance}
            copy_into(self._steps.tensors, found)

    def _give_up(self, why: str) -> None:
        self.undone |= {layer.name: why for layer in self._pending[0].layers}
        self._next()

    def _next(self) -> None:
        self._pending.pop(0)
        self._begin()

    def _begin(self) -> None:
        self._arrived: set[int] = set()
        self._sums = [_Sums(layer) for layer in self._pending[0].layers] if self._pending else []
        self._inputs = Spread()


def _forward(module: nn.Module, batches: Sequence[Any]) -> Callable[[int], object]:
    def run(number: int) -> object:
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            batch = batches[number]
            return module(*batch) if isinstance(batch, tuple | list) else module(batch)
        finally:
            for part, training in modes.items():
                part.training = training

    return run
