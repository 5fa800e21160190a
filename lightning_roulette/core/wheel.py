"""The roulette wheel: from importance and survivors to the weights at which it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_roulette.core.chance import log_clocks, stream
from lightning_roulette.core.importance import with_float64
from lightning_roulette.core.masks import Mask
from lightning_roulette.core.settings import SCOPES, check_choice, check_number, check_seed

# log E spans less than 42 (see chance.log_clocks); what lies further below the rest is always drawn before it.
_BELOW_ALL = 64.0


def spin(importance: Tensor, survivors: Tensor, draws: int, *, sharpness: float, seed: int) -> Tensor:
    """The weights at which the wheel stops when it is spun `draws` times, each sector leaving once hit.

    The next weight is `i` with probability `odds[i]` over the odds still on the wheel, where
    `odds = importance ** -sharpness` (Plackett-Luce). All draws come from one race of exponential clocks, clock `i`
    running at rate `odds[i]`; the first `draws` to ring are the draw (Efraimidis and Spirakis 2006). Sharpness 0 prunes
    at random; infinity prunes the least important, ties in order of index.

    Args:
        importance: Shape `(n,)`, finite and non-negative. Scale does not matter; zero is drawn first at every
            sharpness above 0.
        survivors: Shape `(n,)`, bool. Only these are on the wheel.
        draws: How many distinct weights, at most the number of survivors.
        sharpness: The exponent, 0 to infinity.
        seed: Equal seed, equal draw, on every device (up to ties of rounded logarithms).

    Returns:
        Shape `(n,)`, bool: True where a weight is drawn for pruning.

    Raises:
        ValueError: If `draws` exceeds the survivors, `sharpness` is negative, or an importance is negative or not
            finite.

    Example:
        >>> spin(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3, dtype=torch.bool), 2, sharpness=math.inf, seed=0)
        tensor([False,  True,  True])
    """
    if importance.dim() != 1 or survivors.shape != importance.shape or survivors.dtype != torch.bool:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)} and survivors shape {tuple(survivors.shape)} of "
            f"{survivors.dtype}, but both must be vectors of one length, survivors of bool. Flatten them first."
        )
    check_seed(seed)
    sectors = Sectors({"": importance}, Mask({"": survivors}), sharpness=sharpness)
    return survivors & ~sectors.spin(draws, seed=seed, level=0, candidate=0)[""]


class Sectors:
    """One level's wheel: what all candidates of a branch share, so that each is but one race of clocks.

    The key of a survivor is `log E + sharpness * log importance` (`importance` itself where sharpness is infinite); the
    smallest keys are drawn. Logarithms keep `w ** -sharpness` from overflowing.

    Args:
        importance: Non-negative and finite, one tensor per parameter of `parent`, of its shape.
        parent: The mask whose survivors are on the wheel.
        sharpness: Exponent of the odds.
        scope: `"global"`, one wheel over all parameters, or `"layer"`, one for each, sharing the draws in proportion
            to their survivors.

    Raises:
        ValueError: If an importance is negative or not finite, or `sharpness` is negative.
    """

    def __init__(
        self, importance: Mapping[str, Tensor], parent: Mask, *, sharpness: float, scope: str = "global"
    ) -> None:
        check_number("sharpness", sharpness, at_least=0, remedy="Infinity is magnitude pruning.")
        check_choice("scope", scope, SCOPES)
        self.parent = Mask({name: with_float64(kept) for name, kept in parent.items()})
        self.sharpness, self.scope = sharpness, scope
        self._index = {name: kept.flatten().nonzero().flatten() for name, kept in self.parent.items()}
        known = {name: _checked(name, importance[name]).to(kept.device) for name, kept in self.parent.items()}
        alive = {name: known[name].flatten()[index] for name, index in self._index.items()}
        self._terms = {name: values.to(torch.float64) for name, values in alive.items()}
        if math.isfinite(sharpness):
            _to_log_odds(self._terms, sharpness)

    def spin(self, draws: int, *, seed: int, level: int, candidate: int) -> Mask:
        """The parent's mask with exactly `draws` weights fewer.

        Args:
            draws: How many weights leave, at most all survivors.
            seed: With `level` and `candidate` and each parameter's name, the source of all chance.
            level: See `seed`.
            candidate: See `seed`.

        Raises:
            ValueError: If there are fewer survivors than `draws`, or with a wheel for each layer fewer that may go.
        """
        if not 0 <= draws <= self.parent.survivors:
            raise ValueError(f"draws is {draws}, but must lie between 0 and the {self.parent.survivors} survivors.")
        keys = {name: self._keys(name, stream(seed, level, candidate, name)) for name in self._index}
        if self.scope == "global":
            drawn = dict(zip(keys, _smallest(list(keys.values()), draws), strict=True))
        else:
            shares = layer_shares(draws, [len(values) for values in keys.values()])
            if sum(shares) < draws:
                raise ValueError(f"draws is {draws}, but each layer keeps a weight: at most {sum(shares)} may go.")
            drawn = {n: _smallest([keys[n]], share)[0] for n, share in zip(keys, shares, strict=True)}
        return Mask({name: self._without(name, drawn[name]) for name in keys})

    def _keys(self, name: str, stream_of_name: int) -> Tensor:
        if math.isinf(self.sharpness):
            return self._terms[name]
        return log_clocks(stream_of_name, self._index[name]).add_(self._terms[name])

    def _without(self, name: str, drawn: Tensor) -> Tensor:
        kept = self.parent[name].flatten().clone()
        kept[self._index[name][drawn]] = False
        return kept.view(self.parent[name].shape)


def layer_shares(draws: int, survivors: Sequence[int]) -> list[int]:
    """How many of `draws` each layer gives: in proportion to its survivors, by largest remainder.

    No layer gives its last survivor, so the shares sum to `draws` or to all that may go. Equal remainders go to the
    earlier layer.

    Example:
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


def _checked(name: str, importance: Tensor) -> Tensor:
    if not bool((importance >= 0).all()) or bool(importance.isinf().any()):
        raise ValueError(
            f"importance of {name or 'the weights'} has negative, infinite or NaN entries, but must be finite and "
            "non-negative. Do the weights hold NaN or infinity?"
        )
    return importance.detach()


def _to_log_odds(terms: Mapping[str, Tensor], sharpness: float) -> None:
    """In place, importance becomes `sharpness * log importance`; zeros come to lie below all others."""
    if sharpness == 0:
        for values in terms.values():
            values.zero_()
        return
    lowest = 0.0
    for values in terms.values():
        values.log_().mul_(sharpness)
        finite = values[values > -math.inf]
        lowest = min(lowest, float(finite.min())) if len(finite) else lowest
    bottom = min(lowest - _BELOW_ALL, lowest * (1 + 2.0**-50))  # the latter where the sharpness dwarfs the former
    for values in terms.values():
        values.clamp_(min=bottom)


def _smallest(keys: Sequence[Tensor], draws: int) -> list[Tensor]:
    """For each tensor of keys, bool: which are among the `draws` smallest of all; ties go to the earlier."""
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
