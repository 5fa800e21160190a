"""A fresh evaluation loop over the validation loaders that a Trainer holds.

The loop of lightning 2.6 has no public counterpart for the private attributes that are used here: where the loaders
come from (`_data_source`), the loaders (`_combined_loader`), their lengths (`_max_batches`), the epoch at which they
were last asked for (`_last_val_dl_reload_epoch`), the iterator over them (`_data_fetcher`), and what they log
(`_results`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from lightning_roulette.trainer.lightning_names import built_for, in_both, in_package_of

if TYPE_CHECKING:
    _Base = _EvaluationLoop
else:
    _Base = object


class BorrowedLoop(_Base):
    """An evaluation loop that uses the loaders of the Trainer's own loop, and leaves that loop as it is.

    A class with the base of a Trainer's package is made by `borrowed_loop`.

    Args:
        trainer: A Trainer in `fit`.
    """

    def __init__(self, trainer: Trainer) -> None:
        function, stage = in_package_of(trainer, TrainerFn).FITTING, in_package_of(trainer, RunningStage).VALIDATING
        super().__init__(trainer, function, stage, verbose=False, inference_mode=False)
        users = trainer.fit_loop.epoch_loop.val_loop
        self._data_source, self._max_batches = users._data_source, list(users._max_batches)
        self._combined_loader = self._shared = users._combined_loader
        if self._shared is not None:
            self._last_val_dl_reload_epoch = math.inf  # only the user's loop asks for new loaders

    def load(self) -> None:
        """Ask for the loaders, if the Trainer has not asked yet.

        Raises:
            RuntimeError: If they give no batch.
        """
        self.setup_data()
        if not sum(self._max_batches):
            raise RuntimeError(
                "RouletteWheelPruning: the validation data is empty, so candidates cannot be judged on it. Pass "
                "val_dataloaders with some batches."
            )

    @property
    def results(self) -> _ResultCollection:
        """The collection that `self.log` writes to."""
        return self._results

    @results.setter
    def results(self, results: _ResultCollection) -> None:
        self._results = results

    @property
    def combined(self) -> CombinedLoader | None:
        """The loaders as one; None before `load`."""
        return self._combined_loader

    @property
    def loaders(self) -> list[Any]:
        """Each loader; none before `load`."""
        return [] if self._combined_loader is None else list(self._combined_loader.flattened)

    @property
    def several(self) -> bool:
        """Whether there are several loaders that are read one after the other."""
        return bool(self._is_sequential and self.num_dataloaders > 1)

    @property
    def hands_over_iterator(self) -> bool:
        """Whether `validation_step` takes the iterator over the loaders instead of batches."""
        fetcher = in_package_of(self.trainer, _select_data_fetcher)(self.trainer, RunningStage.VALIDATING)
        return isinstance(fetcher, in_both(_DataLoaderIterDataFetcher))

    def lengths(self) -> list[float]:
        """Return the number of batches of each loader, `inf` if unknown; one number for loaders read side by side."""
        counts = list(self._max_batches)
        if self._is_sequential:
            return counts
        assert self._combined_loader is not None
        return [min(counts) if self._combined_loader._mode == "min_size" else max(counts)]

    def samples(self) -> int | None:
        """Return the number of samples of all loaders; None if it is unknown."""
        counts = [_samples(loader, most) for loader, most in zip(self.loaders, self._max_batches, strict=True)]
        return None if None in counts else sum(count or 0 for count in counts)

    def at_most(self, batches: float) -> AbstractContextManager[None]:
        """Inside the block the loop validates at most this many batches of each loader."""
        return self._with_lengths([min(count, batches) for count in self._max_batches])

    def telling(self, counts: Sequence[int] | None) -> AbstractContextManager[None]:
        """Inside the block a module that asks for the numbers of batches gets `counts`. None: the true numbers."""
        if counts is None:
            return nullcontext()
        return self._with_lengths([*counts] if self._is_sequential else [*counts] * len(self._max_batches))

    def batches(self) -> Iterator[tuple[Any, int]]:
        """Yield each batch as `validation_step` gets it, with the number of its loader."""
        self.reset()  # makes the iterator; a second iterator would start workers and draw random numbers again
        fetcher = self._data_fetcher
        assert fetcher is not None
        while (found := next(fetcher, None)) is not None:
            batch, _, loader = found
            yield transferred(self.trainer, batch, loader), loader

    def close(self) -> None:
        """End the workers of loaders that the user's loop does not share. Persistent workers would go on."""
        if self._data_fetcher is not None and self._combined_loader is not self._shared:
            self._data_fetcher.teardown()

    @contextmanager
    def _with_lengths(self, lengths: list[int | float]) -> Iterator[None]:
        every = self._max_batches
        self._max_batches = lengths
        try:
            yield
        finally:
            self._max_batches = every


def borrowed_loop(trainer: Trainer) -> BorrowedLoop:
    """Return a `BorrowedLoop` for a Trainer."""
    return built_for(trainer, BorrowedLoop, _EvaluationLoop)(trainer)


def transferred(trainer: Trainer, batch: Any, loader: int) -> Any:
    """Return a batch as a step gets it: converted, moved to the device, and changed by the module's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, loader)
    return in_package_of(trainer, call._call_strategy_hook)(trainer, "batch_to_device", batch, dataloader_idx=loader)


def training_loader(trainer: Trainer) -> CombinedLoader:
    """Return the loaders of the training data as one. Lightning makes public only what the user passed."""
    combined: CombinedLoader | None = trainer.fit_loop._combined_loader
    assert combined is not None
    return combined


def combined_like(combined: CombinedLoader, loaders: Any) -> CombinedLoader:
    """Return other loaders as one, in the mode of `combined`."""
    return type(combined)(loaders, mode=combined._mode)


def _samples(loader: Any, batches: float) -> int | None:
    """Return the number of samples in the first batches of a loader; None if it is not a plain loader."""
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(size, int) or not isinstance(sampler, Sized) or math.isinf(batches):
        return None
    return min(len(sampler), int(batches) * size)
