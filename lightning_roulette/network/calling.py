"""Calls of a network with batches of a given size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def caller_of(model: nn.Module, example_input: Any) -> Callable[[int | None], Callable[[], Any]]:
    """What makes a call of a network with a batch of the given size, made of the first sample. None: with all samples.

    Raises:
        TypeError: If `example_input` is no tensor, tuple, list or mapping.
        ValueError: If a tensor has no sample.
    """
    if not isinstance(example_input, Tensor | Mapping | Sequence) or isinstance(example_input, str):
        raise TypeError(
            f"example_input is of type {type(example_input).__name__}, but must be a tensor, a tuple of arguments or a "
            "mapping of named arguments."
        )
    given = (example_input,) if isinstance(example_input, Tensor) else example_input
    tensors = given.values() if isinstance(given, Mapping) else given
    if any(isinstance(one, Tensor) and (one.dim() == 0 or len(one) == 0) for one in tensors):
        raise ValueError("example_input has a tensor without samples. Its first dimension must be the batch.")

    def call(size: int | None) -> Callable[[], Any]:
        if isinstance(given, Mapping):
            named = {name: _batch(one, size) for name, one in given.items()}
            return lambda: model(**named)
        arguments = [_batch(one, size) for one in given]
        return lambda: model(*arguments)

    return call


def has_own_forward(part: nn.Module) -> bool:
    """Whether a module calls its own forward, and no function that was put in its place, as torch.compile does."""
    forward = vars(part).get("forward")
    return forward is None or (isinstance(forward, MethodType) and forward.__self__ is part)


def _batch(one: Any, size: int | None) -> Any:
    """A batch of the first sample. None: all samples."""
    return torch.cat([one[:1]] * size) if isinstance(one, Tensor) and size is not None else one
