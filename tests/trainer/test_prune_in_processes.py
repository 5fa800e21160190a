"""`prune` in two processes, with whole and with sharded weights, and in processes that it starts itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_roulette import Mask, Tree, prune
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, dense_net, train_loader, trained, val_loader
from tests.support.processes import QUIET, full_of
from tests.support.results import nonzeros, told
from tests.support.runs import assert_same_winners, run_script
from tests.support.together import two_processes

pytestmark = pytest.mark.slow

HOW = {"branches": 3, "tolerance": 0.1, "tree": Tree(0.2, max_levels=3), "validation": ON_ALL}


class Sharded(Blobs):
    """Three layers, of which two cannot be halved. With FSDP2 they are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.sharded = dense_net(16, 25, 11, 10), False

    def configure_model(self):
        if not self.sharded and isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


def pruned(folder: Path, ckpt_path: Path, choices, **devices) -> dict:
    """What `prune` makes of a checkpoint, in plain tensors and numbers."""
    module = Sharded()
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, **QUIET, **devices)
    pruning = prune(trainer, module, train_loader(), val_loader(25), None, ckpt_path, dirpath=folder, **HOW, **choices)
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {
        "mask": None if pruning.mask is None else dict(pruning.mask),
        "report": told(pruning),
        "path": pruning.best_model_path,
        "weights": {name: full_of(one) for name, one in module.named_parameters()},
        "steps": trainer.global_step,
    }


RUNS = {"ddp": ({}, {"strategy": "ddp"}), "sharded": ({"refit": None}, {})}


def main(folder: Path) -> None:
    """What each of the processes does, which Lightning starts by running this file again."""
    torch.set_num_threads(1)
    found = {}
    for name, (choices, devices) in RUNS.items():
        strategy = {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)} | devices
        found[name] = pruned(folder / name, folder / "trained.pt", choices, devices=2, **strategy)
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


def spawn(folder: Path) -> None:
    """What a process does that starts two others."""
    devices = {"devices": 2, "strategy": "ddp_spawn", "callbacks": [EarlyStopping("val_loss")]}
    torch.save(pruned(folder, folder / "trained.pt", {}, **devices), folder / "results.pt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return trained(Sharded(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def ranks(dense, tmp_path_factory):
    """What the two processes found in each run."""
    return two_processes(__file__, tmp_path_factory.mktemp("ranks"), dense)


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_and_the_file_have_the_same_zeros(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert Mask(first["mask"]) == Mask(second["mask"])
    assert 0.1 < Mask(first["mask"]).sparsity < 0.9
    stored = torch.load(first["path"], weights_only=True)["state_dict"]
    for weights in (first["weights"], second["weights"], stored):
        assert all(torch.equal(weights[weight] != 0, kept) for weight, kept in first["mask"].items())
    assert (first["report"], first["steps"]) == (second["report"], second["steps"])
    assert first["steps"] == 0


def test_shards_are_pruned_as_whole_weights_are(ranks, dense, tmp_path):
    torch.save(dense, tmp_path / "trained.pt")
    alone, both = pruned(tmp_path, tmp_path / "trained.pt", {"refit": None}, devices=1), ranks[0]["sharded"]
    assert Mask(both["mask"]) == Mask(alone["mask"])
    assert all(torch.equal(one, alone["weights"][name]) for name, one in both["weights"].items())
    assert_same_winners(alone["report"], both["report"])


def test_started_processes_bring_back_the_pruned_network(dense, tmp_path):
    torch.save(dense, tmp_path / "trained.pt")
    run_script(__file__, tmp_path, "spawn")
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert 0.1 < Mask(found["mask"]).sparsity < 0.9
    assert all(torch.equal(found["weights"][weight] != 0, kept) for weight, kept in found["mask"].items())
    module = Sharded()
    module.load_state_dict(torch.load(found["path"], weights_only=True)["state_dict"])
    assert nonzeros(module) == Mask(found["mask"])


if __name__ == "__main__":
    (spawn if sys.argv[2:] else main)(Path(sys.argv[1]))
