"""The steps of a validation on batches at hand, without the work that only loggers and progress bars need.

Calls to hooks and the order of the connector's methods follow `_EvaluationLoop` of lightning 2.6. Its methods
(`_on_evaluation_start` and others), the connector's (`_evaluation_epoch_end`) and the functions of `call` have no
public counterpart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_roulette.trainer.lightning_names import in_package_of
from lightning_roulette.trainer.validation.loop import BorrowedLoop
from lightning_roulette.trainer.validation.muting import callbacks_of

_HOOKS: tuple[str, ...] = ("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start")
_HOOKS += ("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")


class Steps:
    """Takes the validation steps of a module. Runs only hooks that are overridden.

    Args:
        trainer: A Trainer with muted callbacks.
        loop: Its evaluation loop, with known loaders.
    """

    def __init__(self, trainer: Trainer, loop: BorrowedLoop) -> None:
        self._trainer, self._loop, module = trainer, loop, trainer.lightning_module
        loop._verify_dataloader_idx_requirement()
        self._several = loop.several
        self._takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        self._hooks = frozenset(hook for hook in _HOOKS if _is_overridden_by_someone(hook, trainer))

    def run(self, batches: Iterable[tuple[Any, int]], counts: Sequence[int] | None = None) -> None:
        """Validate batches. The connector of the Trainer then holds the results.

        Args:
            batches: Each with the number of its loader, in the order of the loaders.
            counts: The number of batches of each loader that a step is told. None: the true numbers.
        """
        connector = self._trainer._logger_connector
        self._start()
        self._each(batches, counts)
        connector.epoch_end_reached()
        if self._several:  # the results of the last loader
            connector.update_eval_epoch_metrics()
        connector._evaluation_epoch_end()
        if "on_validation_epoch_end" in self._hooks:
            self._loop._on_evaluation_epoch_end()
        else:
            connector.on_epoch_end()

    def one(self, batch: Any) -> None:
        """Take one step, as if on the first batch of the first loader."""
        self._start()
        self._step(batch, 0, 0)

    def end(self) -> None:
        """Run the hook at the end of a validation, after its results were read."""
        if "on_validation_end" in self._hooks:
            self._loop._on_evaluation_end()
        else:
            self._trainer._logger_connector.reset_results()

    def _start(self) -> None:
        if "on_validation_start" in self._hooks:
            self._loop._on_evaluation_start()
        if "on_validation_epoch_start" in self._hooks:
            self._loop._on_evaluation_epoch_start()

    def _each(self, batches: Iterable[tuple[Any, int]], counts: Sequence[int] | None) -> None:
        connector, last, index = self._trainer._logger_connector, None, -1
        for batch, loader in batches:
            if last is not None and loader != last:
                connector.epoch_end_reached()
                connector.update_eval_epoch_metrics()
            index = index + 1 if loader == last else 0
            last = loader
            # only inside a step, as between steps the batches may be read by the same loop
            with self._loop.telling(counts):
                self._step(batch, index, loader)

    def _step(self, batch: Any, index: int, loader: int) -> None:
        trainer = self._trainer
        rest = (index, loader) if self._several else (index,)
        trainer._logger_connector.on_batch_start(batch, loader if self._several else None)
        if "on_validation_batch_start" in self._hooks:
            self._call("on_validation_batch_start", batch, *rest)
        taken = rest if self._takes_index else rest[1:]
        output = in_package_of(trainer, call._call_strategy_hook)(trainer, "validation_step", batch, *taken)
        if "on_validation_batch_end" in self._hooks:
            self._call("on_validation_batch_end", output, batch, *rest)
        if trainer.received_sigterm:
            raise in_package_of(trainer, SIGTERMException)

    def _call(self, hook: str, *arguments: Any) -> None:
        for caller in (call._call_callback_hooks, call._call_lightning_module_hook):
            in_package_of(self._trainer, caller)(self._trainer, hook, *arguments)


def _is_overridden_by_someone(hook: str, trainer: Trainer) -> bool:
    """Whether the module, the strategy or a callback that is not muted overrides a hook."""
    owners: list[tuple[Any, type[Any]]] = [(trainer.lightning_module, LightningModule), (trainer.strategy, Strategy)]
    owners += [(one, Callback) for one in callbacks_of(trainer) if getattr(one, hook, None) is not None]
    parents = [(owner, in_package_of(trainer, parent)) for owner, parent in owners if hasattr(parent, hook)]
    return any(is_overridden(hook, owner, parent) for owner, parent in parents)
