"""Inputs on which two networks are compared, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.containers import parts_of, with_parts
from lightning_roulette.network.coupling.borrowing import borrowed
from lightning_roulette.network.coupling.check import outputs_of

_CLOSE = 1e-5  # allowed difference, relative to the larger of one and the largest output


def runs_of(model: nn.Module, example_input: Any) -> list[Callable[[], Any]]:
    """What calls a network with the example, and with random inputs like it."""
    return [caller_of(model, one)(None) for one in (example_input, like(example_input))]


def like(example_input: Any) -> Any:
    """Random inputs of the same mean and spread; whole numbers and truth values in another order."""
    return _varied(example_input, torch.Generator().manual_seed(0))


def outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    """What a network returns for the example and for random inputs like it, in evaluation mode."""
    with borrowed(model):
        return [one for run in runs_of(model, example_input) for one in outputs_of(run)]


def float_outputs(model: nn.Module, given: Any) -> list[Tensor]:
    """The floating-point numbers that a network returns for an input."""
    return outputs_of(caller_of(model, given)(None))


def are_close(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether all outputs differ by at most 1e-5, relative to the larger of one and the largest output."""
    return len(expected) == len(found) and all(map(_is_close, expected, found))


def _is_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    return bool((one - other).abs().max() <= _CLOSE * max(1.0, float(one.abs().max())))


def _varied(given: Any, chance: torch.Generator) -> Any:
    if isinstance(given, Tensor):
        return _random_like(given, chance)
    parts = parts_of(given)
    return given if parts is None else with_parts(given, {key: _varied(one, chance) for key, one in parts.items()})


def _random_like(example: Tensor, chance: torch.Generator) -> Tensor:
    if not example.is_floating_point():
        order = torch.randperm(example.numel(), generator=chance).to(example.device)
        return example.flatten()[order].reshape(example.shape)
    noise = torch.randn(example.shape, generator=chance).to(example)
    return example.mean() + max(float(example.std(correction=0)), 1e-3) * noise
