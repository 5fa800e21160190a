"""Two processes that hold half of each weight: the mask of one device, zeros that stay, files that load anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard

from lightning_roulette import HoldZeros, Mask, RouletteWheelPruning, Wheel
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, dense_net, train_loader, trained, val_loader
from tests.support.processes import QUIET, full_of, train_with_zeros
from tests.support.results import equal
from tests.support.runs import assert_same_winners, train_with_search
from tests.support.together import two_processes

pytestmark = pytest.mark.slow


class Uneven(Blobs):
    """Three layers, of which two cannot be halved; one layer alone is sharded apart from the outermost module."""

    def __init__(self, lr: float, stops: int | None = None, talks: bool = False) -> None:
        super().__init__(lr)
        self.net = dense_net(16, 25, 11, 10)
        self.sharded = False
        self.steps, self.stops = 0, stops  # of validation; in the last one the power fails
        self.talks = talks  # to the other process, in each step

    def validation_step(self, batch, batch_idx):
        self.steps += 1
        if self.steps == self.stops:
            raise ConnectionError("no power")
        if self.talks and self.trainer.world_size > 1:
            torch.distributed.all_reduce(batch[0].clone())
        super().validation_step(batch, batch_idx)

    def configure_model(self):
        if not self.sharded and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.sharded = True


# A learning rate of 0 leaves the given weights, however many processes train them.
# Each process deals its own part of the data to folds: only all of it is the same, however many there are.
RUNS = {
    "at the end": (0.0, {"validation": ON_ALL}),
    "each layer": (0.0, {"validation": ON_ALL, "wheel": Wheel(scope="layer")}),
    "leaning": (0.0, {"validation": ON_ALL, "wheel": Wheel(4, allocation=0.3)}),
    "at epoch": (0.01, {"at_epoch": 1, "refit": "auto"}),
    "refitted": (0.0, {"validation": ON_ALL, "refit": "auto", "wheel": Wheel(importance="magnitude")}),
}
ALONE = ("at the end", "each layer", "leaning")  # found by one process too
REFITTED = "refitted"
IN_PARTS = "leaning"  # the run whose files are distributed checkpoints


def by_rows(*, whole_files: bool) -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole_files)


def fit(name: str, folder: Path, weights, stops: int | None = None, **options) -> dict:
    """One of the runs; what it found, in plain tensors and numbers."""
    lr, choices = RUNS[name]
    module = Uneven(lr, stops, talks=name == "at epoch")
    pruning, found = train_with_search(module, weights, folder, {"refit": None, **choices}, **options)
    return found | {
        "masks": [dict(pruning.mask_at(level)) for level in range(len(pruning.report.accepted) + 1)],
        "weights": whole(module),
        "steps": module.steps,
        "level 1": {name: full_of(one) for name, one in pruning.weights_at(1).items()},
    }


def whole(module) -> dict[str, torch.Tensor]:
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {name: full_of(one) for name, one in module.named_parameters()}


def hold(folder: Path, path: str) -> dict:
    """Train on from a pruned file, with the zeros that are found in it."""
    module, holding = Uneven(0.01), HoldZeros()
    stored = torch.load(path, weights_only=True)["state_dict"]
    module.load_state_dict(stored)
    seen = train_with_zeros(module, holding, Mask.load(path), folder, by_rows(whole_files=True))
    return seen | {"mask": dict(holding.held()), "weights": whole(module), "before": stored}


def resumed(folder: Path, weights, stops: int) -> dict:
    """A run that fails and is started again, and what is in the file that it leaves when it fails."""

    def again(stops: int | None) -> dict:
        return fit(REFITTED, folder, weights, stops, devices=2, strategy=by_rows(whole_files=True))

    with pytest.raises(ConnectionError, match="no power"):
        again(stops)
    torch.distributed.barrier()
    left = folder / "interrupted.pt"
    stored = {"left": torch.load(left, weights_only=True)["weights"], "mask left": dict(Mask.load(left))}
    return again(None) | stored


def main(folder: Path) -> None:
    """What each of the processes does, which Lightning starts by running this file again."""
    torch.set_num_threads(1)
    weights = torch.load(folder / "trained.pt", weights_only=True)
    found = {}
    for name in RUNS:
        strategy = by_rows(whole_files=name != IN_PARTS)
        found[name] = fit(name, folder / name, weights, devices=2, strategy=strategy)
    found["resumed"] = resumed(folder / "resumed", weights, found[REFITTED]["steps"] * 3 // 4)
    found["held"] = hold(folder, found["at the end"]["path"])
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return trained(Uneven(0.01), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def ranks(dense, tmp_path_factory):
    """What the two processes found in each run."""
    return two_processes(__file__, tmp_path_factory.mktemp("sharded"), dense)


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_have_the_same_mask_of_the_whole_network_and_the_same_report(ranks, dense, name):
    first, second = (rank[name] for rank in ranks)
    assert Mask(first["mask"]) == Mask(second["mask"])
    shapes = {weight: dense[weight].shape for weight in ("net.0.weight", "net.2.weight", "net.4.weight")}
    assert {weight: kept.shape for weight, kept in first["mask"].items()} == shapes
    assert 0.1 < Mask(first["mask"]).sparsity < 0.9
    assert first["report"] == second["report"]


@pytest.mark.parametrize("name", ALONE)
def test_they_find_what_one_process_with_whole_weights_finds(ranks, dense, tmp_path, name):
    alone, both = fit(name, tmp_path, dense, devices=1), ranks[0][name]
    assert len(both["masks"]) == 4
    assert [Mask(one) for one in both["masks"]] == [Mask(one) for one in alone["masks"]]
    assert equal(both["weights"], alone["weights"])
    assert equal(both["level 1"], alone["level 1"])
    assert_same_winners(alone["report"], both["report"])


def test_a_refit_is_that_of_one_process_up_to_rounding(ranks, dense, tmp_path):
    alone, (both, other) = fit(REFITTED, tmp_path, dense, devices=1), (rank[REFITTED] for rank in ranks)
    assert [Mask(one) for one in both["masks"]] == [Mask(one) for one in alone["masks"]]
    assert len(both["masks"]) == 4
    for what in ("weights", "level 1"):
        assert all(torch.allclose(one, alone[what][name], atol=1e-5) for name, one in both[what].items())
        assert equal(both[what], other[what])
    assert_same_winners(alone["report"], both["report"])
    assert both["report"]["refit"].startswith("survivors by least squares")
    kept = both["mask"]["net.2.weight"]
    assert float((both["weights"]["net.2.weight"] - dense["net.2.weight"])[kept].abs().max()) > 0.01


def test_the_report_says_why_importance_is_the_magnitude(ranks):
    why = "magnitude, as weights are sharded over processes"
    assert [rank["at epoch"]["report"]["importance"] for rank in ranks] == [why, why]
    assert ranks[0]["at the end"]["report"]["importance"] == "magnitude"


def test_a_search_that_fails_leaves_refitted_weights_and_is_resumed(ranks):
    for found in (rank["resumed"] for rank in ranks):
        assert Mask(found["mask"]) == Mask(ranks[0][REFITTED]["mask"])
        assert equal(found["weights"], ranks[0][REFITTED]["weights"])
        assert found["steps"] < 0.75 * ranks[0][REFITTED]["steps"]
        assert found["left"].keys() == found["level 1"].keys()
        assert all(torch.equal(found["left"][weight] != 0, kept) for weight, kept in found["mask left"].items())


@pytest.mark.parametrize("name", [name for name in RUNS if name != IN_PARTS])
def test_the_file_loads_into_the_plain_module_with_the_zeros(ranks, name):
    module, found = Uneven(0.0), ranks[0][name]
    stored = torch.load(found["path"], weights_only=True)
    module.load_state_dict(stored["state_dict"])
    assert all(torch.equal(value, found["weights"][weight]) for weight, value in module.named_parameters())
    assert all(torch.equal(module.get_parameter(weight) != 0, kept) for weight, kept in found["mask"].items())
    assert Mask.load(found["path"]) == Mask(found["mask"])


def test_a_distributed_checkpoint_has_mask_and_zeros(ranks, tmp_path):
    found = ranks[0][IN_PARTS]
    assert Mask.load(found["path"]) == Mask(found["mask"])
    dcp_to_torch_save(found["path"], tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(stored[weight] != 0, kept) for weight, kept in found["mask"].items())


def test_one_process_resumes_from_the_file_and_holds_the_zeros(ranks, tmp_path):
    found, module = ranks[0]["at epoch"], Uneven(0.01)
    pruning = RouletteWheelPruning(3, at_epoch=1, refit=None, dirpath=tmp_path)
    options = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "callbacks": [pruning], **QUIET}
    Trainer(max_epochs=3, **options).fit(module, train_loader(), val_loader(), ckpt_path=found["path"])
    assert pruning.mask == Mask(found["mask"])
    assert all(torch.equal(module.get_parameter(weight) != 0, kept) for weight, kept in found["mask"].items())


def share_moved(after, before, kept) -> float:
    """How many of the weights that are kept were trained: some lead to a unit that is never active."""
    return float((after != before)[kept].float().mean())


def test_training_that_follows_a_search_holds_the_zeros(ranks, dense):
    found = ranks[0]["at epoch"]
    assert found["report"]["trained_score"] is not None
    for weight, kept in found["mask"].items():
        assert torch.equal(found["weights"][weight] != 0, kept)
        assert share_moved(found["weights"][weight], dense[weight], kept) > 0.5


def test_zeros_of_a_pruned_file_are_found_and_held(ranks):
    first, second = (rank["held"] for rank in ranks)
    assert Mask(first["mask"]) == Mask(second["mask"]) == Mask(ranks[0]["at the end"]["mask"])
    assert first["gradient"] == first["memory"] == 0.0
    for weight, kept in first["mask"].items():
        assert torch.equal(first["weights"][weight] != 0, kept)
        assert share_moved(first["weights"][weight], first["before"][weight], kept) > 0.5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
