"""Finds the logged metric that judges candidates, the one that ranks them, and their directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.lightning_names import in_both
from lightning_roulette.trainer.sparsity import Sparsity
from lightning_roulette.trainer.validation.logged import Logged
from lightning_roulette.trainer.validation.muting import callbacks_of

# Words in the name of a metric that tell its direction. The name is split at everything but letters and digits. A part
# counts if it is one of these words, without a final "score" or number, or if it ends with one of `_ENDINGS`.
_LARGER = frozenset(
    {"acc", "accuracy", "f1", "auc", "auroc", "auprc", "precision", "recall", "map", "iou", "miou", "dice"}
)
_LARGER |= {"r2", "spearman", "pearson", "kappa", "mcc", "psnr", "ssim", "bleu", "rouge"}
_SMALLER = frozenset({"loss", "err", "error", "mse", "rmse", "mae", "mape", "nll", "ppl", "perplexity", "wer", "cer"})
_SMALLER |= {"fid", "ece", "brier"}
LOADER = "/dataloader_idx_"
_ENDINGS = ("acc", "accuracy", "loss", "error")


@dataclass(frozen=True)
class MonitoredMetric:
    """The metric that judges, and the one that ranks.

    Attributes:
        monitor: The name under which the metric that judges is logged.
        mode: `"max"` if larger values are better, else `"min"`.
        why: How the metric was found, in a few words.
        loss: The name of another logged value, a loss; None if there is none.
        rank_by: The name of the value that ranks a branch.
        rank_mode: Its direction, like `mode`.
        sums: The names, among those of this metric, of values that grow in proportion to the data.
        others: The names of values that are neither a mean nor a sum.
    """

    monitor: str
    mode: str
    why: str
    loss: str | None
    rank_by: str
    rank_mode: str
    sums: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def sign(self) -> int:
        """The factor that makes larger values of the metric better: 1 or -1."""
        return 1 if self.mode == "max" else -1

    @property
    def rank_sign(self) -> int:
        """The factor that makes larger values of `rank_by` better: 1 or -1."""
        return 1 if self.rank_mode == "max" else -1

    def judges_like(self, other: MonitoredMetric) -> bool:
        """Whether both judge and rank by the same values, in the same directions."""
        ours, theirs = ((one.monitor, one.mode, one.rank_by, one.rank_mode) for one in (self, other))
        return ours == theirs

    @property
    def tiebreak(self) -> str | None:
        """The name of the loss that breaks ties. None: the monitored metric breaks them."""
        return None if self.loss == self.rank_by else self.loss

    @property
    def notes(self) -> list[str]:
        """What the report says about values that are no means."""
        sums = [
            f"{name} is a sum over the data. On a part of the data it is scaled to all of it, so the tolerance is in "
            "units of the sum over all of it."
            for name in self.sums
        ]
        return sums + [
            f"{name} is neither a mean nor a sum over the data. Candidates are compared by its values on parts of the "
            "data, which may differ from its value on all of it."
            for name in self.others
        ]

    def units_of(self, report: SearchReport) -> SearchReport:
        """Return the report of a search in the units of this metric."""
        return replace(report.in_metric(self.monitor, self.mode), rank_by=self.rank_by)


@dataclass(frozen=True)
class Watched:
    """A metric that a callback or a learning rate scheduler watches.

    Attributes:
        name: The name of the metric, if there is one.
        mode: `"max"`, `"min"`, or None if unknown.
        by: What watches it, for the log.
    """

    name: str | None
    mode: str | None
    by: str


def watched_in(trainer: Trainer) -> list[Watched]:
    """Return what is watched: by ModelCheckpoints first, then by EarlyStoppings, then by plateau schedulers."""
    callbacks = [
        Watched(one.monitor, one.mode, kind.__name__)
        for kind in (ModelCheckpoint, EarlyStopping)
        for one in callbacks_of(trainer)
        if isinstance(one, in_both(kind))
    ]
    schedulers = [
        Watched(config.monitor, getattr(config.scheduler, "mode", None), "a learning rate scheduler")
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau
    ]
    return callbacks + schedulers


def find_metric(
    logged: Logged,
    watched: Sequence[Watched],
    monitor: str | None,
    mode: str | None,
    tolerance: float,
    rank_by: str | None = None,
) -> MonitoredMetric:
    """Find the metric that judges candidates, and the one that ranks them.

    The metric is the first of these:

    1. `monitor`, if it is given;
    2. the only logged torchmetrics object with `higher_is_better=True`;
    3. the only name like an accuracy;
    4. the first in `watched` that is logged;
    5. the only metric.

    Its direction is the first of these:

    1. `mode`, if it is given;
    2. its `higher_is_better`, which `mode` must not contradict;
    3. the mode of the first in `watched` that watches the metric;
    4. the direction that its name tells.

    A branch is ranked by the first of these:

    1. `rank_by`, if it is given;
    2. the metric itself, if it is a loss;
    3. a logged loss, `val_loss` if there are several;
    4. the metric itself.

    Args:
        logged: What a validation logged.
        watched: What callbacks and schedulers watch.
        monitor: The name of the metric, or None.
        mode: `"max"`, `"min"`, or None.
        tolerance: The tolerance of the search. If it is above 0, its units matter, so the choice must be unambiguous.
        rank_by: The name of the metric that ranks, or None.

    Raises:
        RuntimeError: If the metric was not logged or is not one number, or if the metric or its direction is ambiguous.
            The message lists what was logged.
    """
    values = {name: value for name, value in logged.values.items() if _first_name(name, logged) == name}
    values = {name: value for name, value in values.items() if not isinstance(logged.metrics.get(name), Sparsity)}
    if monitor is None:
        monitor, why = _choice(values, logged, watched, tolerance)
    else:
        why = "as asked"
    _refuse_many_numbers(logged, monitor, "monitor")
    direction = _direction(_first_name(monitor, logged), logged, watched, "mode", mode)
    losses = [name for name in values if _tells(name, {"loss"}) and name != monitor]
    loss = "val_loss" if "val_loss" in losses else losses[0] if len(losses) == 1 else None
    itself = loss is None or _tells(monitor, {"loss"})
    ranks, ranks_mode = (monitor, direction) if loss is None or itself else (loss, "min")
    if rank_by is not None:
        _refuse_many_numbers(logged, rank_by, "rank_by")
        same = _first_name(rank_by, logged) == _first_name(monitor, logged)
        ranks = rank_by
        ranks_mode = direction if same else _direction(_first_name(rank_by, logged), logged, watched, "rank_by")
    return MonitoredMetric(monitor, direction, why, loss, ranks, ranks_mode)


def _refuse_many_numbers(logged: Logged, name: str, argument: str) -> None:
    value = logged.value(name, argument)
    if isinstance(value, Tensor) and value.numel() != 1:
        what = "RouletteWheelPruning watches" if argument == "monitor" else f"RouletteWheelPruning: {argument} is"
        raise RuntimeError(
            f"{what} {name!r}, which has shape {tuple(value.shape)}, but must be one number. "
            f"Log a mean of it, or pass {argument}=... {logged.listing}"
        )


def _choice(values: Mapping[str, Any], logged: Logged, watched: Sequence[Watched], tolerance: float) -> tuple[str, str]:
    rising = [name for name in values if logged.higher_is_better.get(_plain(name))]
    named = [name for name in values if _tells(name, _LARGER) and not _tells(name, _SMALLER)]
    own = "the only logged torchmetrics object with higher_is_better=True"
    for names, why in ((rising, own), (named, "the only logged name like an accuracy")):
        if len(names) == 1:
            return names[0], why
    several = list(dict.fromkeys(rising + named))
    decisive = several if several and tolerance > 0 else values
    for one in watched:
        if one.name is not None and (name := _first_name(one.name, logged)) in decisive:
            return name, f"what {one.by} watches"
    if several and tolerance > 0:
        raise RuntimeError(
            f"tolerance is {tolerance}, in units of the metric, but several could be meant: "
            f"{', '.join(map(repr, several))}. Pass monitor=..."
        )
    if len(values) == 1:
        return next(iter(values)), "the only metric logged"
    raise RuntimeError(f"RouletteWheelPruning cannot tell which metric to watch. {logged.listing} Pass monitor=...")


def _direction(name: str, logged: Logged, watched: Sequence[Watched], argument: str, asked: str | None = None) -> str:
    """Return the direction of a metric: `asked`, or its own, or that of what watches it, or that of its name."""
    rises = logged.higher_is_better.get(_plain(name))
    own = None if rises is None else "max" if rises else "min"
    larger, smaller = _tells(name, _LARGER), _tells(name, _SMALLER)
    by_name = None if larger == smaller else "max" if larger else "min"
    if asked is not None:
        if own not in (None, asked):
            raise RuntimeError(
                f"RouletteWheelPruning: mode is {asked!r}, but the torchmetrics object that is logged as {name!r} has "
                f"higher_is_better={rises}. Pass mode={own!r}, or leave mode out."
            )
        return asked
    if own is not None:
        return own
    for one in watched:
        if one.name is not None and _first_name(one.name, logged) == name and one.mode in ("min", "max"):
            if (one.mode, by_name) == ("min", "max"):  # "min" is the default of all that watch
                raise RuntimeError(
                    f"RouletteWheelPruning: {one.by} watches {name!r} with mode='min', its default, but larger values "
                    "seem to be better. Pass mode='max' to it, or mode='min' to RouletteWheelPruning."
                )
            return one.mode
    if by_name is not None:
        return by_name
    if argument == "mode":
        why, remedy = "RouletteWheelPruning", "Pass mode='max' or mode='min'."
    else:
        why, remedy = f"RouletteWheelPruning: rank_by is {name!r}, but it", "Rank by another metric."
    raise RuntimeError(f"{why} cannot tell whether larger values of {name!r} are better. {remedy}")


def _first_name(name: str, logged: Logged) -> str:
    """Return the name `x` of a metric that is logged as `x` and `x_epoch`, as Lightning does for steps and epochs."""
    stem, mark, loader = name.partition(LOADER)
    first = stem.removesuffix("_epoch") + mark + loader
    return first if first in logged.values else name


def _plain(name: str) -> str:
    """Return the name that was given to `self.log`, without the number of the loader that Lightning appends."""
    return name.partition(LOADER)[0]


def _tells(name: str, words: Collection[str]) -> bool:
    """Return whether one of some words is in a name."""
    parts = [part for part in re.split(r"[^a-z0-9]+", _plain(name).lower()) if part]
    forms = {form for part in parts for form in (part, part.removesuffix("score"), part.rstrip("0123456789"))}
    return any(form in words or form.endswith(tuple(w for w in _ENDINGS if w in words)) for form in forms)
