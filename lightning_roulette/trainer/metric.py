"""Which logged metric judges, and in which direction."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.isolation import Logged, callbacks_of

# A metric's name is split at everything but letters and digits. A part tells the direction if it is one of these words,
# a final "score" or number aside, or if it ends with one of the plainer ones.
_LARGER = frozenset(
    {"acc", "accuracy", "f1", "auc", "auroc", "auprc", "precision", "recall", "map", "iou", "miou", "dice"}
)
_LARGER |= {"r2", "spearman", "pearson", "kappa", "mcc", "psnr", "ssim", "bleu", "rouge"}
_SMALLER = frozenset({"loss", "err", "error", "mse", "rmse", "mae", "mape", "nll", "ppl", "perplexity", "wer", "cer"})
_SMALLER |= {"fid", "ece", "brier"}
LOADER = "/dataloader_idx_"
_PLAINER = ("acc", "accuracy", "loss", "error")


@dataclass(frozen=True)
class Metric:
    """The metric that judges.

    Attributes:
        monitor: The name it is logged under.
        mode: `"max"` if larger values are better, else `"min"`.
        why: How it was found, in a few words.
        loss: Another logged value, a loss; None if there is none.
        rank_by: The name of the value that orders a branch.
        rank_mode: Its direction, as `mode`.
    """

    monitor: str
    mode: str
    why: str
    loss: str | None
    rank_by: str
    rank_mode: str

    @property
    def sign(self) -> int:
        """What turns a value into one of which larger is better."""
        return 1 if self.mode == "max" else -1

    def units_of(self, report: SearchReport) -> SearchReport:
        """The report of a search by this metric, in its units."""
        return replace(report.in_metric(self.monitor, self.mode), rank_by=self.rank_by)

    @property
    def rank_sign(self) -> int:
        """The same for what orders a branch."""
        return 1 if self.rank_mode == "max" else -1

    @property
    def tiebreak(self) -> str | None:
        """The loss, where something else orders the branch; None: the monitored metric breaks ties."""
        return None if self.loss == self.rank_by else self.loss


def find_metric(
    logged: Logged,
    trainer: Trainer,
    monitor: str | None,
    mode: str | None,
    tolerance: float,
    rank_by: str | None = None,
) -> Metric:
    """The metric that judges candidates, and the one that orders them.

    Without a `monitor` it is the one logged torchmetrics object with `higher_is_better=True`; else the one
    accuracy-like name; else what a ModelCheckpoint, an EarlyStopping or a plateau scheduler of the Trainer watches;
    else the only metric. Without a `mode` the direction is that of the callback or scheduler that watches the metric;
    else `higher_is_better`; else the name's. Without a `rank_by` the metric itself orders a branch if it is a loss;
    else a logged loss, `val_loss` if there are several; else the metric.

    Raises:
        RuntimeError: If the metric was not logged or is not one number, or none or several could be meant, or the
            direction cannot be told. The message lists what was logged.
    """
    values = {name: value for name, value in logged.values.items() if _first_name(name, logged) == name}
    if monitor is None:
        monitor, why = _choice(values, logged, trainer, tolerance)
    else:
        why = "as asked"
    _refuse_many_numbers(logged, monitor, "monitor")
    direction = mode or _direction(_first_name(monitor, logged), logged, trainer, "mode")
    losses = [name for name in values if _tells(name, {"loss"}) and name != monitor]
    loss = "val_loss" if "val_loss" in losses else losses[0] if len(losses) == 1 else None
    itself = loss is None or _tells(monitor, {"loss"})
    ranks, ranks_mode = (monitor, direction) if loss is None or itself else (loss, "min")
    if rank_by is not None:
        _refuse_many_numbers(logged, rank_by, "rank_by")
        same = _first_name(rank_by, logged) == _first_name(monitor, logged)
        ranks = rank_by
        ranks_mode = direction if same else _direction(_first_name(rank_by, logged), logged, trainer, "rank_by")
    return Metric(monitor, direction, why, loss, ranks, ranks_mode)


def _refuse_many_numbers(logged: Logged, name: str, argument: str) -> None:
    value = logged.value(name, argument)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RuntimeError(
            f"RouletteWheelPruning watches {name!r}, which has shape {tuple(value.shape)}, but must be one number. "
            f"Log a mean of it, or pass {argument}=... {logged.listing}"
        )


def _choice(values: Mapping[str, Any], logged: Logged, trainer: Trainer, tolerance: float) -> tuple[str, str]:
    rising = [name for name in values if logged.higher_is_better.get(_plain(name))]
    named = [name for name in values if _tells(name, _LARGER) and not _tells(name, _SMALLER)]
    for names, why in ((rising, "the one logged metric that rises"), (named, "the one logged name like an accuracy")):
        if len(names) == 1:
            return names[0], why
    several = list(dict.fromkeys(rising + named))
    decisive = several if several and tolerance > 0 else values
    for watched, _, watcher in _watched(trainer):
        if watched is not None and (name := _first_name(watched, logged)) in decisive:
            return name, f"what {watcher} watches"
    if several and tolerance > 0:
        raise RuntimeError(
            f"tolerance is {tolerance}, in units of the metric, but several could be meant: "
            f"{', '.join(map(repr, several))}. Pass monitor=..."
        )
    if len(values) == 1:
        return next(iter(values)), "the only metric logged"
    raise RuntimeError(f"RouletteWheelPruning cannot tell which metric to watch. {logged.listing} Pass monitor=...")


def _direction(monitor: str, logged: Logged, trainer: Trainer, argument: str) -> str:
    for watched, mode, _ in _watched(trainer):
        if watched is not None and _first_name(watched, logged) == monitor and mode in ("min", "max"):
            return mode
    rises = logged.higher_is_better.get(_plain(monitor))
    if rises is None:
        rises = _tells(monitor, _LARGER)
        if rises == _tells(monitor, _SMALLER):
            remedy = "Pass mode='max' or mode='min'." if argument == "mode" else "Rank by another metric."
            raise RuntimeError(
                f"RouletteWheelPruning cannot tell whether larger values of {monitor!r} are better. {remedy}"
            )
    return "max" if rises else "min"


def _watched(trainer: Trainer) -> list[tuple[str | None, str | None, str]]:
    """What is watched, in which mode, by whom: ModelCheckpoints first, then EarlyStoppings, then plateau schedulers."""
    callbacks = [
        (one.monitor, one.mode, kind.__name__)
        for kind in (ModelCheckpoint, EarlyStopping)
        for one in callbacks_of(trainer)
        if isinstance(one, kind)
    ]
    schedulers = [
        (config.monitor, getattr(config.scheduler, "mode", None), "a learning rate scheduler")
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau
    ]
    return callbacks + schedulers


def _first_name(name: str, logged: Logged) -> str:
    """What is logged on step and on epoch comes under two names, `x` and `x_epoch`: the first of them."""
    stem, mark, loader = name.partition(LOADER)
    first = stem.removesuffix("_epoch") + mark + loader
    return first if first in logged.values else name


def _plain(name: str) -> str:
    """The name that was given to `self.log`, without the loader that Lightning adds to it."""
    return name.partition(LOADER)[0]


def _tells(name: str, words: Collection[str]) -> bool:
    parts = [part for part in re.split(r"[^a-z0-9]+", _plain(name).lower()) if part]
    forms = {form for part in parts for form in (part, part.removesuffix("score"), part.rstrip("0123456789"))}
    return any(form in words or form.endswith(tuple(w for w in _PLAINER if w in words)) for form in forms)
