"""The arguments of RouletteWheelPruning, checked and with their defaults filled in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from lightning_roulette.checks import check_choice, check_epochs, check_words
from lightning_roulette.refit_settings import LeastSquares, Refit, refit_of
from lightning_roulette.search.arguments import check_search
from lightning_roulette.search.gradual import Cuts
from lightning_roulette.settings import CALIBRATED, Tree, Validation, Wheel, groups_of
from lightning_roulette.trainer.between_epochs import BetweenEpochs
from lightning_roulette.trainer.files import refuse_dirpath
from lightning_roulette.values import in_words


@dataclass(frozen=True)
class Choices:
    """The arguments of `RouletteWheelPruning`; it documents each of them."""

    branches: int
    tolerance: float | None
    monitor: str | None
    mode: str | None
    target_sparsity: float | None
    confidence: float | None
    at_epoch: int | Sequence[int] | None
    refit: str | LeastSquares | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    wheel: Wheel
    tree: Tree
    validation: Validation
    seed: int
    dirpath: str | os.PathLike[str] | None
    shrink: bool

    @classmethod
    def checked(cls, **given: Any) -> Choices:
        """Return the arguments as plain numbers, with the defaults that depend on `at_epoch` filled in.

        Args:
            given: Every argument of the constructor by its name.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is out of range.
        """
        given |= dict(zip(_GROUPS, groups_of(*(given[name] for name in _GROUPS)), strict=True))
        if isinstance(given["refit"], Mapping):
            given["refit"] = refit_of(given["refit"])
        check_epochs(given["at_epoch"], given["confidence"])
        several = isinstance(given["at_epoch"], Sequence)
        if given["branches"] is None:
            given["branches"] = 1 if several else 20
        if given["refit"] == "auto":
            given["refit"] = None if several else "least_squares"
        _check(**given)
        # a checkpoint holds plain numbers only, and no numbers of NumPy
        plain = {name: kind(given[name]) for name, kind in _NUMBERS.items() if isinstance(given[name], Real)}
        return cls(**{**given, **plain})

    @classmethod
    def of(cls, callback: Any) -> Choices:
        """Return the arguments as the attributes of the callback hold them now."""
        return cls(**{one.name: getattr(callback, one.name) for one in fields(cls)})

    @property
    def first_epoch(self) -> int | None:
        """Number of epochs that are trained before the first search or cut; None: all of them."""
        return self.at_epoch[0] if isinstance(self.at_epoch, Sequence) else self.at_epoch

    @property
    def needs_inputs(self) -> bool:
        """Whether the search runs the network on training data: for a refit, or for the importance."""
        by_default = isinstance(self.at_epoch, Sequence) and self.wheel.importance is None
        return self.refit is not None or by_default or self.wheel.importance in CALIBRATED

    def between_epochs(self) -> BetweenEpochs | None:
        """Return the state of pruning between epochs, with nothing pruned; None if one search was asked for."""
        if not isinstance(self.at_epoch, Sequence):
            return None
        return BetweenEpochs(
            Cuts(
                self.branches,
                self.tolerance,
                self.target_sparsity,
                len(self.at_epoch),
                refit_of(self.refit),
                self.wheel,
                self.tree,
                self.validation,
                self.seed,
            ),
            self.at_epoch,
        )

    def of_search(self, fast_dev_run: bool) -> dict[str, Any]:
        """Return the keyword arguments of `search`.

        Args:
            fast_dev_run: Whether the Trainer has `fast_dev_run`. The search then has one level of two candidates
                and no floor.
        """
        limits: dict[str, Any] = {
            "branches": self.branches,
            "tolerance": self.tolerance,
            "confidence": self.confidence,
            "tree": self.tree,
        }
        if fast_dev_run:
            tree = replace(self.tree, max_levels=1, coarse_rate=None)
            limits = {"branches": 2, "tolerance": math.inf, "confidence": None, "tree": tree}
        same = ("target_sparsity", "refit", "wheel", "validation", "seed")
        return limits | {name: getattr(self, name) for name in same}


_GROUPS = ("wheel", "tree", "validation")
_NUMBERS: dict[str, type] = {"branches": int, "at_epoch": int, "seed": int}
_NUMBERS |= dict.fromkeys(("tolerance", "target_sparsity", "confidence"), float)


def _check_refit(refit: Refit | None, at_epoch: Any) -> None:
    """Check that training after a search does not move rounded weights."""
    if isinstance(refit, LeastSquares) and refit.values != "float32" and at_epoch is not None:
        raise ValueError(
            f"at_epoch is {at_epoch!r} and the refit rounds weights to {in_words(refit.values)}, but training after a "
            "search changes them. Leave out at_epoch, or round them when you prune the trained network once more."
        )


def _check(
    *,
    monitor: Any,
    mode: Any,
    include: Any,
    exclude: Any,
    dirpath: Any,
    refit: Any,
    at_epoch: Any,
    shrink: Any,
    **of_search: Any,
) -> None:
    check_search(**of_search)
    if mode is not None:
        check_choice("mode", mode, ("max", "min"))
    if monitor is not None and not isinstance(monitor, str):
        raise TypeError(f"monitor is {monitor!r}, but must be the name of a logged metric.")
    for name, patterns in (("include", include), ("exclude", exclude)):
        if patterns is not None:
            check_words(name, patterns, "patterns over parameter names")
    _check_refit(refit_of(refit), at_epoch)
    refuse_dirpath(dirpath)
    if not isinstance(shrink, bool):
        raise TypeError(f"shrink is {shrink!r}, but must be True or False.")
