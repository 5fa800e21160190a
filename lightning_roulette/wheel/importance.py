"""Importance: a non-negative number per weight, high where the weight matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_roulette.large.bits import flat_part
from lightning_roulette.large.devices import with_float64
from lightning_roulette.large.limits import limits
from lightning_roulette.settings import CALIBRATED, Importance


class Magnitudes(Mapping[str, Tensor]):
    """The magnitude of every weight, made each time it is asked for.

    Args:
        weights: Parameter name to tensor, not copied.
        factors: Parameter name to what its magnitudes are multiplied by; None: nothing.
    """

    def __init__(self, weights: Mapping[str, Tensor], factors: Mapping[str, float] | None = None) -> None:
        self._weights, self._factors = {name: weight.detach() for name, weight in weights.items()}, factors

    def __getitem__(self, name: str) -> Tensor:
        return self._times(name, magnitude(self._weights[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # that of a Mapping would make the tensor to tell

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Those of a stretch of a flattened parameter."""
        return self._times(name, magnitude(flat_part(self._weights[name], start, stop)))

    def times(self, factors: Mapping[str, float]) -> Magnitudes:
        """The same multiplied by a number for each parameter."""
        return Magnitudes(self._weights, factors)

    def _times(self, name: str, values: Tensor) -> Tensor:
        return values if self._factors is None else values * self._factors[name]


def importance_of(
    weights: Mapping[str, Tensor], kind: str | Importance, scales: Callable[[str], Mapping[str, Tensor]] | None = None
) -> Mapping[str, Tensor]:
    """The importance of every weight, by a named kind or a user's function.

    Args:
        weights: Parameter name to tensor, zero where pruned.
        kind: See `Wheel`.
        scales: For a kind that looks at inputs, what multiplies the magnitude: see `Calibration.scales`.

    Returns:
        The same names and shapes. The magnitudes of a large network are made when they are asked for.

    Raises:
        TypeError: If a user's function does not return tensors by name.
        ValueError: If it leaves a name out or changes a shape.
    """
    if isinstance(kind, str) and kind in CALIBRATED:
        assert scales is not None
        found = scales(kind)
        return {name: magnitude(weight.detach()) * found[name] for name, weight in weights.items()}
    if kind == "magnitude" and sum(weight.numel() for weight in weights.values()) > limits().held_weights:
        return Magnitudes(weights)
    if not callable(kind):
        measure = {"magnitude": magnitude, "lamp": lamp}[kind]
        return {name: measure(weight.detach()) for name, weight in weights.items()}
    found = kind({name: weight.detach() for name, weight in weights.items()})
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
        raise TypeError(f"importance returned {type(found).__name__}, but must return {{name: tensor}} as it is given.")
    for name, weight in weights.items():
        if name not in found or found[name].shape != weight.shape:
            came = tuple(found[name].shape) if name in found else "nothing"
            raise ValueError(
                f"importance returned {came} for {name!r}, but must return a tensor of shape {tuple(weight.shape)} "
                "for each of the weights it is given."
            )
    return {name: found[name].detach() for name in weights}


def weighed(importance: Mapping[str, Tensor], factors: Mapping[str, float]) -> Mapping[str, Tensor]:
    """Importance multiplied by a number for each parameter."""
    if isinstance(importance, Magnitudes):
        return importance.times(factors)
    return {name: values * factors[name] for name, values in importance.items()}


def magnitude(weight: Tensor) -> Tensor:
    """`|w|`, in float32 or wider, shape of `weight`."""
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))


def lamp(weight: Tensor) -> Tensor:
    """Layer-adaptive magnitude: `|w|` relative to all weights of the layer that are at least as large.

    For the weights of one layer in ascending order of magnitude, the result is
    `|w[i]| / sqrt(sum(w[j] ** 2 for j >= i))`: the square root of the score of Lee, Park, Mo, Ahn and Shin,
    "Layer-adaptive sparsity for the magnitude-based pruning" (ICLR 2021), eq. 4, so that a sharpness means the same
    for it as for magnitude. The largest weight of every layer has importance 1; zero has 0.

    Returns:
        float64, shape of `weight`, in [0, 1].
    """
    squares = with_float64(weight).reshape(-1).to(torch.float64).square()
    ascending, order = squares.sort(stable=True)
    at_least = ascending.flip(0).cumsum(0).flip(0)
    score = torch.zeros_like(squares)
    score[order] = (ascending / at_least.clamp(min=torch.finfo(torch.float64).tiny)).sqrt_()
    return score.view(weight.shape)
