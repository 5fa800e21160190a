"""Scores of a network and of what a device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS = 256  # that are run at once


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose largest output is that of the target class. Targets are whole numbers.

    Raises:
        ValueError: If outputs and targets are not those of a classifier.
    """
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"validation has targets of the type {targets.dtype} and the shape {tuple(targets.shape)} for outputs of "
            f"the shape {tuple(outputs.shape)}, which accuracy does not compare. Give score=, a function of outputs "
            "and targets."
        )
    return float((outputs.argmax(1) == targets).double().mean())


def scores(
    runs: Sequence[Callable[[Tensor], Tensor]],
    validation: tuple[Tensor, Tensor] | Iterable[Any],
    score: Callable[[Tensor, Tensor], float],
    shape: tuple[int, ...],
) -> list[float]:
    """Return the score of each function of inputs, on the same inputs and targets. Batches are read once.

    Args:
        runs: The functions.
        validation: Inputs and targets, or batches of both.
        score: Scores outputs against targets.
        shape: Shape of an input without the batch.

    Raises:
        TypeError: If a batch is not inputs and targets.
        ValueError: If there are no batches, or if inputs have another shape or type.
    """
    outputs: list[list[Tensor]] = [[] for _ in runs]
    targets = []
    for inputs, wanted in _batches(validation, shape):
        for run, found in zip(runs, outputs, strict=True):
            found += [run(rows) for rows in inputs.split(_ROWS)]
        targets.append(wanted)
    if not targets:
        raise ValueError("validation has no batches. Give inputs and targets, or a loader that yields both.")
    return [score(torch.cat(found), torch.cat(targets)) for found in outputs]


def _batches(validation: Any, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    whole = isinstance(validation, (tuple, list)) and len(validation) == 2 and isinstance(validation[0], Tensor)
    for batch in [validation] if whole else validation:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(one, Tensor) for one in batch)
        if not pair:
            raise TypeError(
                f"validation has a batch of type {type(batch).__name__}, but must have pairs of tensors: inputs and "
                "targets."
            )
        inputs, wanted = (one.detach().cpu() for one in batch)
        if inputs.dtype != torch.float32 or tuple(inputs.shape[1:]) != shape or len(inputs) != len(wanted):
            raise ValueError(
                f"validation has inputs of the type {inputs.dtype} and the shape {tuple(inputs.shape)} with "
                f"{len(wanted)} targets, but inputs must be float32 of the shape (n, {', '.join(map(str, shape))}), "
                "with as many targets."
            )
        yield inputs, wanted
