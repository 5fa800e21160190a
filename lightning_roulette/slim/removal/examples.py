"""Inputs on which two networks are compared, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.containers import parts_of, with_parts
from lightning_roulette.network.coupling.borrowing import borrowed
from lightning_roulette.network.coupling.check import is_within, outputs_of

_CLOSE = 1e-5  # allowed difference, relative to the larger of one and the largest output


def inputs_like(model: nn.Module, example_input: Any) -> list[Any]:
    """Return the example, and random inputs like it that the network can compute.

    Floating-point numbers have the same mean and spread. Those that are not finite, as in an attention mask, stay.
    Whole numbers and truth values are in another order. If the network fails on them, or gives numbers that are not
    finite, their rows are in another order instead. If it fails on these, too, the example is alone.
    """
    with borrowed(model):
        finite = _are_finite(model, example_input)
        for by_rows in (False, True):
            given = _varied(example_input, torch.Generator().manual_seed(0), by_rows)
            try:
                if _are_finite(model, given) or not finite:
                    return [example_input, given]
            except Exception:  # of a network that takes only some whole numbers, such as lengths in order
                continue
    return [example_input]


def runs_of(model: nn.Module, inputs: Sequence[Any]) -> list[Callable[[], Any]]:
    """Return what calls a network with each of some inputs."""
    return [caller_of(model, one)(None) for one in inputs]


def outputs(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that a network returns for some inputs, in evaluation mode."""
    with borrowed(model):
        return [one for run in runs_of(model, inputs) for one in outputs_of(run)]


def are_close(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether all outputs differ by at most 1e-5, relative to the larger of one and the largest output.

    Whole numbers must be equal, and the same numbers must be finite. See `is_within` for what counts as the largest.
    """
    return len(expected) == len(found) and all(is_close(*pair, _CLOSE) for pair in zip(expected, found, strict=True))


def is_close(one: Tensor, other: Tensor, share: float, least: float = 1.0) -> bool:
    """Whether two outputs are as `are_close` says, with another share, and another least size for the largest one."""
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    return is_within(one.masked_fill(~finite, 0), other.masked_fill(~finite, 0), share, least)


def _are_finite(model: nn.Module, given: Any) -> bool:
    return all(bool(one.isfinite().all()) for one in outputs_of(caller_of(model, given)(None)))


def _varied(given: Any, chance: torch.Generator, by_rows: bool) -> Any:
    if isinstance(given, Tensor):
        return _random_like(given, chance, by_rows)
    parts = parts_of(given)
    if parts is None:
        return given
    return with_parts(given, {key: _varied(one, chance, by_rows) for key, one in parts.items()})


def _random_like(example: Tensor, chance: torch.Generator, by_rows: bool) -> Tensor:
    if example.is_floating_point():
        noise, finite = torch.randn(example.shape, generator=chance).to(example), example.isfinite()
        known = example[finite] if bool(finite.any()) else example.new_zeros(1)
        found = known.mean() + max(float(known.std(correction=0)), 1e-3) * noise
        return torch.where(finite, found, example)
    if by_rows:
        return example[torch.randperm(len(example), generator=chance).to(example.device)] if example.dim() else example
    order = torch.randperm(example.numel(), generator=chance).to(example.device)
    return example.flatten()[order].reshape(example.shape)
