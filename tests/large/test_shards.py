"""Sharded weights: all processes draw the mask that one process draws, and fill and restore their own part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_roulette import Mask, PrunedWeights
from lightning_roulette.large.bits import Bits, as_stored
from lightning_roulette.large.limits import limited
from lightning_roulette.large.shards import Shards, is_sharded, local, part_of, reshard, start_of
from lightning_roulette.mask.mask import fill_pruned
from lightning_roulette.network.lending import applied
from lightning_roulette.network.zeros import ZeroFill
from lightning_roulette.wheel.chance import moved, random_bits
from lightning_roulette.wheel.importance import Magnitudes, magnitude
from lightning_roulette.wheel.level import LevelWheel
from tests.support.together import on_shards

SHARPNESSES = (0.0, 0.5, 1.0, 16.0, 1e300, math.inf)
KINDS = ("spread", "tied", "zeros", "tiny and huge")


def network(rows: list[int], kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Layers with these numbers of rows. Each kind makes the threshold of a draw hard to find in its own way."""
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
    """The mask that one process draws, and the masks that several processes draw."""
    numbers = {"seed": 3, "level": 2, "candidate": 1}
    measure = of or (lambda tensors: {name: magnitude(one) for name, one in tensors.items()})
    options = {"sharpness": sharpness, "scope": scope}
    alone = LevelWheel(measure(weights), parent, **options).spin(draws, **numbers)
    found = on_shards(
        weights,
        ranks,
        lambda shards, own: LevelWheel(measure(own), parent, **options, shards=shards).spin(draws, **numbers),
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


def with_zeros() -> dict[str, torch.Tensor]:
    """Two thirds are zero, and the smallest weight belongs to the first process."""
    weights = {"layer": torch.randn(80, 5, generator=torch.Generator().manual_seed(0))}
    weights["layer"][:, 2:] = 0
    weights["layer"][0, 0] = 1e-30
    return weights


@pytest.mark.parametrize("held", [100, 1 << 24])
@pytest.mark.parametrize("sharpness", SHARPNESSES)
@pytest.mark.parametrize(
    ("weights", "whole", "draws"),
    [
        ({name: torch.ones(7, 5) for name in "abc"}, (), (1, 34, 35, 36, 71, 104)),
        (network([8, 4, 6], "spread", 0), ("layer 1",), (40,)),
        (with_zeros(), (), (20, 120, 239, 240, 241)),
        ({"layer": torch.randn(300, 100, generator=torch.Generator().manual_seed(0))}, (), (9000,)),
    ],
    ids=["ties", "one layer in every process", "zeros", "many keys with the same first digits"],
)
def test_hard_thresholds_are_those_of_one_process(weights, whole, draws, sharpness, held):
    with limited(held_weights=held):
        for count in draws:
            alone, found = spun(weights, Mask.full(weights), count, ranks=3, whole=whole, sharpness=sharpness)
            assert found == [alone] * 3


@pytest.mark.parametrize("sharpness", [0.0, 2.0, math.inf])
def test_packed_masks_and_keys_that_are_computed_in_blocks_change_nothing(sharpness):
    # shards begin within a byte
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


def test_all_processes_raise_if_one_has_nan():
    weights = {"layer": torch.ones(4, 2)}
    weights["layer"][0, 0] = math.nan
    found = on_shards(weights, 2, lambda shards, own: LevelWheel(own, Mask.full(weights), sharpness=1, shards=shards))
    assert [type(one) for one in found] == [ValueError, ValueError]
    assert "NaN" in str(found[0])
    assert "another process" in str(found[1])


@given(stream=st.integers(-(2**63), 2**63 - 1), start=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_moved_stream_equals_the_original_stream_further_on(stream, start):
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
    """Has the name of torch's class."""


class Mesh:
    def __init__(self, rank: int, ranks: int, ndim: int = 1) -> None:
        self.rank, self.ranks, self.ndim, self.mesh = rank, ranks, ndim, torch.arange(ranks)

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


class Distributed:
    """The part of DTensor's interface that the package uses."""

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
def test_each_process_gets_the_part_of_a_mask_for_its_rows(ranks):
    whole = torch.arange(35.0).view(7, 5)
    kept = whole.remainder(3) == 0
    for rank in range(ranks):
        ours = Distributed(whole, rank, ranks, (Shard(0),))
        assert is_sharded(ours)
        for form in (kept, Bits.of(kept)):
            assert torch.equal(part_of(as_stored(form), ours), local(ours).remainder(3) == 0)
        assert local(ours).numel() == 0 or start_of(ours) == int(local(ours).flatten()[0])


@pytest.mark.parametrize("most", [1 << 20, 4])
def test_a_part_is_pruned_and_restored_bit_for_bit(most):
    # plain, or packed and a few rows at a time
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
            fill_pruned({"": ours}, mask)
            assert torch.equal(ours.held, before.where(before.remainder(3) == 0, 0))
            ours.held[:1] = math.nan
            ZeroFill(part_of(as_stored(kept[""]), ours), ours)(ours)
            assert torch.equal(ours.held != 0, before.remainder(3) == 0)


@pytest.mark.parametrize(
    ("placements", "ndim"),
    [((Shard(1),), 1), ((Shard(0), Shard(0)), 2), ((Placement(0),), 1)],
    ids=["columns", "two dimensions", "not torch's own"],
)
def test_weights_that_are_not_sharded_by_rows_are_refused(placements, ndim):
    with pytest.raises(ValueError, match=r"shape \(4, 6\) is placed.*fully_shard.*prune on one device"):
        start_of(Distributed(torch.zeros(4, 6), 0, 2, placements, ndim))


def test_plain_weights_have_no_shards():
    net = nn.Linear(3, 2)
    assert Shards.of(dict(net.named_parameters())) is None
    reshard(net)
    assert local(net.weight) is net.weight
    assert start_of(net.weight) == 0


def test_a_real_sharded_weight_is_masked(tmp_path):
    tensors = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensors, "distribute_tensor"):
        pytest.skip("public since torch 2.5")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight, mesh = torch.arange(-6.0, 6.0).view(4, 3), init_device_mesh("cpu", (1,))
        sharded = tensors.distribute_tensor(weight.clone(), mesh, [tensors.Shard(0)])
        assert Mask.full({"w": sharded}) == Mask.full({"w": weight})
        assert Mask.of_nonzeros({"w": sharded}) == Mask.of_nonzeros({"w": weight})
        pruned = PrunedWeights(Mask({"w": weight > 0}), {"w": sharded}).weights["w"]
        assert torch.equal(local(pruned), weight.clamp(min=0))
        assert torch.equal(local(sharded), weight)
    finally:
        torch.distributed.destroy_process_group()
