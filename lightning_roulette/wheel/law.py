"""The law of the wheel: `draw` defines which weights a spin prunes.

A spin draws weights one after the other, without replacement. The next weight is `i` with probability `odds[i]` over
the sum of the odds of the weights that are left, where `odds = importance ** -sharpness` (Plackett-Luce).

One race of exponential clocks makes all draws at once (Efraimidis and Spirakis, "Weighted random sampling with a
reservoir", 2006). The clock of weight `i` rings after `E / odds[i]`, where `E` is exponential of rate 1. The weights
whose clocks ring first are drawn. This module compares logarithms, because `importance ** -sharpness` overflows:

    key = log E + sharpness * log importance

A spin for `draws` weights prunes the weights with the `draws` smallest keys. There are three more rules:

- Equal keys: the earlier parameter is drawn first, and within a parameter the smaller index.
- Importance 0: these weights are drawn before all others, in random order, at every sharpness above 0.
- Sharpness infinity: the key is the importance itself, without chance. This is magnitude pruning.

The other modules of this folder find the same weights with less time or memory. They are tested against `draw`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.wheel.chance import log_clocks

# log E spans less than 42 (see chance.log_clocks). A weight whose term lies further below the others is drawn first.
_BELOW_ALL = 64.0


def draw(
    importance: Mapping[str, Tensor],
    survivors: Mapping[str, Tensor],
    draws: int,
    *,
    sharpness: float,
    streams: Mapping[str, int],
) -> dict[str, Tensor]:
    """Draw weights from several parameters, by definition: all keys, one threshold.

    Args:
        importance: Parameter name to tensor, finite and non-negative.
        survivors: Parameter name to bool tensor of the same shape. Only weights that are True can be drawn.
        draws: Number of weights to draw from all parameters together.
        sharpness: Exponent of the odds.
        streams: Parameter name to its stream of chance, see `chance.stream`. Empty if the sharpness is infinite.

    Returns:
        Parameter name to bool tensor: True where a weight is drawn for pruning.
    """
    values = {name: importance[name].to(alive.device)[alive] for name, alive in survivors.items()}
    law = Law.of(sharpness, min(smallest_positive(one) for one in values.values()))
    places = {name: alive.flatten().nonzero().flatten() for name, alive in survivors.items()}
    keys = [keys_of(law.terms(values[name]), streams.get(name), places[name]) for name in survivors]
    drawn = {name: torch.zeros_like(alive) for name, alive in survivors.items()}
    for (name, alive), smallest in zip(survivors.items(), smallest_of(keys, draws), strict=True):
        drawn[name][alive] = smallest
    return drawn


@dataclass(frozen=True)
class Law:
    """The part of a key that chance does not change: `sharpness * log importance`.

    Attributes:
        sharpness: Exponent of the odds, 0 to infinity.
        zero: The term of an importance of zero.
    """

    sharpness: float
    zero: float = -math.inf

    @classmethod
    def of(cls, sharpness: float, smallest: float) -> Law:
        """Return the law that draws zeros before positive importances; `smallest` is the smallest positive one."""
        if not 0 < sharpness < math.inf:
            return cls(sharpness)
        lowest = min(0.0, sharpness * math.log(smallest))
        # at a huge sharpness `_BELOW_ALL` is less than the rounding error of the term
        return cls(sharpness, min(lowest - _BELOW_ALL, lowest * (1 + 2.0**-50)))

    def terms(self, importance: Tensor) -> Tensor:
        """Return the term of each importance: float64, or the importance itself if the sharpness is infinite."""
        if math.isinf(self.sharpness):
            return importance
        if self.sharpness == 0:
            return torch.zeros((), dtype=torch.float64, device=importance.device).expand(len(importance))
        return importance.to(torch.float64, copy=True).log_().mul_(self.sharpness).clamp_(min=self.zero)


def keys_of(terms: Tensor, stream: int | Tensor | None, index: Tensor) -> Tensor:
    """Return the keys of weights, float64.

    Args:
        terms: See `Law.terms`.
        stream: Stream of chance of the parameter, or one for each weight. None: the keys are the terms.
        index: Index of each weight in its flattened parameter.
    """
    return terms.to(torch.float64) if stream is None else log_clocks(stream, index).add_(terms)


def smallest_of(keys: Sequence[Tensor], draws: int) -> list[Tensor]:
    """Return a bool tensor for each tensor of keys: True for the `draws` smallest of all keys, ties in order."""
    joined = torch.cat([values.to(keys[0].device) for values in keys])
    if draws == 0:
        drawn = torch.zeros_like(joined, dtype=torch.bool)
    else:
        threshold = joined.kthvalue(draws).values
        drawn = joined < threshold
        tied = (joined == threshold).nonzero().flatten()
        drawn[tied[: draws - int(drawn.sum())]] = True
    parts = drawn.split([len(values) for values in keys])
    return [part.to(values.device) for part, values in zip(parts, keys, strict=True)]


def smallest_positive(importance: Tensor) -> float:
    """Return the smallest importance above zero; infinity if there is none."""
    least = float(importance.min()) if importance.numel() else math.inf
    if least > 0:
        return least
    positive = importance[importance > 0]
    return float(positive.min()) if len(positive) else math.inf


def layer_shares(draws: int, survivors: Sequence[int]) -> list[int]:
    """Return the number of draws of each layer: proportional to its survivors, by the method of largest remainders.

    Each layer keeps at least one survivor. The shares therefore sum to `draws`, or to the number of weights that can
    be pruned if this is smaller. If remainders are equal, the earlier layer comes first.

    Examples:
        >>> layer_shares(5, [10, 10, 1])
        [3, 2, 0]
    """
    room = [max(0, count - 1) for count in survivors]
    draws, total = min(draws, sum(room)), max(1, sum(survivors))
    shares = [min(free, draws * count // total) for free, count in zip(room, survivors, strict=True)]
    by_remainder = sorted(range(len(room)), key=lambda layer: -(draws * survivors[layer] % total))
    while sum(shares) < draws:
        for layer in by_remainder:
            if sum(shares) < draws and shares[layer] < room[layer]:
                shares[layer] += 1
    return shares


def check_importance(name: str, importance: Tensor) -> float:
    """Return the smallest importance; infinity if there is none.

    Raises:
        ValueError: If an importance is negative or not finite.
    """
    if not importance.numel():
        return math.inf
    least, most = importance.aminmax()
    if not bool((least >= 0) & (most < math.inf)):
        raise ValueError(
            f"importance of {name or 'the weights'} has negative, infinite or NaN entries, but must be finite and "
            "non-negative. Do the weights hold NaN or infinity?"
        )
    return float(least)


def check_draws(draws: int, survivors: int) -> None:
    """Raise if a number of draws is not possible.

    Raises:
        ValueError: If `draws` is negative or exceeds the survivors.
    """
    if not 0 <= draws <= survivors:
        raise ValueError(f"draws is {draws}, but must lie between 0 and the {survivors} survivors.")
