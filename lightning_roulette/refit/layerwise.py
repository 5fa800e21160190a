"""A pruned network refitted layer by layer, each layer on inputs from the layers that are already refitted.

The order is that of Dong, Chen and Pan, "Learning to prune deep neural networks via layer-wise optimal brain surgeon"
(NeurIPS 2017), and of Frantar and Alistarh, "Optimal brain compression" (NeurIPS 2022). Which weights a layer
keeps is given, or is chosen on the same inputs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from lightning_roulette.large.gathered import blank, gathered, whole
from lightning_roulette.large.processes import Processes
from lightning_roulette.network.layers import Layer, channels
from lightning_roulette.network.lending import InUse, copy_into, lent, write
from lightning_roulette.network.recurrent import has_state
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.refit.compared import Compared
from lightning_roulette.refit.dense import DenseOutputs
from lightning_roulette.refit.enough import RowCount
from lightning_roulette.refit.fitting import Fitting, fault
from lightning_roulette.refit.gram import LayerSums
from lightning_roulette.refit.in_step import RunsInStep, follow_in_step
from lightning_roulette.refit.interleaved import Interleaved
from lightning_roulette.refit.matrices import RowSampler, matrix_of, outputs_of, write_matrix
from lightning_roulette.refit.moments import MeanAndVariance
from lightning_roulette.refit.narrowing import Narrowing
from lightning_roulette.refit.runs import Runs
from lightning_roulette.refit.solved import changeable, statistics_of, steps_of, weights_of
from lightning_roulette.refit.traversal import Call, CallLoop, Given, Seen, Step, Traversal
from lightning_roulette.refit.turns import Turns, turns_of

_DENSE_SHARE = 4  # outputs of the dense network take at most one part in this many of the memory
_RECURRENT = "it is recurrent, and its weights are sharded"


class NotKept(Exception):
    """A layer's refit is not kept; the message is the reason."""


