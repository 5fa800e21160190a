"""Calibration: a network with batches of inputs, for refits and for importances that depend on inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_roulette.checks import check_count
from lightning_roulette.large.gathered import holders_of
from lightning_roulette.large.processes import ONE_PROCESS, Processes
from lightning_roulette.large.shards import any_sharded, reshard
from lightning_roulette.mask.mask import Mask, fill_pruned
from lightning_roulette.network.lending import copy_into, lent
from lightning_roulette.network.samples import pieces_of
from lightning_roulette.refit.distillations import Distillations
from lightning_roulette.refit.fitting import Fitting
from lightning_roulette.refit.forwards import forwards, number_of
from lightning_roulette.refit.in_step import in_step
from lightning_roulette.refit.layerwise import Layerwise
from lightning_roulette.refit.matrices import RowSampler
from lightning_roulette.refit.narrowing import Narrowing
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.refit.runs import Runs
from lightning_roulette.refit.scales import input_scales
from lightning_roulette.refit.sensitivities import Sensitivities
from lightning_roulette.refit.solved import affine_of
from lightning_roulette.refit.turns import Turns
from lightning_roulette.refit.unit_choice import UnitChoices
from lightning_roulette.refit_settings import LeastSquares, Refit, refit_of
from lightning_roulette.wheel.units.units import Units

_log = logging.getLogger(__name__)

ALL, LESSON = 1 << 60, 2**6  # samples: all that there are, and those of a gradient step
_TARGETS = 4  # outputs of the dense network for gradient steps take at most one part in this many of the memory


class Calibration:
    """A network and batches of inputs without labels, on which pruned versions of the network are refitted.

    Each method changes the network while it runs, and restores it bit for bit. In each call of a layer,
    `rows / batches` rows of its input are used, but at least eight. If the input has more rows, it is cut into as many
    equal parts, and one row of each is chosen at random. A row is one position of one sample. If each layer has more
    than four times its rows, only the first batches that have as many are run, unless `rows` is given. This is logged.

    In a refit, all batches run by turns, each in a thread of its own. A batch waits at the layer that is being solved,
    and goes on with the new weights. So a refit runs each batch once, and once more for each layer that is called
    several times. Before the first refit, this is tried on two or three batches without a change of weights. Every
    batch runs anew for each layer if an input of a layer is then not the same to the bit, or if the network fails. This
    is logged with the reason. Earlier, all batches have run once in the dense network, whose outputs all refits use.

    Memory, in addition to the batches:

    - two copies of the weights,
    - the rows of one layer in one batch,
    - the Gram sums of one layer and of the first layer (`inputs ** 2` float64 numbers for each group), and an eighth of
      their rows (at least one), which judges the refit,
    - linear systems of at most 2**26 bytes,
    - if neurons or heads are chosen, the Gram sums of all layers that read them,
    - `cache_bytes` for what is kept between layers: a quarter for outputs of the dense network on the chosen rows, of
      which more go to a temporary file if one can be written; the rest for batches that wait. A batch that
      does not fit at a layer runs anew for the next one. This is logged with the number of bytes that would suffice.

    Args:
        module: The network. It must have its dense weights at each call.
        batches: Inputs of the network's forward, each a tensor or a tuple of arguments; or the number of batches that
            `run` knows. The network may write to them; they stay as they are.
        run: Runs the network on the batch of a given number, in evaluation mode. None calls the network's forward on
            `batches`. Several runs may be under way, see above. If the weights are sharded, it is also called with the
            number `batches`, and may run on any inputs then.
        around: Returns a context that is entered around one run or around several, for what `run` needs.
        lessons: Functions that each run the network on some samples, for the gradient steps of
            `LeastSquares(distill=...)`, which need the memory of a training step. None uses all samples of `batches`,
            64 at a time, if the first dimension counts samples; with `run`, it uses whole batches.
        pieces: Functions that each run the network on a few samples, for `"sensitivity"`, which needs the memory of a
            training step. None uses the first 2,048 samples of `batches`, 256 at a time, if the first dimension counts
            samples; with `run`, it uses whole batches. The first ones are enough if they give each layer 16,384 rows.
        rows: Number of rows of each layer's input, over all batches. None takes 32 for each input of a layer, at least
            4,096 and at most 65,536. See docs/measurements.md for what fewer rows cost.
        seed: Seed of the choice of rows and of random directions.
        cache_bytes: Memory for what a refit keeps between layers, see above.
        processes: Processes that each have a share of the batches and pieces; see `Processes.share`. If weights are
            sharded, those that hold the shards need not be given. All call the same methods. Results are those of one
            process with all batches, up to rounding. If weights are chosen, rounding decides between choices of nearly
            equal error.

    Attributes:
        batches: Number of batches of this process.

    Raises:
        TypeError: If `batches` is neither a list nor a number, or if it is a number and `run` is None.
        ValueError: If no process has a batch, or if the networks of the processes differ.
        FailedElsewhere: If another process fails.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Any] | int,
        *,
        run: Callable[[int], object] | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        pieces: Sequence[Callable[[], object]] | None = None,
        lessons: Sequence[Callable[[], object]] | None = None,
        rows: int | None = None,
        seed: int = 0,
        cache_bytes: int = 2**31,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        reshard(module)
        sharded = any_sharded(module.parameters())
        self._processes = processes = holders_of(module, processes)
        self.batches = number_of(batches, run is not None)
        if (total := int(self._processes.add(torch.tensor(self.batches))[0])) < 1:
            raise ValueError("batches is empty, but must have at least one batch of inputs.")
        if run is None and sharded and not bool(processes.each(torch.tensor(self.batches)).all()):
            raise ValueError(
                f"there are {total} batches for {processes.ranks} processes, but each process that holds shards of the "
                "network runs it, and needs a batch. Give each at least one."
            )
        if run is None:
            given = cast("Sequence[Any]", batches)
            few, taught = forwards(module, pieces_of(given)), forwards(module, pieces_of(given, ALL, LESSON))
            self._runs = forwards(module, given)
        else:
            few = taught = self._runs = Runs(self.batches, run, around)
        if sharded:
            self._runs = in_step(self._runs, module, total, processes)
        self._sensitivities = Sensitivities(module, _each(few) if pieces is None else pieces, seed, self._processes)
        every = _each(taught) if lessons is None else lessons
        self._distillations = Distillations(module, every, seed, self._processes, cache_bytes // _TARGETS)
        self._module, self._sampler = module, RowSampler(rows, total, seed, self._processes)
        check_count("cache_bytes", cache_bytes, at_least=0)
        self._cache_bytes = cache_bytes
        self._layerwise: dict[tuple[Any, ...], Layerwise] = {}  # prepared once for each set of names
        self._tried: set[Layerwise] = set()
        self._choices = UnitChoices(self._processes)

    def refit(
        self,
        mask: Mask,
        how: str | Refit = "least_squares",
        allowed: Mask | None = None,
        *,
        statistics: bool = True,
        units: Units | None = None,
    ) -> Refitted:
        """Return the network's values after pruning by a mask and a refit.

        The layers of the mask are refitted in the order in which the network calls them. The survivors and the bias of
        a layer are solved so that its outputs are closest to the dense network's outputs (see `Prepared.solve`, and
        `Fastest` for how exactly). Its inputs come from the pruned network, in which the layers
        before it are already refitted. A recurrent layer is solved twice: with the states that its dense weights would
        give, and then with those that it gives itself. Running statistics of batch normalisations become the mean and
        variance of their inputs.

        With `LeastSquares(choose=True)` each output of a layer keeps as many weights as in the mask, but not always the
        same ones: those that leave a smaller squared error on its inputs (see `chosen`). The choice of a layer is kept
        only if the error is smaller than that of the mask's weights, and not larger on rows that it was not solved on.
        If units are given, they stay or leave as a whole: as many of each few neighbours, of each row of blocks, or of
        each group of neurons or heads (see `UnitChoice`) stay as in the mask.

        With other `values` than `"float32"`, the weights of each layer are then rounded (see `Narrowing.refitted`),
        before the next layer is solved. Weights that the refit does not change are rounded to the nearest values.
        Biases, and other weights with a single dimension, are not rounded.

        The refit of a layer is not kept if it is not finite, or if it increases the error on rows that it was not
        solved on. The result depends only on the dense network, the mask and the batches.

        Args:
            mask: Which weights are kept.
            how: One of

                - `"least_squares"`, or a `LeastSquares` with other choices.
                - `"batch_norm"`, or a `Refit`: only running statistics change.
            allowed: With `choose`, the weights that may be kept, the mask's among them. None: all.
            statistics: Whether running statistics are computed. False: they stay as in the dense network.
            units: With `choose`, what stays or leaves as a whole, see above. None: single weights.

        Raises:
            TypeError: If `how` is neither a word nor a `Refit`.
            ValueError: If `how` is another word.
        """
        choices = refit_of(how)
        with self._processes.failing_together():
            found = self._refitted(mask, choices, allowed, statistics, units)
        return self._agreed_refit(mask, found)

    def _refitted(
        self, mask: Mask, how: Refit | None, allowed: Mask | None, statistics: bool, units: Units | None
    ) -> Refitted:
        layerwise = self._prepared(mask, isinstance(how, LeastSquares))
        self._try_turns(layerwise)
        changed = self._changed(layerwise, mask, how)
        with lent({**self._written(layerwise), **changed}) as dense:
            distillation = self._distillations.prepared(mask, how)
            kept = self._choices.chosen(layerwise, mask, how, allowed, units, dense)
            fitting = self._fitting(kept, dense, how, allowed, units) if isinstance(how, LeastSquares) else None
            fill_pruned(layerwise.tensors, kept)
            reasons = layerwise.refit(fitting, statistics)
            if distillation is not None:
                settle = partial(layerwise.refit, None, statistics)
                self._note(distillation.taught(changed, statistics, settle))
            values = {name: one.detach().clone() for name, one in changed.items()}
            if fitting is not None and fitting.chosen is not None:
                kept = fitting.chosen
            return Refitted(values, reasons, None if kept is mask else kept)

    def others(self, mask: Mask, how: Refit) -> dict[str, Tensor]:
        """Return copies of the biases and running statistics that `refit` may change, by name.

        Args:
            mask: Which weights are kept.
            how: The settings of the refit.
        """
        with self._processes.failing_together():
            tensors = self._changed(self._prepared(mask, isinstance(how, LeastSquares)), mask, how)
        return {name: one.detach().clone() for name, one in tensors.items() if name not in mask}

    def left_alone(self, mask: Mask, how: Refit) -> dict[str, str]:
        """Return the weights of the mask that `refit` does not change, by name, with the reason.

        Args:
            mask: Which weights are kept.
            how: The settings of the refit.
        """
        if not isinstance(how, LeastSquares):
            return {}
        with self._processes.failing_together():
            return dict(self._prepared(mask, True).left_alone)

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
        with self._processes.failing_together():
            if kind == "sensitivity":
                found: Mapping[str, Tensor] = self._sensitivities.scales(mask, values)
            else:
                found = self._input_scales(kind, mask, values, damping)
        return self._agreed_scales(found)

    def _input_scales(
        self, kind: str, mask: Mask, values: Mapping[str, Tensor], damping: float
    ) -> Mapping[str, Tensor]:
        layerwise = self._prepared(mask, True, refits=False)
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

    def gates(self, units: Units, mask: Mask, values: Mapping[str, Tensor]) -> Tensor:
        """Return how much the outputs of the network depend on each unit, float64, shape `(units,)`.

        It is the sum over outputs and samples of the squared derivative with respect to a factor of all weights that
        read the unit; see `Gates`. Only ratios of these numbers mean something.

        Args:
            units: The units.
            mask: The mask of the pruned network.
            values: Values that differ from the dense network, from `Refitted.values`.

        Raises:
            NoGradients: If the network has no derivatives.
        """
        with self._processes.failing_together():
            return self._sensitivities.gates(units, mask, values)

    def _changed(self, layerwise: Layerwise, mask: Mask, how: Refit | None) -> dict[str, Tensor]:
        """Return the tensors that this kind of refit changes, and the weights of the mask."""
        if isinstance(how, LeastSquares):
            return {**layerwise.tensors, **affine_of(self._module)} if how.distill else layerwise.tensors
        return {name: layerwise.tensors[name] for name in dict.fromkeys([*mask, *layerwise.statistics])}

    def _written(self, layerwise: Layerwise) -> dict[str, Tensor]:
        """Return all tensors that a refit or the network itself writes to."""
        return {**dict(self._module.named_buffers()), **layerwise.tensors}

    def _try_turns(self, layerwise: Layerwise) -> None:
        if layerwise not in self._tried:
            with lent(dict(self._module.named_buffers())):
                turns = self._agreed(layerwise.try_turns())
            layerwise.take_turns(turns)
            self._tried.add(layerwise)
            if layerwise.batches < self._sampler.batches:
                self._say(
                    f"a refit runs {layerwise.batches} of {self._sampler.batches} calibration batches, which have four "
                    "times the rows that each layer needs."
                )
            self._note(self._processes.first_text(turns.note))

    def _agreed(self, turns: Turns) -> Turns:
        """Return how batches run."""
        return turns

    def _agreed_refit(self, mask: Mask, found: Refitted) -> Refitted:
        """Return the refit for a mask that counts."""
        return found

    def _agreed_scales(self, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the scales that count."""
        return found

    def _fitting(
        self,
        mask: Mask,
        dense: Mapping[str, Tensor],
        how: LeastSquares,
        allowed: Mask | None,
        units: Units | None,
    ) -> Fitting:
        narrowing = Narrowing(how.values, mask.survivors, how.damping, self._processes)
        choose = how.choose and (units is None or not units.coupled)
        return Fitting(mask, dense, how.damping, choose, allowed, units, self._processes, narrowing)

    def _note(self, sentence: str) -> None:
        if sentence:
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        _log.info(sentence)

    def _prepared(self, mask: Mask, layers: bool, refits: bool = True) -> Layerwise:
        key = (layers, refits, *mask)
        if not (layers and refits) and (ready := self._layerwise.get((True, True, *mask))) is not None:
            return ready  # it does what the others do, and has seen the dense network
        if key not in self._layerwise:
            with lent(dict(self._module.named_buffers())):
                self._layerwise[key] = Layerwise(
                    self._module,
                    list(mask),
                    layers,
                    self._runs,
                    self._sampler,
                    self._cache_bytes if refits else None,
                    self._processes,
                )
        return self._layerwise[key]


def _each(runs: Runs) -> list[Callable[[], object]]:
    return [partial(runs.alone, number) for number in range(runs.batches)]
