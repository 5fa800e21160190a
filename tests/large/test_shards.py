"""Sharded weights: each process holds, fills and restores its own part of a weight and of a mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_roulette import Mask, PrunedWeights
from lightning_roulette.large.bits import Bits, as_stored
from lightning_roulette.large.limits import limited
from lightning_roulette.large.shards import Shards, is_sharded, local, part_of, reshard, start_of
from lightning_roulette.mask.mask import fill_pruned
from lightning_roulette.network.lending import applied
from lightning_roulette.network.zeros import ZeroFill


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
