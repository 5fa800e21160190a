"""Validation of a network that is lent: loggers, callbacks and random state are left untouched.

Only this folder touches private attributes of a Trainer. The names are those of lightning 2.6. No public interface
validates inside `fit`: `trainer.validate` ends the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor

from lightning_roulette.large.shards import reshard
from lightning_roulette.network.lending import surely
from lightning_roulette.trainer.lightning_names import in_package_of
from lightning_roulette.trainer.validation.attributes import PlainAttributes
from lightning_roulette.trainer.validation.logged import Logged, Results, logged_in, results_for
from lightning_roulette.trainer.validation.loop import BorrowedLoop, borrowed_loop, transferred
from lightning_roulette.trainer.validation.replacing import buffers_not_sent, connector_after, replaced
from lightning_roulette.trainer.validation.snapshot import Snapshot, seed_global_generators
from lightning_roulette.trainer.validation.steps import Steps


class IsolatedValidation:
    """A `with` block in which a module is validated within `fit`, and that leaves everything else as it was.

    Inside the block

    - callbacks and loggers are muted copies, except the callbacks in `keep_callbacks`;
    - so are loggers and writers that the module keeps in its attributes;
    - the profiler is off;
    - an evaluation loop and a logger connector of our own replace the Trainer's.

    After the block, also after an exception or Ctrl-C, these are what they were before:

    - the Trainer's attributes;
    - training modes, buffers and metric states of the module;
    - learning rates;
    - the states of the global random generators and of the loaders' generators.

    Other Python attributes that the module changes in its validation hooks are not put back.

    Args:
        trainer: A Trainer in `fit`, but not inside a validation batch.
        module: Its LightningModule.
        keep_callbacks: Names of callback classes that stay active.
        restless: Parameters that a validation may change. They are put back like buffers.

    Attributes:
        trainer: See above.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        keep_callbacks: Collection[str] = (),
        restless: Sequence[Tensor] = (),
    ) -> None:
        self.trainer, self._module, self._keep, self._restless = trainer, module, frozenset(keep_callbacks), restless
        self._stack = ExitStack()
        self._running = False
        # set on entry
        self._loop: BorrowedLoop
        self._snapshot: Snapshot
        self._users: _LoggerConnector
        self._results: Results
        self._steps: Steps | None = None

    def __enter__(self) -> IsolatedValidation:
        trainer = self.trainer
        reshard(self._module)
        self._users = trainer._logger_connector
        self._loop = borrowed_loop(trainer)
        self._snapshot = Snapshot(trainer, self._module, self._restless)
        self._snapshot.watch(self._loop.loaders)
        self._results, self._steps = results_for(trainer), None
        with ExitStack() as stack:
            stack.callback(surely, self._snapshot.restore)
            stack.callback(self._loop.close)
            stack.enter_context(replaced(trainer, self._module, self._loop, self._keep))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # ---- what the loaders hold

    def lengths(self) -> list[float]:
        """Return the number of batches of each loader, `inf` if unknown; one number for loaders read side by side."""
        self._load()
        return self._loop.lengths()

    def samples(self) -> int | None:
        """Return the number of samples of all loaders; None if it is unknown."""
        self._load()
        return self._loop.samples()

    def size(self) -> tuple[object, ...]:
        """Return the number of batches of each loader, and the number of samples if known."""
        return tuple(self.lengths()), self.samples()

    def lost_positions(self) -> list[str]:
        """Return names of what the loaders remember between passes and cannot be put back, such as generators."""
        return self._snapshot.lost_positions()

    @property
    def loader(self) -> int | None:
        """The number of the loader that is being validated, if there are several."""
        return self._loop.results.dataloader_idx

    @property
    def hands_over_iterator(self) -> bool:
        """Whether `validation_step` takes the iterator over the loaders instead of batches."""
        return self._loop.hands_over_iterator

    @torch.no_grad()
    def read(self) -> Iterator[tuple[Any, int]]:
        """Yield each batch as `validation_step` gets it, with the number of its loader; the same at each call."""
        if self._running:
            yield from self._loop.batches()
            return
        self._snapshot.begin()
        self._load()
        self._loop._on_evaluation_model_eval()  # a transfer hook may augment batches in training mode
        try:
            yield from self._loop.batches()
        finally:
            surely(self._snapshot.restore)

    # ---- validation

    def run(self, max_batches: float = math.inf) -> Logged:
        """Validate the module as it is now, by the Trainer's own loop.

        Each run starts from the same random states and from reset metrics, so equal weights give equal results.

        Args:
            max_batches: The largest number of batches of each loader.

        Returns:
            What was logged.

        Raises:
            RuntimeError: If the loaders give no batch.
        """
        self._snapshot.begin()
        self._collect_in(in_package_of(self.trainer, _ResultCollection)(training=False))
        self._load()
        try:
            with self._loop.at_most(max_batches):
                self._loop.run()
            return logged_in(self.trainer.callback_metrics, self._loop.results)
        finally:
            surely(self._snapshot.restore)

    @torch.no_grad()
    def run_on(
        self, batches: Iterable[tuple[Any, int]], recorded: bool = False, counts: Sequence[int] | None = None
    ) -> Logged:
        """Validate the module as it is now, on batches that `read` gave.

        All hooks of the module run. Progress, and what bars and loggers get after each batch, is left out.

        Args:
            batches: Each with the number of its loader, in the order of the loaders.
            recorded: Whether to record the values of each batch.
            counts: The number of batches of each loader, for a module that asks for it. None: the true numbers.

        Returns:
            What was logged.
        """
        steps = self._prepared()
        with self._validating(results_for(self.trainer, recorded=True) if recorded else self._results):
            steps.run(batches, counts)
            logged = logged_in(self.trainer._logger_connector._callback_metrics, self._loop.results)
            steps.end()
            self._loop._on_evaluation_model_train()
            return logged

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Put nothing back between the validations inside the block, but random states. After it, put all back.

        This shows what a module carries over from one validation to the next: in buffers, in parameters that are not
        pruned, or in the metrics that were logged.
        """
        self._snapshot.carries = True
        try:
            yield
        finally:
            self._snapshot.carries = False
            surely(self._snapshot.restore)

    # ---- steps on training data

    def see(self, batch: Any, spared: Collection[Tensor] = ()) -> None:
        """Let the module take one step on a batch of any data, see `seeing`."""
        with self.seeing(spared):
            self.step(batch)

    @contextmanager
    def seeing(self, spared: Collection[Tensor] = ()) -> Iterator[None]:
        """Inside the block the module may take steps on batches of any data, see `step`. Nothing is logged or kept.

        Plain attributes that the steps write to, for example a list of outputs, are put back after the block.

        Args:
            spared: Buffers that are not put back.
        """
        with torch.no_grad():
            self._prepared()
            before = PlainAttributes([vars(part) for part in self._module.modules()])
            try:
                with self._validating(results_for(self.trainer), spared), buffers_not_sent(self.trainer):
                    self._module._current_fx_name = "validation_step"  # so that all steps may log
                    yield
            finally:
                surely(before.restore)

    def step(self, batch: Any) -> None:
        """Let the module take one step on a batch, inside `seeing`.

        The step is `calibration_step(batch)` if the module has one. Otherwise it is `validation_step`, after the hooks
        of the module that come before it.

        Args:
            batch: A batch that `read_training` gave.
        """
        if (step := getattr(self._module, "calibration_step", None)) is None:
            self._prepared().one(batch)
        else:
            self._calibrate(step, batch)

    def validation_step(self, batch: Any) -> None:
        """Let the module take one `validation_step` on a batch that `read` gave, inside `seeing`."""
        self._prepared().one(batch)

    @torch.no_grad()
    def read_training(self, loader: Iterable[Any], most: int, seed: int) -> Iterator[Any]:
        """Yield batches of training data as `see` takes them.

        Args:
            loader: A loader that is read only here.
            most: The largest number of batches.
            seed: Seed of the global random generators while the batches are read.
        """
        self._prepared()
        self._snapshot.watch_streams([loader])
        self._snapshot.begin()
        try:
            seed_global_generators(seed)
            self._loop._on_evaluation_model_eval()
            for batch in islice(loader, most):
                yield transferred(self.trainer, batch, 0)
        finally:
            surely(self._snapshot.restore)

    # ---- parts

    def _load(self) -> None:
        self._loop.load()
        self._snapshot.watch(self._loop.loaders)

    def _prepared(self) -> Steps:
        if self._steps is None:
            self._load()
            self._steps = Steps(self.trainer, self._loop)
        return self._steps

    def _calibrate(self, step: Callable[[Any], object], batch: Any) -> None:
        trainer = self.trainer
        trainer._logger_connector.on_batch_start(batch)
        with trainer.precision_plugin.val_step_context():
            step(batch)

    @contextmanager
    def _validating(self, results: _ResultCollection, spared: Collection[Tensor] = ()) -> Iterator[None]:
        """Inside the block the module is in evaluation mode and logs to `results`; after it, the module is put back."""
        self._snapshot.begin()
        self._collect_in(results)
        self._running = True
        try:
            self._loop._on_evaluation_model_eval()
            yield
        finally:
            self._running, results.batch = False, None
            surely(lambda: self._snapshot.restore_module(spared))

    def _collect_in(self, results: _ResultCollection) -> None:
        """Let a validation log to a fresh connector. The module can read there what was logged before."""
        before = self.trainer._logger_connector if self._snapshot.carries else self._users
        self.trainer._logger_connector, self._loop.results = connector_after(before, self.trainer), results
