"""The wheel of one level: the draws of all its candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lightning_roulette.checks import check_choice, check_number, check_seed
from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import Mask
from lightning_roulette.settings import SCOPES
from lightning_roulette.wheel.agreed import AgreedThreshold, agreed_arcs
from lightning_roulette.wheel.arcs import Kept, held_arcs
from lightning_roulette.wheel.chance import stream
from lightning_roulette.wheel.guess import GuessedThreshold, are_few
from lightning_roulette.wheel.law import check_draws, layer_shares
from lightning_roulette.wheel.long_arcs import long_arcs
from lightning_roulette.wheel.threshold import SampledThreshold, Threshold

T = TypeVar("T")


def spin(importance: Tensor, survivors: Tensor, draws: int, *, sharpness: float, seed: int) -> Tensor:
    """Draw weights for pruning from one vector.

    The next weight is `i` with probability `odds[i]` over the sum of the odds of the weights that are left, where
    `odds = importance ** -sharpness` (Plackett-Luce). Drawn weights are not drawn again. All draws come from one race
    of exponential clocks (Efraimidis and Spirakis 2006).

    Args:
        importance: Shape `(n,)`, finite and non-negative. Scale does not matter. Zeros are drawn first at every
            sharpness above 0.
        survivors: Shape `(n,)`, bool. Only weights that are True can be drawn.
        draws: Number of distinct weights to draw, at most the number of survivors.
        sharpness: Exponent of the odds. 0 draws at random, 1 is the literal roulette, infinity draws the least
            important weights. Equal importances are drawn in order of index.
        seed: Signed 64-bit number. Equal seeds draw equal weights on every device (up to ties of rounded logarithms).

    Returns:
        A bool tensor of shape `(n,)`, True where a weight is drawn for pruning.

    Raises:
        TypeError: If `sharpness` is not a number, or `seed` is not a whole number.
        ValueError: In one of these cases:

            - `importance` and `survivors` are not vectors of one length, or `survivors` is not bool.
            - `draws` is negative or exceeds the survivors.
            - `sharpness` is negative, or `seed` needs more than 64 bits.
            - An importance is negative or not finite.

    Examples:
        >>> spin(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3, dtype=torch.bool), 2, sharpness=math.inf, seed=0)
        tensor([False,  True,  True])
    """
    if importance.dim() != 1 or survivors.shape != importance.shape or survivors.dtype != torch.bool:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)} and survivors shape {tuple(survivors.shape)} of "
            f"{survivors.dtype}, but both must be vectors of one length, survivors of bool. Flatten them first."
        )
    check_seed(seed)
    wheel = LevelWheel({"": importance}, Mask({"": survivors}), sharpness=sharpness)
    return survivors & ~wheel.spin(draws, seed=seed, level=0, candidate=0)[""]


class LevelWheel:
    """The wheel of one level. Each candidate is one spin of it; see `law` for what a spin draws.

    The memory that it holds depends on the number of weights of the network:

    - Up to 2**20: at most 48 bytes per survivor. Spins after the first one are faster.
    - Up to 2**24: 8 bytes per survivor, and 4 more if not all weights of its parameter survive.
    - More: only `importance` and `parent`. Each spin makes all keys again.

    Args:
        importance: Parameter name to tensor, non-negative and finite, for each parameter of `parent` and of the same
            shape. With `shards` it is the importance of `shards.own(weights)`.
        parent: The mask whose survivors are on the wheel.
        sharpness: Exponent of the odds.
        scope: One of

            - `"global"`: all parameters share the draws.
            - `"layer"`: each parameter has draws of its own, in proportion to its survivors; see `layer_shares`.
        shards: The weights that this process owns, if the weights lie in several processes. Masks are always masks of
            the whole network. All processes must make the same wheel and the same spins.

    Raises:
        ValueError: If an importance is negative or not finite, or `sharpness` is negative.
    """

    def __init__(
        self,
        importance: Mapping[str, Tensor],
        parent: Mask,
        *,
        sharpness: float,
        scope: str = "global",
        shards: Shards | None = None,
    ) -> None:
        check_number("sharpness", sharpness, at_least=0, remedy="Infinity is magnitude pruning.")
        check_choice("scope", scope, SCOPES)
        self.parent = _with_float64(parent)
        self.sharpness, self.scope, self._shards = sharpness, scope, shards
        self._thresholds = self._found_by(importance)

    def spin(self, draws: int, *, seed: int, level: int, candidate: int) -> Mask:
        """Return the parent's mask with exactly `draws` weights fewer.

        A spin needs memory for the new mask, one block of keys, the few keys near the threshold, and one byte for each
        weight of one parameter (eight bytes if it has few weights). With more than 2**24 weights, the mask is packed at
        one bit per weight, and a block takes the place of the parameter.

        Args:
            draws: Number of weights to prune, at most the number of survivors.
            seed: With `level`, `candidate` and each parameter's name, the source of all chance.
            level: See `seed`.
            candidate: See `seed`.

        Raises:
            ValueError: If there are fewer survivors than `draws`, or, with one wheel for each layer, fewer that can be
                pruned.
        """
        check_draws(draws, sum(threshold.count for threshold in self._thresholds))
        chance = not math.isinf(self.sharpness)
        streams = {name: stream(seed, level, candidate, name) for name in self.parent} if chance else {}
        kept: dict[str, Kept] = {}
        for threshold, share in zip(self._thresholds, self._shares(draws), strict=True):
            kept |= threshold.spin(share, streams)
        if self._shards is None:
            return Mask(kept)
        return Mask(self._shards.whole(kept, {name: one.shape for name, one in self.parent.stored.items()}))

    def _found_by(self, importance: Mapping[str, Tensor]) -> list[Threshold]:
        """Return how the threshold of each group of parameters is found."""
        parent, sharpness, shards = self.parent, self.sharpness, self._shards
        if shards is not None:
            agreed = self._grouped(agreed_arcs(importance, parent, sharpness, shards))
            return [AgreedThreshold(arcs, shards) for arcs in agreed]
        if parent.size > limits().held_weights:
            return [SampledThreshold(arcs) for arcs in self._grouped(long_arcs(importance, parent, sharpness))]
        held = self._grouped(held_arcs(importance, parent, sharpness))
        return [GuessedThreshold(arcs) if are_few(arcs) else SampledThreshold(arcs) for arcs in held]

    def _grouped(self, arcs: Mapping[str, T]) -> list[Mapping[str, T]]:
        """Return the groups of parameters that share their draws."""
        return [arcs] if self.scope == "global" else [{name: arc} for name, arc in arcs.items()]

    def _shares(self, draws: int) -> list[int]:
        """Return the number of draws of each group."""
        if self.scope == "global":
            return [draws]
        shares = layer_shares(draws, [threshold.count for threshold in self._thresholds])
        if sum(shares) < draws:
            raise ValueError(f"draws is {draws}, but must be at most {sum(shares)}, because each layer keeps a weight.")
        return shares


def _with_float64(mask: Mask) -> Mask:
    """Return the mask on a device with float64: on the CPU instead of Apple's MPS."""
    return mask.cpu() if any(kept.device.type == "mps" for kept in mask.stored.values()) else mask
