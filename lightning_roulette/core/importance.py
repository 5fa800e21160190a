"""Importance: a non-negative number per weight, high where the weight matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_roulette.core.settings import CALIBRATED, Importance


def importance_of(
    weights: Mapping[str, Tensor], kind: str | Importance, scales: Callable[[str], Mapping[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """The importance of every weight, by a named kind or a user's function.

    Args:
        weights: Parameter name to tensor, zero where pruned.
        kind: See `Wheel`.
        scales: For a kind that looks at inputs, what multiplies the magnitude: see `Calibration.scales`.

    Returns:
        The same names and shapes.

    Raises:
        TypeError: If a user's function does not return tensors by name.
        ValueError: If it leaves a name out or changes a shape.
    """
    if isinstance(kind, str) and kind in CALIBRATED:
        assert scales is not None
        found = scales(kind)
        return {name: magnitude(weight.detach()) * found[name] for name, weight in weights.items()}
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


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor on its own device, or on the CPU where that device (Apple's MPS) has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
