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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kind=st.sampled_from(["spread", "tied", "zeros", "tiny and huge"]),
    ranks=st.integers(1, 4),
    sharpness=st.sampled_from(SHARPNESSES),
    share=st.floats(0, 1),
    alive=st.sampled_from([1.0, 0.6]),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 1000),
)
def test_all_processes_find_the_mask_of_one(rows, kind, ranks, sharpness, share, alive, scope, seed):
    weights = network(rows, kind, seed)
    parent = partly(weights, alive)
    spare = sum(max(0, count - 1) for count in parent.counts.values()) if scope == "layer" else parent.survivors
    draws = int(share * spare)
    alone = LevelWheel(magnitudes(weights), parent, sharpness=sharpness, scope=scope).spin(draws, **PLACE)
    assert parent.survivors - alone.survivors == draws
    assert spun(weights, parent, draws, ranks, sharpness, scope=scope) == [alone] * ranks


@pytest.mark.parametrize("sharpness", SHARPNESSES)
def test_equal_weights_are_drawn_in_order(sharpness):
    weights = {name: torch.ones(7, 5) for name in "abc"}
    parent = Mask.full(weights)
    for draws in (1, 34, 35, 36, 71, 104):
        assert spun(weights, parent, draws, 3, sharpness) == [lawful(weights, parent, draws, sharpness)] * 3


@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
def test_weights_that_all_processes_hold_count_once(sharpness):
    weights = network([8, 4, 6], "spread", 0)
    parent = Mask.full(weights)
    assert spun(weights, parent, 40, 3, sharpness, whole=("layer 1",)) == [lawful(weights, parent, 40, sharpness)] * 3


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


@pytest.mark.parametrize("held", [100, 1 << 24])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 16.0, 1e300])
def test_zeros_are_drawn_first_whichever_process_has_the_smallest_weight(sharpness, held):
    weights = {"layer": torch.randn(80, 5, generator=torch.Generator().manual_seed(0))}
    weights["layer"][:, 2:] = 0
    weights["layer"][0, 0] = 1e-30  # held by the first process
    parent = Mask.full(weights)
    with limited(held_weights=held):
        for draws in (20, 120, 239, 240, 241):
            assert spun(weights, parent, draws, 3, sharpness) == [lawful(weights, parent, draws, sharpness)] * 3


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 16.0, math.inf])
def test_many_keys_with_the_same_first_digits_are_told_apart(sharpness):
    weights = {"layer": torch.randn(300, 100, generator=torch.Generator().manual_seed(0))}
    parent = Mask.full(weights)
    assert spun(weights, parent, 9000, 2, sharpness) == [lawful(weights, parent, 9000, sharpness)] * 2


def test_all_processes_raise_if_one_has_nan():
    weights = {"layer": torch.ones(4, 2)}
    weights["layer"][0, 0] = math.nan
    found = spun(weights, Mask.full(weights), 1, 2)
    assert [type(one) for one in found] == [ValueError, ValueError]
    assert "NaN" in str(found[0])
    assert "another process" in str(found[1])
