"""Frozen groups of settings, each with the values it allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch import Tensor

from lightning_roulette.checks import as_group, check_choice, check_count, check_number, check_words, duration
from lightning_roulette.unit import Reduction, Unit, Weight, unit_of

Importance = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

CALIBRATED = ("sensitivity", "activation", "obs")  # computed on calibration inputs
IMPORTANCES = ("magnitude", "lamp", *CALIBRATED)
SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Wheel:
    """How a candidate is drawn.

    Args:
        sharpness: Exponent of the pruning odds, which are `importance ** -sharpness`. The larger it is, the fewer
            important weights are pruned:

            - `0`: random pruning.
            - `1`: the roulette in its original form, with odds inversely proportional to importance.
            - `16`: the default.
            - `inf`: no chance. The least important weights are pruned, which is magnitude pruning by default.
        importance: What makes a weight important:

            - `None`: chooses for you. `"sensitivity"` if every level gets a least-squares refit or if levels are cut
              between epochs, provided that gradients through the network can be computed; otherwise `"magnitude"`.
            - `"magnitude"`: `|w|`. For any network. Needs the weights only.
            - `"lamp"`: layer-adaptive magnitude, `|w|` relative to the larger weights of its layer. For one wheel over
              layers of very different sizes. Needs the weights only.
            - `"sensitivity"`: `|w|`, times the square root of the root mean square of its input, times how strongly the
              network's outputs depend on its output (see `Calibration.scales`). For searches with a least-squares
              refit. Needs calibration inputs and a network with gradients.
            - `"activation"`: `|w|` times the root mean square of its input. For networks whose inputs differ in size.
              Needs calibration inputs.
            - `"obs"`: `|w|` divided by the square root of its diagonal entry in the inverse Gram matrix of the layer's
              inputs. For a comparison with the optimal brain surgeon. Needs calibration inputs.
            - A function from `{name: weight}` to `{name: importance}` of the same shapes. For a measure of your own. It
              gets all weights, zero where the parent is pruned.
        scope: Which weights compete with one another. A layer is one parameter here:

            - `"global"`: one wheel for all layers. Layers may end at different sparsities.
            - `"layer"`: one wheel for each layer, all with the same pruning rate. Use it if importances of different
              layers cannot be compared.
        allocation: How much candidates differ in how they distribute pruning over the layers. Each candidate multiplies
            the importance of each parameter by `exp(allocation * z)`, where `z` is drawn from a standard normal
            distribution, in addition to its parent's factors:

            - `None`: 0.3 with a least-squares refit and more than one candidate, otherwise 0.
            - `0`: no difference.
            - A positive number. It has no effect with `scope="layer"`.
        unit: Which weights are removed together. The importance of a neuron or a head is `sqrt(s / cost)`, where `s` is
            the sum of squared importances of the weights that read it. With `"sensitivity"`, `s` is the sum of squared
            derivatives of the outputs with respect to a common factor of these weights.
            With units the factors of `allocation` belong to groups of units, and `scope` must be `"global"`:

            - `"weight"` or `Weight()`: single weights. For the smallest files.
            - `"neuron"` or `Neuron()`: neurons and channels, with all that is coupled with them. For networks that are
              smaller and faster on every device. `Neuron(multiple_of=8)` leaves multiples of 8, which many kernels
              need to be faster. Needs the extra `units`.
            - `"head"` or `Head()`: heads of attention. Needs the extra `units`.
            - `NofM(kept, of)`: of each group of neighbouring weights, some stay. For GPUs with sparse tensor cores.
            - `Block(rows, columns)`: rectangles of weights. For kernels that skip blocks of zeros.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    sharpness: float = 16.0
    importance: Importance | str | None = None
    scope: str = "global"
    allocation: float | None = None
    unit: str | Mapping[str, int] | Unit = field(default="weight", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", unit_of(self.unit))  # YAML gives a mapping
        if self.unit != Weight() and self.scope == "layer":
            raise ValueError(
                f"scope is 'layer' and unit {self.unit!r}, but units of all layers are drawn from one wheel. Pass "
                "scope='global'."
            )
        check_number("sharpness", self.sharpness, at_least=0, remedy="Infinity (.inf) is magnitude pruning.")
        if self.importance is not None and not callable(self.importance):
            check_choice("importance", self.importance, IMPORTANCES, remedy="Or pass a function of all weights.")
        check_choice("scope", self.scope, SCOPES)
        if self.allocation is not None:
            check_number("allocation", self.allocation, at_least=0)


@dataclass(frozen=True)
class Tree:
    """How one level follows another, and when the search ends.

    A level fails if its winner misses the floor. It is tried again at half the pruning rate. Later levels keep this
    rate.

    Args:
        pruning_rate: Share of the current survivors that a level removes, in (0, 1). A smaller rate takes more levels
            to the same sparsity.
        coarse_rate: Pruning rate of coarse levels, in (0, 1). They have one candidate each, and come first. When one
            fails, the levels of `pruning_rate` begin. It does not count for `patience`. A search then takes about 0.4
            of the time, and keeps 1 to 18 % more weights (measured on three networks). There are coarse levels only if
            every level gets a least-squares refit and if this rate is larger than `pruning_rate`. None: no coarse
            levels.
        max_levels: Stop after this many accepted levels. None: no such limit.
        patience: Stop after this many failed levels in a row.
        smallest_rate: Stop when a failure would halve the rate below this value, whatever the patience. Without this
            limit, smaller and smaller steps could pass on a noisy score, down to one weight at a time.
        max_time: How long the search may try levels. None: no limit.

            - `"DD:HH:MM:SS"`, a `timedelta`, or a dictionary of its arguments, as in `Trainer(max_time=...)`.
            - `"HH:MM:SS"`.

            A level is not tried if it would end after this time, provided that it takes as long as the last one. The
            accepted levels are then confirmed, which takes some more time. The result depends on the speed of the
            machine. Cuts between epochs have no such limit.
        target: How much is to leave before the search ends, in what the network costs: a `Reduction`. The pruning rates
            are then shares of what is left of this cost. It needs a `unit` of whole neurons or heads. None: weights are
            counted, and `target_sparsity` alone is a target.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    pruning_rate: float = 0.1
    coarse_rate: float | None = field(default=0.2, kw_only=True)
    max_levels: int | None = None
    patience: int = 3
    smallest_rate: float = 0.01
    max_time: str | timedelta | Mapping[str, float] | None = None
    target: Reduction | None = field(default=None, kw_only=True)

    @property
    def seconds(self) -> float:
        """`max_time` in seconds; infinite if there is no limit."""
        return math.inf if self.max_time is None else duration("max_time", self.max_time).total_seconds()

    def __post_init__(self) -> None:
        check_number(
            "pruning_rate",
            self.pruning_rate,
            above=0,
            below=1,
            remedy="It is the share of the surviving weights that one level removes.",
        )
        if self.coarse_rate is not None:
            check_number("coarse_rate", self.coarse_rate, above=0, below=1, remedy="None stands for no coarse levels.")
        if self.max_levels is not None:
            check_count("max_levels", self.max_levels)
        check_count("patience", self.patience)
        check_number("smallest_rate", self.smallest_rate, above=0)
        if self.max_time is not None:
            duration("max_time", self.max_time)
        if self.target is not None:
            object.__setattr__(self, "target", as_group("target", self.target, Reduction))  # YAML gives a mapping


@dataclass(frozen=True)
class Validation:
    """How candidates are judged.

    The validation data is divided into folds at random:

    - The search half ranks candidates. The search sees nothing else.
    - The held-out half confirms. After the search, its accepted levels are judged on it once, from the densest on,
      until one misses the floor.

    Args:
        rank_by: Name of the logged metric that ranks the candidates of a level. The floor always applies to the
            monitored metric.

            - `None`: the logged loss if there is one, otherwise the monitored metric. A loss distinguishes candidates
              with equal accuracy.
            - A name. The module must log it in validation.
        confirm: Share of the data that is held out, in [0, 1):

            - `0.5`: the default.
            - `0`: the search uses all data for ranking and for the floor. For small data sets. The winner's score is
              then biased, because the same data chose it.
        race: How the candidates of a level are compared:

            - `True`: candidates that fall behind on the first folds drop out. Faster.
            - `False`: every candidate is judged on the whole search half.
        cache_bytes: The validation batches are read once and kept in memory, up to this many bytes. If there are more,
            the loader is read again for every part of a race.
        keep_callbacks: Class names of your callbacks that stay active while candidates are validated. For a callback
            that logs the monitored metric.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
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
            "confirm", self.confirm, at_least=0, below=1, remedy="It is the share of the data that is held out."
        )
        if not isinstance(self.race, bool):
            raise TypeError(f"race is {self.race!r}, but must be True or False.")
        check_count("cache_bytes", self.cache_bytes, at_least=0)
        check_words("keep_callbacks", self.keep_callbacks, "names of callback classes")
        object.__setattr__(self, "keep_callbacks", tuple(self.keep_callbacks))  # YAML gives a list


def groups_of(
    wheel: Wheel | Mapping[str, Any], tree: Tree | Mapping[str, Any], validation: Validation | Mapping[str, Any]
) -> tuple[Wheel, Tree, Validation]:
    """Return three groups of settings. Each may be given as a mapping from its fields to their values.

    Raises:
        TypeError: If an argument is neither a group nor a mapping, a field is unknown, or a value has the wrong type.
        ValueError: If a value is not allowed.
    """
    return as_group("wheel", wheel, Wheel), as_group("tree", tree, Tree), as_group("validation", validation, Validation)
