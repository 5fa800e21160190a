"""The finer choices in three frozen groups, and what they allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_roulette.checks import check_choice, check_count, check_number, check_words

Importance = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

CALIBRATED = ("sensitivity", "activation", "obs")  # what needs inputs
IMPORTANCES = ("magnitude", "lamp", *CALIBRATED)
REFITS = ("batch_norm", "least_squares")
SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Wheel:
    """How a candidate is drawn.

    Attributes:
        sharpness: Exponent of the pruning odds, `importance ** -sharpness`: 0 is random pruning, 1 the literal
            roulette, infinity magnitude pruning.
        importance: `"magnitude"`; `"lamp"`, layer-adaptive magnitude; on calibration inputs `"sensitivity"`, magnitude
            times the root of the root mean square of the weight's input times how much the network's outputs depend on
            the output it leads to (see `Calibration.scales`), `"activation"`, magnitude times the root mean square of
            the weight's input, and `"obs"`, magnitude over the root of the diagonal of the inverse Gram matrix of the
            layer's inputs; or a function from all weights `{name: tensor}`, zero where the parent is pruned, to
            importances of the same names and shapes. None: `"sensitivity"` with a least-squares refit of each level,
            and for levels that are cut between epochs, if the network's outputs can be derived, else `"magnitude"`.
        scope: `"global"`: one wheel over all layers; `"layer"`: each layer its own wheel at the same pruning rate.
        allocation: How much candidates differ in what they take from which layer: each multiplies the importance of
            each layer by a log-normal factor of this width, on top of its parent's. None: 0.3 with a least-squares
            refit and more than one candidate, else 0. With `scope="layer"` it has no effect.
    """

    sharpness: float = 16.0
    importance: Importance | str | None = None
    scope: str = "global"
    allocation: float | None = None

    def __post_init__(self) -> None:
        check_number("sharpness", self.sharpness, at_least=0, remedy="Infinity (.inf) is magnitude pruning.")
        if self.importance is not None and not callable(self.importance):
            check_choice("importance", self.importance, IMPORTANCES, remedy="Or pass a function of all weights.")
        check_choice("scope", self.scope, SCOPES)
        if self.allocation is not None:
            check_number("allocation", self.allocation, at_least=0)


@dataclass(frozen=True)
class Tree:
    """How levels follow one another.

    Attributes:
        pruning_rate: Share of the current survivors that a level removes, in (0, 1).
        max_levels: The search ends with this many accepted levels; None: no such end.
        patience: The search ends with this many failed levels in a row. A level whose winner misses the floor is tried
            again at half the rate, which stays halved.
        smallest_rate: The search also ends where a failure would halve the rate below this, whatever the patience: on a
            noisy score ever smaller steps would pass, one weight at a time.
    """

    pruning_rate: float = 0.1
    max_levels: int | None = None
    patience: int = 3
    smallest_rate: float = 0.01

    def __post_init__(self) -> None:
        check_number(
            "pruning_rate",
            self.pruning_rate,
            above=0,
            below=1,
            remedy="It is the share of the surviving weights that one level removes.",
        )
        if self.max_levels is not None:
            check_count("max_levels", self.max_levels)
        check_count("patience", self.patience)
        check_number("smallest_rate", self.smallest_rate, above=0)


@dataclass(frozen=True)
class Validation:
    """How candidates are judged.

    The data is dealt to folds at random. Some rank: the whole search sees only these. The others confirm: when the
    search is over, its accepted levels are judged on them once, the densest first, until one misses the floor.

    Attributes:
        rank_by: Name of the logged metric that orders a branch. None: the logged loss if there is one, else the
            monitored metric. The floor is held by the monitored metric in any case.
        confirm: Share of the data that confirms, in [0, 1). 0: ranking and floor share all of it.
        race: Whether candidates that fall behind on the first folds drop out; else all are judged on all ranking folds.
        cache_bytes: The batches of the validation data are read once and kept, up to so many bytes in all. If there is
            more, the loader is read again for every part of a race.
        keep_callbacks: Names of the user's callback classes that stay live while candidates are validated: for one
            that logs the monitored metric.
    """

    rank_by: str | None = None
    confirm: float = 0.5
    race: bool = True
    cache_bytes: int = 2**31
    keep_callbacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank_by is not None and not isinstance(self.rank_by, str):
            raise TypeError(f"rank_by is {self.rank_by!r}, but must be the name of a logged metric.")
        check_number(
            "confirm", self.confirm, at_least=0, below=1, remedy="It is the share of the data kept for confirmation."
        )
        if not isinstance(self.race, bool):
            raise TypeError(f"race is {self.race!r}, but must be True or False.")
        check_count("cache_bytes", self.cache_bytes, at_least=0)
        check_words("keep_callbacks", self.keep_callbacks, "names of callback classes")
        object.__setattr__(self, "keep_callbacks", tuple(self.keep_callbacks))  # a list, as read from YAML


@dataclass(frozen=True)
class Refit:
    """How a pruned network is brought closer to the dense one without training: here, running statistics alone.

    Attributes:
        batches: How many batches of the training data calibrate.
        each_level: Whether each level is refitted before it is held against the floor; else only what was accepted is,
            when the search is over.
        finalists: Of each level so many of the best candidates are refitted and ranked again.
    """

    batches: int = 100
    each_level: bool = True
    finalists: int = 1

    def __post_init__(self) -> None:
        check_count("batches", self.batches)
        if not isinstance(self.each_level, bool):
            raise TypeError(f"each_level is {self.each_level!r}, but must be True or False.")
        check_count("finalists", self.finalists)


@dataclass(frozen=True)
class LeastSquares(Refit):
    """How the survivors are refitted: each layer's outputs as close as may be to the dense network's.

    Attributes:
        batches: How many batches of the training data calibrate.
        each_level: Whether each level is refitted before it is held against the floor; else only what was accepted is,
            when the search is over.
        finalists: Of each level so many of the best candidates are refitted and ranked again.
        damping: How strongly weights are drawn to their dense values, in units of the mean square of a layer's inputs.
    """

    damping: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, at_least=0)


def refit_of(refit: str | Refit | None) -> Refit | None:
    """The choices that a word stands for.

    Raises:
        TypeError: If it is neither a word nor a group of choices.
        ValueError: If there is no such word.
    """
    if refit is None or isinstance(refit, Refit):
        return refit
    if not isinstance(refit, str):
        raise TypeError(f"refit is {refit!r}, but must be None, one of {', '.join(REFITS)}, or a LeastSquares(...).")
    check_choice("refit", refit, REFITS, remedy="Or pass a LeastSquares(...), or None.")
    return LeastSquares() if refit == "least_squares" else Refit()
