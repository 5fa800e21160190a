"""Weights in several processes: the wheel stops, bit for bit, where that of one process stops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette import Mask
from lightning_roulette.large.bits import Bits, as_stored
from lightning_roulette.large.limits import limited
from lightning_roulette.large.shards import Shards, is_sharded, local, part_of, reshard, start_of
from lightning_roulette.mask import mask as masks
from lightning_roulette.network.lending import applied
from lightning_roulette.network.zeros import ZeroFill
from lightning_roulette.wheel.chance import moved, random_bits
from lightning_roulette.wheel.importance import Magnitudes, magnitude
from lightning_roulette.wheel.wheel import Sectors
from tests.support.together import on_shards

SHARPNESSES = (0.0, 0.5, 1.0, 16.0, 1e300, math.inf)
KINDS = ("spread", "tied", "zeros", "tiny and huge")


def network(rows: list[int], kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights of so many rows each, with what makes a threshold hard to find."""
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


def partly(weights, share: float) -> Mask:
    chance = torch.Generator().manual_seed(5)
    return Mask({name: torch.rand(one.shape, generator=chance) >= share for name, one in weights.items()})


def spun(weights, parent, draws, *, ranks, whole=(), sharpness=1.0, scope="global", of=None):
    """The mask of one process, and those that each of several finds."""
    numbers = {"seed": 3, "level": 2, "candidate": 1}
    measure = of or (lambda tensors: {name: magnitude(one) for name, one in tensors.items()})
    options = {"sharpness": sharpness, "scope": scope}
    alone = Sectors(measure(weights), parent, **options).spin(draws, **numbers)
    found = on_shards(
        weights,
        ranks,
        lambda shards, own: Sectors(measure(own), parent, **options, shards=shards).spin(draws, **numbers),
        whole,
    )
    return alone, found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    ranks=st.integers(1, 4),
    sharpness=st.sampled_from(SHARPNESSES),
    share=st.floats(0, 1),
    pruned=st.sampled_from([0.0, 0.4]),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 1000),
)
def test_all_processes_find_the_mask_of_one(rows, kind, ranks, sharpness, share, pruned, scope, seed):
    weights = network(rows, kind, seed)
    parent = partly(weights, pruned)
    spare = sum(max(0, count - 1) for count in parent.counts.values()) if scope == "layer" else parent.survivors
    draws = int(share * spare)
    alone, found = spun(weights, parent, draws, ranks=ranks, sharpness=sharpness, scope=scope)
    assert parent.survivors - alone.survivors == draws
    assert found == [alone] * ranks


@pytest.mark.parametrize("sharpness", SHARPNESSES)
def test_equal_weights_go_in_the_order_of_one_process(sharpness):
    weights = {name: torch.ones(7, 5) for name in "abc"}
    for draws in (1, 34, 35, 36, 71, 104):
        alone, found = spun(weights, Mask.full(weights), draws, ranks=3, sharpness=sharpness)
        assert found == [alone] * 3


@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
def test_what_all_processes_hold_counts_once(sharpness):
    weights = network([8, 4, 6], "spread", 0)
    alone, found = spun(weights, Mask.full(weights), 40, ranks=3, whole=("layer 1",), sharpness=sharpness)
    assert found == [alone] * 3


@pytest.mark.parametrize("sharpness", [0.0, 2.0, math.inf])
def test_a_wheel_that_makes_all_again_block_by_block_finds_the_same(sharpness):
    """Of more weights than are held, and of masks that are packed; shards begin within a byte."""
    weights = network([301, 77], "zeros", 1)
    parent = partly(weights, 0.3)
    with (
        limited(held_weights=100, unpacked_entries=50),
        limited(block_keys=64),
    ):
        packed = Mask(dict(parent))
        assert all(isinstance(one, Bits) for one in packed.stored.values())
        alone, found = spun(weights, packed, 500, ranks=4, sharpness=sharpness, of=Magnitudes)
        assert found == [alone] * 4
    held, _ = spun(weights, parent, 500, ranks=1, sharpness=sharpness)
    assert held == alone


@pytest.mark.parametrize("held", [100, 1 << 24])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 16.0, 1e300])
def test_zeros_race_one_another_wherever_the_smallest_weight_lies(sharpness, held):
    weights = {"layer": torch.randn(80, 5, generator=torch.Generator().manual_seed(0))}
    weights["layer"][:, 2:] = 0
    weights["layer"][0, 0] = 1e-30  # of the first process
    with limited(held_weights=held):
        for draws in (20, 120, 239, 240, 241):
            alone, found = spun(weights, Mask.full(weights), draws, ranks=3, sharpness=sharpness)
            assert found == [alone] * 3


