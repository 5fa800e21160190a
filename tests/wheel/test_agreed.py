"""The threshold of several processes: their masks are, bit for bit, the mask of one process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette import Mask
from lightning_roulette.large.bits import Bits
from lightning_roulette.large.limits import limited
from lightning_roulette.wheel.importance import Magnitudes, magnitude
from lightning_roulette.wheel.level import LevelWheel
from tests.support.together import on_shards
from tests.support.wheels import by_law, partly

SHARPNESSES = (0.0, 0.5, 1.0, 16.0, 1e300, math.inf)
PLACE = {"seed": 3, "level": 2, "candidate": 1}


def network(rows: list[int], kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights of so many rows each, whose threshold is hard to find."""
    chance = torch.Generator().manual_seed(seed)
    weights = {f"layer {i}": torch.randn(count, 3 + i, generator=chance) for i, count in enumerate(rows)}
    for one in weights.values():
        if kind == "tied":
            one.copy_(one.round())
        elif kind == "zeros":
            one.masked_fill_(torch.rand(one.shape, generator=chance) < 0.5, 0)
        elif kind == "tiny and huge":
            one.mul_(10.0 ** torch.randint(-38, 38, one.shape, generator=chance))
    return weights


def magnitudes(weights) -> dict[str, torch.Tensor]:
    return {name: magnitude(one) for name, one in weights.items()}


def spun(weights, parent, draws, ranks, sharpness=1.0, *, whole=(), scope="global", of=magnitudes) -> list[Mask]:
    """The mask that each of several processes finds; `whole` are parameters that all of them hold."""

    def one(shards, own) -> Mask:
        wheel = LevelWheel(of(own), parent, sharpness=sharpness, scope=scope, shards=shards)
        return wheel.spin(draws, **PLACE)

    return on_shards(weights, ranks, one, whole)


def lawful(weights, parent, draws, sharpness=1.0) -> Mask:
    return by_law(magnitudes(weights), parent, draws, sharpness=sharpness, **PLACE)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kind=st.sampled_from(["spread", "tied", "zeros", "tiny and huge"]),
    ranks=st.integers(1, 4),
    sharpness=st.sampled_from(SHARPNESSES),
    share=st.floats(0, 1),
    alive=st.sampled_from([1.0, 0.6]),
    scope=st.sampled_from(["global", "layer"]),
    whole=st.sampled_from([(), ("layer 0",)]),
    seed=st.integers(0, 1000),
)
def test_all_processes_find_the_mask_of_one(rows, kind, ranks, sharpness, share, alive, scope, whole, seed):
    """Also if all of them hold the whole of a parameter."""
    weights = network(rows, kind, seed)
    parent = partly(weights, alive)
    spare = sum(max(0, count - 1) for count in parent.counts.values()) if scope == "layer" else parent.survivors
    draws = int(share * spare)
    alone = LevelWheel(magnitudes(weights), parent, sharpness=sharpness, scope=scope).spin(draws, **PLACE)
    assert parent.survivors - alone.survivors == draws
    assert spun(weights, parent, draws, ranks, sharpness, whole=whole, scope=scope) == [alone] * ranks


def tied() -> dict[str, torch.Tensor]:
    return {name: torch.ones(7, 5) for name in "abc"}


def crowded() -> dict[str, torch.Tensor]:
    """Many keys share their first digits."""
    return {"layer": torch.randn(300, 100, generator=torch.Generator().manual_seed(0))}


def zeros() -> dict[str, torch.Tensor]:
    """The first process has the smallest weight, and all processes have zeros."""
    weights = {"layer": torch.randn(80, 5, generator=torch.Generator().manual_seed(0))}
    weights["layer"][:, 2:] = 0
    weights["layer"][0, 0] = 1e-30
    return weights


@pytest.mark.parametrize("held", [100, 1 << 24])
@pytest.mark.parametrize("sharpness", SHARPNESSES)
@pytest.mark.parametrize(
    ("weights", "draws"),
    [(tied(), (1, 34, 35, 36, 71, 104)), (crowded(), (9000,)), (zeros(), (20, 120, 239, 240, 241))],
    ids=["tied", "crowded", "zeros"],
)
def test_all_processes_draw_as_the_law_does(weights, draws, sharpness, held):
    parent = Mask.full(weights)
    with limited(held_weights=held):
        for count in draws:
            assert spun(weights, parent, count, 3, sharpness) == [lawful(weights, parent, count, sharpness)] * 3


@pytest.mark.parametrize("sharpness", [0.0, 2.0, math.inf])
def test_large_networks_find_the_same(sharpness):
    """Nothing is held for each weight, masks are packed, and shards begin within a byte."""
    weights = network([301, 77], "zeros", 1)
    parent = partly(weights, 0.7)
    expected = dict(lawful(weights, parent, 500, sharpness))
    with limited(held_weights=100, unpacked_entries=50, block_keys=64):
        packed = Mask(dict(parent))
        assert all(isinstance(one, Bits) for one in packed.stored.values())
        assert spun(weights, packed, 500, 4, sharpness, of=Magnitudes) == [Mask(expected)] * 4


def test_all_processes_raise_if_one_has_nan():
    weights = {"layer": torch.ones(4, 2)}
    weights["layer"][0, 0] = math.nan
    found = spun(weights, Mask.full(weights), 1, 2)
    assert [type(one) for one in found] == [ValueError, ValueError]
    assert "NaN" in str(found[0])
    assert "another process" in str(found[1])
