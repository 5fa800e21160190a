"""Calibration: a network with batches of inputs, for refits and for importances that depend on inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lightning_roulette.mask.mask import Mask, fill_pruned
from lightning_roulette.network.lending import copy_into, lent, named_tensors
from lightning_roulette.network.samples import pieces_of
from lightning_roulette.refit.layerwise import Layerwise
from lightning_roulette.refit.matrices import RowSampler
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.refit.scales import input_scales
from lightning_roulette.refit.sensitivity import Sensitivity
from lightning_roulette.refit.solvers.fastest import Fastest
from lightning_roulette.settings import LeastSquares, Refit, refit_of


class Calibration:
    """A network and batches of inputs without labels, on which pruned versions of the network are refitted.

    Each method changes the network while it runs, and restores it bit for bit. In each call of a layer,
    `rows / batches` rows of its input are used, but at least eight. If the input has more rows, they are chosen at
    random. A row is one position of one sample.

    Memory, in addition to the batches:

    - two copies of the weights,
    - the rows of one layer in one batch,
    - the Gram sums of one layer and of the first layer (`inputs ** 2` float64 numbers for each group), and an eighth of
      their rows, which judges the refit,
    - linear systems of at most 2**26 bytes,
    - outputs of the dense network, up to 2**29 bytes. Further outputs are computed again for each refit.

    Args:
        module: The network. It must have its dense weights at each call.
        batches: Inputs of the network's forward, each a tensor or a tuple of arguments; or the number of batches that
            `run` knows.
        run: Runs the network on the batch of a given number, in evaluation mode. None calls the network's forward on
            `batches`.
        pieces: Functions that each run the network on a few samples, for `"sensitivity"`, which needs the memory of a
            training step. None uses the first 2,048 samples of `batches`, 256 at a time, if the first dimension counts
            samples; with `run`, it uses whole batches.
        rows: Number of rows of each layer's input, over all batches.
        seed: Seed of the choice of rows and of random directions.

    Attributes:
        batches: Number of batches.

    Raises:
        TypeError: If `batches` is neither a list nor a number, or if it is a number and `run` is None.
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
        self.batches = _number_of(batches, run is not None)
        if run is None:
            few = pieces_of(cast("Sequence[Any]", batches))
            run, small = _forward(module, cast("Sequence[Any]", batches)), _forward(module, few)
            whole = [partial(small, number) for number in range(len(few))]
        else:
            whole = [partial(run, number) for number in range(self.batches)]
        self._module, self._run, self._pieces = module, run, whole if pieces is None else pieces
        self._sampler, self._seed = RowSampler(rows // self.batches, seed), seed
        # both are prepared once for each set of names
        self._layerwise: dict[tuple[Any, ...], Layerwise] = {}
        self._sensitivities: dict[tuple[str, ...], Sensitivity] = {}

    def refit(self, mask: Mask, how: str | Refit = "least_squares") -> Refitted:
        """Return the network's values after pruning by a mask and a refit.

        The layers of the mask are refitted in the order in which the network calls them. The survivors and the bias of
        a layer are solved so that its outputs are closest to the dense network's outputs, up to a thousandth of the
        squared error (see `Prepared.solve` and `Fastest`). Its inputs come from the pruned network, in which the layers
        before it are already refitted. Running statistics of batch normalisations become the mean and variance of their
        inputs.

        The refit of a layer is not kept if it is not finite, or if it increases the error on rows that it was not
        solved on. The result depends only on the dense network, the mask and the batches.

        Args:
            mask: Which weights are kept.
            how: One of

                - `"least_squares"`, or a `LeastSquares` with other choices.
                - `"batch_norm"`, or a `Refit`: only running statistics change.

        Raises:
            TypeError: If `how` is neither a word nor a `Refit`.
            ValueError: If `how` is another word.
        """
        choices = refit_of(how)
        layerwise = self._prepared(mask, isinstance(choices, LeastSquares))
        solver = Fastest(choices.damping if isinstance(choices, LeastSquares) else 0.0)
        with lent(self._written(layerwise)) as dense:
            fill_pruned(layerwise.tensors, mask)
            reasons = layerwise.refit(mask, solver, dense)
            return Refitted({name: one.detach().clone() for name, one in layerwise.tensors.items()}, reasons)

    def others(self, mask: Mask, how: Refit) -> dict[str, Tensor]:
        """Return copies of the biases and running statistics that `refit` may change, by name."""
        tensors = self._prepared(mask, isinstance(how, LeastSquares)).tensors
        return {name: one.detach().clone() for name, one in tensors.items() if name not in mask}

    def left_alone(self, mask: Mask, how: Refit) -> dict[str, str]:
        """Return the weights of the mask that `refit` does not change, by name, with the reason."""
        return dict(self._prepared(mask, True).left_alone) if isinstance(how, LeastSquares) else {}

    def scales(
        self, kind: str, mask: Mask, values: Mapping[str, Tensor], damping: float = 1e-3
    ) -> Mapping[str, Tensor]:
        """Return the factors that turn the magnitudes of weights into importances.

        Args:
            kind: The importance tells how much the removal of a weight changes

                - `"sensitivity"`: the outputs of the network; see `Sensitivity.scales`.
                - `"activation"`: the outputs of the layer. The factor is the root mean square of the weight's input.
                - `"obs"`: the outputs of the layer after its other survivors are solved again. The square of the
                  importance is the growth of their mean squared error, as a share of their variance.
            mask: The mask of the pruned network.
            values: Values that differ from the dense network, from `Refitted.values`.
            damping: Damping of the Gram matrix for `"obs"`; see `Cholesky`.

        Returns:
            For each weight of the mask, a float64 tensor that broadcasts to its shape.

        Raises:
            NoGradients: If the kind is `"sensitivity"` and the network has no derivatives.
            ValueError: If the inputs of a weight are unknown or not finite.
        """
        if kind == "sensitivity":
            return self._sensitivity(mask, values)
        layerwise = self._prepared(mask, True)
        for name, why in layerwise.left_alone.items():
            raise ValueError(
                f"importance is {kind!r}, but the inputs of {name!r} are not known ({why}). Leave the parameter out "
                "with exclude, or choose another importance."
            )
        with lent(self._written(layerwise)):
            copy_into(layerwise.tensors, values)
            fill_pruned(layerwise.tensors, mask)
            sums = layerwise.sums()
        return input_scales(kind, sums, mask, damping)

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

    def _written(self, layerwise: Layerwise) -> dict[str, Tensor]:
        """Return all tensors that a refit or the network itself writes to."""
        return {**dict(self._module.named_buffers()), **layerwise.tensors}

    def _prepared(self, mask: Mask, layers: bool) -> Layerwise:
        key = (layers, *mask)
        if key not in self._layerwise:
            with lent(dict(self._module.named_buffers())):
                self._layerwise[key] = Layerwise(
                    self._module, list(mask), layers, self._run, self.batches, self._sampler
                )
        return self._layerwise[key]


def _number_of(batches: Sequence[Any] | int, has_run: bool) -> int:
    if not isinstance(batches, int | Sequence):
        kind = type(batches).__name__
        raise TypeError(f"batches is a {kind}, but must be a list of batches, or a number. Pass list(...) of it.")
    number = batches if isinstance(batches, int) else len(batches)
    if number < 1:
        raise ValueError("batches is empty, but must have at least one batch of inputs.")
    if isinstance(batches, int) and not has_run:
        raise TypeError(f"batches is {batches}, but must be a list of inputs if run is None. Pass the inputs, or run.")
    return number


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
