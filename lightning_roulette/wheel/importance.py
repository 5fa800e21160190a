"""Importance: a non-negative number for each weight, high where the weight matters.

`MEASURES` has the kinds that follow from the weights of a layer alone. A new one is one function and one entry there,
and its name in `settings.IMPORTANCES`. Kinds that need calibration inputs (`settings.CALIBRATED`) are the magnitude
times a scale, which the calibration provides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_roulette.large.bits import flat_part
from lightning_roulette.large.devices import with_float64
from lightning_roulette.large.limits import are_few
from lightning_roulette.settings import CALIBRATED, Importance


def magnitude(weight: Tensor) -> Tensor:
    """Return `|w|`, float32 or wider, in the shape of `weight`."""
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))


def lamp(weight: Tensor) -> Tensor:
    """Return the layer-adaptive magnitude of a layer's weights.

    It is `|w|` relative to all weights of the layer that are at least as large. With the weights of the layer in
    ascending order of magnitude, it is `|w[i]| / sqrt(sum(w[j] ** 2 for j >= i))`.

    This is the square root of the score of Lee, Park, Mo, Ahn and Shin, "Layer-adaptive sparsity for the
    magnitude-based pruning" (ICLR 2021), eq. 4. The root gives a sharpness the same meaning as for the magnitude. The
    largest weight of a layer has importance 1. A weight of zero has importance 0.

    Returns:
        float64, shape of `weight`, in [0, 1].
    """
    squares = with_float64(weight).reshape(-1).to(torch.float64).square()
    ascending, order = squares.sort(stable=True)
    at_least = ascending.flip(0).cumsum(0).flip(0)
    score = torch.zeros_like(squares)
    score[order] = (ascending / at_least.clamp(min=torch.finfo(torch.float64).tiny)).sqrt_()
    return score.view(weight.shape)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude, "lamp": lamp}


class Magnitudes(Mapping[str, Tensor]):
    """The magnitudes of all weights, computed when they are read.

    Args:
        weights: Parameter name to tensor, not copied.
        factors: Parameter name to a factor of its magnitudes. None: no factors.
    """

    def __init__(self, weights: Mapping[str, Tensor], factors: Mapping[str, float] | None = None) -> None:
        self._weights, self._factors = {name: weight.detach() for name, weight in weights.items()}, factors

    def __getitem__(self, name: str) -> Tensor:
        return self._times(name, magnitude(self._weights[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # the method of Mapping would compute the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return the magnitudes from one index of a flattened parameter to another."""
        return self._times(name, magnitude(flat_part(self._weights[name], start, stop)))

    def times(self, factors: Mapping[str, float]) -> Magnitudes:
        """Return the magnitudes multiplied by one factor for each parameter."""
        return Magnitudes(self._weights, factors)

    def _times(self, name: str, values: Tensor) -> Tensor:
        return values if self._factors is None else values * self._factors[name]


def importance_of(
    weights: Mapping[str, Tensor], kind: str | Importance, scales: Callable[[str], Mapping[str, Tensor]] | None = None
) -> Mapping[str, Tensor]:
    """Return the importance of every weight.

    Args:
        weights: Parameter name to tensor, zero where pruned.
        kind: Name of a kind, or a user's function; see `Wheel`.
        scales: Returns, for a kind that needs calibration inputs, the tensors that multiply the magnitudes; see
            `Calibration.scales`.

    Returns:
        Parameter name to tensor of the same shape. The magnitudes of a large network are computed when they are read.

    Raises:
        TypeError: If a user's function does not return tensors by name.
        ValueError: If a user's function leaves out a name or changes a shape.
    """
    if callable(kind):
        return _checked(kind({name: weight.detach() for name, weight in weights.items()}), weights)
    if kind in CALIBRATED:
        assert scales is not None
        found = scales(kind)
        return {name: magnitude(weight.detach()) * found[name] for name, weight in weights.items()}
    if kind == "magnitude" and not are_few(weights.values()):
        return Magnitudes(weights)
    return {name: MEASURES[kind](weight.detach()) for name, weight in weights.items()}


def weighed(importance: Mapping[str, Tensor], factors: Mapping[str, float]) -> Mapping[str, Tensor]:
    """Return the importance multiplied by one factor for each parameter."""
    if isinstance(importance, Magnitudes):
        return importance.times(factors)
    return {name: values * factors[name] for name, values in importance.items()}


def flat_importance(importance: Mapping[str, Tensor], name: str, device: torch.device, start: int, stop: int) -> Tensor:
    """Return the importance from one index of a flattened parameter to another, on a device."""
    if isinstance(importance, Magnitudes):
        return importance.part(name, start, stop).to(device)
    return flat_part(importance[name].detach(), start, stop).to(device)


def _checked(found: object, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a user's function returned, in the order of the weights."""
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
        raise TypeError(f"importance returned {type(found).__name__}, but must return {{name: tensor}}.")
    for name, weight in weights.items():
        if name not in found or found[name].shape != weight.shape:
            came = tuple(found[name].shape) if name in found else "nothing"
            raise ValueError(
                f"importance returned {came} for {name!r}, but must return a tensor of shape {tuple(weight.shape)}, "
                "like the weights it is given under this name."
            )
    return {name: found[name].detach() for name in weights}