class Layerwise:
    """The layers and batch normalisations of a network, refitted for one mask after another.

    Args:
        module: The network. It must be dense here.
        names: Names of the weights that masks prune.
        layers: Whether to refit layers; otherwise only running statistics.
        runs: Runs of the network.
        sampler: Chooses the rows of input.
        memory: Bytes for what is kept between layers: outputs of the dense network, and runs that wait. None: nothing
            is kept, and `refit` cannot be called.
        processes: Those that share the batches. They all call the same methods.

    Attributes:
        tensors: The parameters and buffers that a refit may change, by name.
        statistics: Those of them that are running statistics, by name.
        left_alone: The weights that no refit changes, by name, with the reason.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        layers: bool,
        runs: Runs,
        sampler: RowSampler,
        memory: int | None,
        processes: Processes,
    ) -> None:
        found, left_alone = layers_of(module, names) if layers else ([], {})
        recurrent = {layer for layer in found if layer.recurrent and isinstance(runs, RunsInStep)}
        left_alone |= {name: _RECURRENT for layer in recurrent for name in layer.names}
        steps = steps_of(module, [layer for layer in found if layer not in recurrent])
        self.tensors = changeable(module, names, steps)
        self.statistics = {name: self.tensors[name] for name in statistics_of(steps)}
        self._module, self._memory, self._processes = module, memory, processes
        self._carrying: set[nn.Module] = set()
        self._look_anew(sampler)
        self._traversal = Traversal(steps, runs, self._meet, lambda: self._fewer(steps, runs), processes)
        self._turns = Turns(False)
        uncalled = [step for step in steps if step not in self._traversal.order]
        modules = [step.module for step in steps]
        self._carrying = processes.any_of(modules, self._carrying)
        self._scattered = processes.any_of(modules, self._traversal.scattered)
        carrying = [step for step in steps if step.module in self._carrying]
        scattered = [step for step in steps if step.module in self._scattered]
        self.left_alone = {
            **left_alone,
            **dict.fromkeys(weights_of(uncalled), "the network does not call it on the calibration inputs"),
            **dict.fromkeys(weights_of(carrying), "the network calls it again with states that it gave before"),
            **dict.fromkeys(weights_of(scattered), "the network calls it in several threads"),
        }
        self._first_sums: dict[Layer, LayerSums] | None = None

    @property
    def batches(self) -> int:
        """How many of the batches of all processes are used; see `RowCount.batches_for`."""
        return self._sampler.batches

    def try_turns(self) -> Turns:
        """Try whether batches may run by turns. The network must be dense."""
        if isinstance(self._traversal.runs, RunsInStep):
            return Turns(False, note="the calibration batches run anew for each layer, because weights are sharded.")
        left = max(0, (self._memory or 0) - self._dense_outputs.bytes)
        return turns_of(self._module, self._traversal, self._compared, left)

    def take_turns(self, turns: Turns) -> None:
        """Let batches run by turns from now on, or one after the other."""
        self._turns = turns

    def refit(self, fitting: Fitting | None, statistics: bool = True) -> dict[str, str]:
        """Refit the network, which must be pruned by the mask, in place.

        Args:
            fitting: How layers are refitted, with the mask. It notes which weights are chosen. None: they are not.
            statistics: Whether running statistics are computed.

        Returns:
            Names of the weights whose refit is not kept, with the reason.
        """
        reasons: dict[str, str] = {}
        steps = [step for step in self._traversal.order if step.module not in self._carrying]
        steps = [step for step in steps if (step.module not in self._scattered if step.layers else statistics)]
        if fitting is None:
            steps = [step for step in steps if not step.layers]
        else:
            self._narrow_left_alone(fitting.narrowing)
        self._followed(self._refit_steps(steps, fitting, reasons))
        return reasons

    def _look_anew(self, sampler: RowSampler) -> None:
        """Begin to note what is needed of the first run."""
        self._sampler, self._rows = sampler, RowCount(sampler)
        self._dense_outputs = DenseOutputs(InUse(self._module), sampler, (self._memory or 0) // _DENSE_SHARE)
        self._compared = Compared()
        self._carrying = set()

    def _fewer(self, steps: Sequence[Step], runs: Runs) -> Runs | None:
        """Return runs on fewer batches, if these have enough rows. All batches are then as many as they."""
        batches = self._rows.batches_for(steps, self._processes)
        if batches == self._sampler.batches:
            return None
        self._look_anew(replace(self._sampler, batches=batches))
        return runs.fewer(batches, self._processes)

    def _meet(self, call: Call, given: Given) -> None:
        """Note what is needed of a call in the dense network."""
        self._rows.note(call, given)
        if self._memory is None:
            return
        self._dense_outputs.keep(call, given)
        self._compared.note(call, given)
        # such states are outputs of the step itself: the fit to those of a layer that is not refitted can be worse than
        # no refit
        if call.number and call.step.followed and has_state(*given):
            self._carrying.add(call.step.module)

    def _followed(self, loop: CallLoop[None]) -> None:
        if isinstance(runs := self._traversal.runs, RunsInStep):
            follow_in_step(self._traversal, runs, loop)
            return
        if self._turns.by_turns:
            ends = {(self._traversal.order[place], batch) for place, batch in self._turns.ends}
            Interleaved(self._module, self._traversal, ends).follow(loop)
        else:
            self._traversal.follow(loop)

    def _calls_of(self, step: Step) -> list[Call]:
        traversal = self._traversal
        return [call for batch in range(traversal.batches) for call in traversal.calls_of(step, batch)]

    def sums(self, names: Container[str] | None = None) -> dict[Layer, LayerSums]:
        """Return Gram sums of layers' inputs and outputs in the network as it is. All rows are fitted.

        Args:
            names: Names of weights, for the layers with one of them. None: all layers.
        """
        found: dict[Layer, LayerSums] = {}

        def add(call: Call, given: Given) -> None:
            for layer in () if call.step.followed else layers.keys() & {*call.step.layers}:
                rows = self._sampler.rows(layer, call, given).values
                found.setdefault(layer, LayerSums()).add(rows, outputs_of(rows, matrix_of(layer, self.tensors)))

        every = dict.fromkeys(layer for step in self._traversal.order for layer in step.layers)
        layers = dict.fromkeys(one for one in every if names is None or any(own in names for own in one.names))
        for batch in range(self._traversal.batches):
            self._traversal.listen(batch, add)
        sums = {layer: self._over_all(layer, found.get(layer, LayerSums())) for layer in layers}
        return {layer: its for layer, its in sums.items() if its.fit.rows}

    def _over_all(self, layer: Layer, sums: LayerSums) -> LayerSums:
        like = {name: blank(self.tensors[name]) for name in layer.parameters}
        return sums.over(self._processes, matrix_of(layer, like))

    def _refit_steps(self, steps: Sequence[Step], fitting: Fitting | None, reasons: dict[str, str]) -> CallLoop[None]:
        """Collect the inputs of each step, refit it, and go on to the next step."""
        for step in steps:
            if fitting is not None and step.layers:
                yield from self._refit_layers(step, fitting, reasons)
            else:
                yield from self._normalise(step)

    def _refit_layers(self, step: Step, fitting: Fitting, reasons: dict[str, str]) -> CallLoop[None]:
        """Collect the inputs of a step with layers, and refit them. The Gram sums are freed at the end."""
        known = True
        try:
            sums = yield from self._sums_of(step, fitting.dense)
        except NotKept as reason:
            reasons |= {name: str(reason) for layer in step.layers for name in layer.names}
            sums, known = dict.fromkeys(step.layers, LayerSums()), False
        for layer, layer_sums in sums.items():
            again = layer.recurrent and not step.followed
            if known and not (again and not reasons.keys().isdisjoint(layer.names)):
                try:
                    self._fit(layer, layer_sums, fitting)
                except NotKept as reason:  # the second time it keeps what was solved before
                    reasons |= {} if again else dict.fromkeys(layer.names, str(reason))
            if not step.followed:
                self._narrow(layer, layer_sums, fitting.narrowing)

    def _normalise(self, step: Step) -> CallLoop[None]:
        """Set a batch normalisation's running statistics to the mean and variance of its inputs."""
        inputs, missed = MeanAndVariance(), False
        for call in self._calls_of(step):
            if (given := (yield call)) is None:
                missed = True
                break
            inputs.add(channels(*given))
        yield Seen(step)
        if self._processes.anywhere(missed):
            return
        mean, variance = inputs.over(self._processes, self.tensors[f"{step.prefix}running_mean"]).result()
        if bool(mean.isfinite().all() & variance.isfinite().all()):
            copy_into(self.tensors, {f"{step.prefix}running_mean": mean, f"{step.prefix}running_var": variance})

    def _sums_of(self, step: Step, dense: Mapping[str, Tensor]) -> CallLoop[dict[Layer, LayerSums]]:
        """Return Gram sums of a step's inputs in the network as it is now and its outputs in the dense network."""
        is_first = step is self._traversal.order[0]
        if is_first and self._first_sums is not None:
            return self._first_sums
        sums, reason = {layer: LayerSums() for layer in step.layers}, ""
        try:
            for call in self._calls_of(step):
                given = yield call
                with self._dense_layers(step, dense):
                    self._add(sums, call, given)
        except NotKept as found:
            reason = str(found)
        yield Seen(step)
        if reason := self._processes.first_text(reason):
            raise NotKept(reason)
        sums = {layer: self._over_all(layer, own) for layer, own in sums.items()}
        if is_first and self._no_mask_changes_inputs_of(step):
            self._first_sums = sums
        return sums

    def _add(self, sums: Mapping[Layer, LayerSums], call: Call, given: Given | None) -> None:
        if given is None:
            raise NotKept("the pruned network does not call it as the dense network does")
        for layer, layer_sums in sums.items():
            rows, dense = self._sampler.rows(layer, call, given), self._dense_outputs.of(layer, call)
            if rows.count != dense.count:
                raise NotKept(
                    f"the pruned network gives it {rows.count} rows of input, the dense network {dense.count}"
                )
            layer_sums.add_call(rows, dense.outputs)

    @contextmanager
    def _dense_layers(self, step: Step, dense: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the layers of a step their dense weights inside the block, if another step follows for them."""
        names = [name for layer in step.layers for name in layer.parameters] if step.followed else []
        own = {name: self.tensors[name] for name in names}
        with lent(own):
            copy_into(own, {name: dense[name] for name in own})
            yield

    def _no_mask_changes_inputs_of(self, step: Step) -> bool:
        calls = self._traversal.calls
        again = any(calls[step, batch] > 1 for batch in range(self._traversal.batches))
        once = not self._processes.anywhere(again)
        return once and not self.left_alone and self._traversal.leading == {step}

    def _fit(self, layer: Layer, sums: LayerSums, fitting: Fitting) -> None:
        """Solve for a layer's kept weights and write them. Undo it and raise `NotKept` if they are no improvement."""
        with whole(self.tensors, layer.parameters, self._processes) as tensors:
            start = matrix_of(layer, tensors)
            solved, kept = fitting.fit(layer, sums)
            write_matrix(layer, tensors, solved)
            if reason := self._processes.first_text(fault(sums, start, matrix_of(layer, tensors))):
                write_matrix(layer, tensors, start)
        if reason:
            raise NotKept(reason)
        fitting.note(layer, kept)

    def _narrow(self, layer: Layer, sums: LayerSums, narrowing: Narrowing) -> None:
        """Round the weights of a layer to the values that are allowed."""
        if narrowing.values != "float32":
            with whole(self.tensors, layer.parameters, self._processes) as tensors:
                rounded = narrowing.refitted(layer, tensors, matrix_of(layer, tensors), sums)
                write_matrix(layer, tensors, rounded)

    def _narrow_left_alone(self, narrowing: Narrowing) -> None:
        """Round the weights that no refit changes to the nearest values that are allowed."""
        for name in {id(self.tensors[name]): name for name in self.left_alone}.values():
            write(self.tensors[name], narrowing.nearest(gathered(self.tensors[name].detach(), self._processes)))