def test_many_weights_of_which_the_first_digits_leave_several():
    weights = {"layer": torch.randn(300, 100, generator=torch.Generator().manual_seed(0))}
    for sharpness in (0.0, 1.0, 16.0, math.inf):
        alone, found = spun(weights, Mask.full(weights), 9000, ranks=2, sharpness=sharpness)
        assert found == [alone] * 2


def test_all_processes_raise_if_one_has_nan():
    weights = {"layer": torch.ones(4, 2)}
    weights["layer"][0, 0] = math.nan
    found = on_shards(weights, 2, lambda shards, own: Sectors(own, Mask.full(weights), sharpness=1, shards=shards))
    assert [type(one) for one in found] == [ValueError, ValueError]
    assert "NaN" in str(found[0])
    assert "another process" in str(found[1])


@given(stream=st.integers(-(2**63), 2**63 - 1), start=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_moved_stream_draws_what_the_other_draws_further_on(stream, start):
    index = torch.arange(5)
    assert torch.equal(random_bits(moved(stream, start), index), random_bits(stream, index + start))


class Placement:
    def __init__(self, dim: int | None) -> None:
        self.dim = dim

    def is_replicate(self) -> bool:
        return self.dim is None

    def is_shard(self, dim: int | None = None) -> bool:
        return self.dim is not None and dim in (None, self.dim)


class Shard(Placement):
    """Has the name of torch's own."""


class Mesh:
    def __init__(self, rank: int, ranks: int, ndim: int = 1) -> None:
        self.rank, self.ranks, self.ndim, self.mesh = rank, ranks, ndim, torch.arange(ranks)

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


class Distributed:
    """What is looked at of a DTensor."""

    def __init__(self, whole, rank, ranks, placements, ndim=1) -> None:
        self.whole, self.shape, self.placements = whole, whole.shape, placements
        self.device_mesh = Mesh(rank, ranks, ndim)
        dim = placements[0].dim
        parts = () if dim is None else whole.chunk(ranks, dim)
        self.held = whole if dim is None else parts[rank] if rank < len(parts) else whole[:0]

    def to_local(self):
        return self.held

    def numel(self) -> int:
        return self.whole.numel()

    def detach(self):
        return self


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_parts_of_a_mask_are_those_of_the_rows_held(ranks):
    whole = torch.arange(35.0).view(7, 5)
    kept = whole.remainder(3) == 0
    for rank in range(ranks):
        ours = Distributed(whole, rank, ranks, (Shard(0),))
        assert is_sharded(ours)
        for form in (kept, Bits.of(kept)):
            assert torch.equal(part_of(as_stored(form), ours), local(ours).remainder(3) == 0)
        assert local(ours).numel() == 0 or start_of(ours) == int(local(ours).flatten()[0])


@pytest.mark.parametrize("most", [1 << 20, 4])
def test_a_part_is_pruned_and_given_back_bit_for_bit(most):
    """Also of a packed mask, a few rows at a time."""
    whole = torch.arange(1.0, 36.0).view(7, 5)
    kept = {"": whole.remainder(3) == 0}
    with limited(unpacked_entries=most, masked_entries=5):
        mask = Mask(kept)
        assert isinstance(mask.stored[""], Bits) == (most == 4)
        for rank in range(5):
            before = whole.chunk(4)[rank] if rank < 4 else whole[:0]
            ours = Distributed(whole.clone(), rank, 5 if rank == 4 else 4, (Shard(0),))
            with applied(mask, {"": ours}):
                assert torch.equal(ours.held, before.where(before.remainder(3) == 0, 0))
            assert torch.equal(ours.held, before)
            masks.fill_pruned({"": ours}, mask)
            assert torch.equal(ours.held, before.where(before.remainder(3) == 0, 0))


def test_zeros_of_a_part_are_filled_again():
    whole = torch.arange(1.0, 36.0).view(7, 5)
    for rank in range(3):
        ours = Distributed(whole.clone(), rank, 3, (Shard(0),))
        fill = ZeroFill(part_of(as_stored(whole.remainder(3) == 0), ours), ours)
        ours.held[0, :] = math.nan
        fill(ours)
        expected = whole.chunk(3)[rank].remainder(3) == 0
        assert torch.equal(ours.held != 0, expected)


@pytest.mark.parametrize(
    ("placements", "ndim"),
    [((Shard(1),), 1), ((Shard(0), Shard(0)), 2), ((Placement(0),), 1)],
    ids=["columns", "two dimensions", "not torch's own"],
)
def test_weights_that_do_not_lie_by_rows_are_refused(placements, ndim):
    with pytest.raises(ValueError, match=r"shape \(4, 6\) is placed.*fully_shard.*prune on one device"):
        start_of(Distributed(torch.zeros(4, 6), 0, 2, placements, ndim))


def test_plain_weights_have_no_shards():
    net = nn.Linear(3, 2)
    assert Shards.of(dict(net.named_parameters())) is None
    reshard(net)
    assert local(net.weight) is net.weight
    assert start_of(net.weight) == 0
