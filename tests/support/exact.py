"""Reference solutions by NumPy, one output at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def exact_fit(x: Tensor, y: Tensor, start: Tensor, kept: Tensor, damping: float, rcond: float = 1e-10) -> Tensor:
    """The damped least squares fit on the kept inputs: the ridge is further rows, which want `start`.

    Shapes: x (groups, rows, inputs), y (groups, rows, outputs), start and kept (groups, outputs, inputs).
    """
    found = np.zeros(start.shape)
    for group, output in np.ndindex(start.shape[:2]):
        on, rows = kept[group, output].numpy(), x[group].numpy()
        if on.any():
            root = math.sqrt(damping * (rows**2).sum(0).mean())
            tall, before = np.concatenate([rows, root * np.eye(len(on))])[:, on], start[group, output].numpy()[on]
            missing = y[group, :, output].numpy() - rows[:, on] @ before
            change = np.linalg.lstsq(tall, np.concatenate([missing, np.zeros(len(on))]), rcond=rcond)[0]
            found[group, output, on] = before + change
    return torch.from_numpy(found)


def exact_diagonals(gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The diagonal of the inverse of the damped Gram matrix of each output's kept inputs; infinite where not kept."""
    found = np.full(kept.shape, math.inf)
    for group, output in np.ndindex(kept.shape[:2]):
        on, one = kept[group, output].numpy(), gram[group].numpy()
        damped = one + damping * np.diag(one).mean() * np.eye(len(one))
        found[group, output, on] = np.diag(np.linalg.inv(damped[np.ix_(on, on)]))
    return torch.from_numpy(found)
