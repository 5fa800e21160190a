"""The score of what a device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def scored(
    run: Callable[[Tensor], Tensor], validation: tuple[Tensor, Tensor] | Iterable[Any], score: Callable[..., float]
) -> float:
    """Return the score of a function of inputs on inputs and targets, or on batches of both."""
    whole = isinstance(validation, (tuple, list)) and len(validation) == 2 and isinstance(validation[0], Tensor)
    batches: Iterable[Any] = [validation] if whole else validation
    outputs, targets = [], []
    for inputs, wanted in batches:
        outputs += [run(rows.cpu()) for rows in inputs.split(_ROWS)]
        targets.append(wanted.cpu())
    return score(torch.cat(outputs), torch.cat(targets))
