"""Importances, masks, and the ways in which a wheel finds its threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from lightning_roulette import Mask
from lightning_roulette.large.limits import limited, limits
from lightning_roulette.wheel import threshold
from lightning_roulette.wheel.chance import stream
from lightning_roulette.wheel.law import draw

# which search for the threshold the limits choose
WAYS = {
    "joined": {"joint_weights": 1 << 20},
    "sampled": {"joint_weights": 0},
    "long": {"joint_weights": 0, "held_weights": 0},
}


@contextmanager
def found_by(way: str, *, block: int | None = None, compared: int | None = None, sigmas: float = 5.0) -> Iterator[None]:
    """Inside the block wheels find their threshold in one of `WAYS`, in blocks of `8 * block` keys."""
    fields = {"block_keys": 8 * block if block else limits().block_keys, **WAYS[way]}
    fields["compared_keys"] = limits().compared_keys if compared is None else compared
    with limited(**fields), patch.object(threshold, "SIGMAS", sigmas):
        yield


def network(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Uniform importances, the same each time."""
    chance = np.random.default_rng(2)
    return {name: torch.from_numpy(chance.random(shape, dtype=np.float32)) for name, shape in shapes.items()}


def partly(weights: Mapping[str, Tensor], share: float) -> Mask:
    """A mask that keeps about this share of the weights."""
    chance = np.random.default_rng(3)
    return Mask({name: torch.from_numpy(chance.random(one.shape) < share) for name, one in weights.items()})


def by_law(weights: Mapping[str, Tensor], parent: Mask, draws: int, *, sharpness: float, **place: int) -> Mask:
    """The mask that the law defines; `place` has seed, level and candidate, by default 0, 1 and 0."""
    numbers = {"seed": 0, "level": 1, "candidate": 0} | place
    streams = {name: stream(**numbers, name=name) for name in parent} if sharpness < float("inf") else {}
    drawn = draw(weights, parent, draws, sharpness=sharpness, streams=streams)
    return Mask({name: kept & ~drawn[name] for name, kept in parent.items()})
