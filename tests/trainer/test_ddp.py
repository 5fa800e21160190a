"""Two processes: the same mask on both, and the winner of one process."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy

from lightning_roulette import HoldZeros, Mask, RouletteWheelPruning, Tree, Validation, prunable_parameters
from tests.support.modules import Blobs, train_loader, trained, val_loader
from tests.support.processes import QUIET, train_with_zeros
from tests.support.together import two_processes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Judged(Blobs):
    """Logs one value for all processes, or each its own."""

    def __init__(self, *, synchronised: bool, lr: float) -> None:
        super().__init__(lr)
        self.synchronised = synchronised

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        if self.synchronised:
            self.val_acc(scores, batch[1])
            self.log("val_acc", self.val_acc)
        else:
            self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", cross_entropy(scores, batch[1]), sync_dist=self.synchronised)


# A learning rate of 0 leaves the given weights, however many processes train them.
# Each process deals its own part of the data to folds: only all of it is the same, however many there are.
RUNS = {
    "all data": ({"synchronised": True, "lr": 0.0}, {"validation": Validation(confirm=0, race=False)}),
    "synchronised": ({"synchronised": True, "lr": 0.0}, {}),
    "unsynchronised": ({"synchronised": False, "lr": 0.0}, {}),
    "at epoch": ({"synchronised": True, "lr": 0.01}, {"at_epoch": 1}),
}


def fit(name: str, folder: Path, weights, **devices) -> dict:
    """One of the runs; what it found, in plain tensors and numbers."""
    module_options, pruning_options = RUNS[name]
    module = Judged(**module_options)
    module.load_state_dict(weights)
    pruning = RouletteWheelPruning(3, tolerance=0.1, tree=Tree(0.2, max_levels=3), dirpath=folder, **pruning_options)
    trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=folder, callbacks=[pruning], **devices, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train_loader(), val_loader(batch_size=25))
    return {
        "mask": dict(pruning.mask),
        "weights": module.state_dict(),
        "report": pruning.report.to_dict() | {"seconds": None},
        "path": pruning.best_model_path,
        "warnings": [str(one.message) for one in caught if "RouletteWheelPruning" in str(one.message)],
        "rank": trainer.global_rank,
    }


def _board(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows)[:, None] + torch.arange(columns)


REDUCTIONS = ("mean", "views of buckets")  # Lightning registers other reductions on CUDA alone


def hold(name: str, folder: Path, weights) -> dict:
    """Train in two processes with held zeros."""
    module = Judged(synchronised=True, lr=0.01)
    module.load_state_dict(weights)
    mask = Mask({name: _board(*one.shape) % 3 == 0 for name, one in prunable_parameters(module).items()})
    strategy = DDPStrategy(gradient_as_bucket_view=name == "views of buckets")
    found = train_with_zeros(module, HoldZeros(mask), mask, folder, strategy)
    return found | {"weights": module.state_dict()}


def main(folder: Path) -> None:
    """What each of the processes does, which Lightning starts by running this file again."""
    torch.set_num_threads(1)
    weights = torch.load(folder / "trained.pt", weights_only=True)
    found = {name: fit(name, folder / name, weights, strategy="ddp", devices=2) for name in RUNS}
    found |= {f"held, {name}": hold(name, folder, weights) for name in REDUCTIONS}
    torch.save(found, folder / f"rank{found['at epoch']['rank']}.pt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return trained(Judged(synchronised=True, lr=0.01), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def ranks(dense, tmp_path_factory):
    """What the two processes found in each run."""
    return two_processes(__file__, tmp_path_factory.mktemp("ddp"), dense)


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_have_the_same_mask_weights_and_report(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert Mask(first["mask"]) == Mask(second["mask"])
    assert 0.1 < Mask(first["mask"]).sparsity < 0.9
    assert all(torch.equal(value, second["weights"][weight]) for weight, value in first["weights"].items())
    assert first["report"] == second["report"]
    assert first["path"] == second["path"]


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_of_both_ranks_and_of_the_file_have_the_zeros(ranks, name):
    stored = torch.load(ranks[0][name]["path"], weights_only=True)["state_dict"]
    for weights in (ranks[0][name]["weights"], ranks[1][name]["weights"], stored):
        assert all(torch.equal(weights[weight] != 0, kept) for weight, kept in ranks[0][name]["mask"].items())


def test_two_processes_find_the_winner_of_one_where_the_metric_is_synchronised(ranks, dense, tmp_path):
    alone, both = fit("all data", tmp_path, dense, devices=1), ranks[0]["all data"]
    assert Mask(both["mask"]) == Mask(alone["mask"])
    for one, two in zip(alone["report"]["levels"], both["report"]["levels"], strict=True):
        assert one["winner"] == two["winner"]
        scores = [[candidate["score"] for candidate in level["candidates"]] for level in (one, two)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert both["report"]["score"] == pytest.approx(alone["report"]["score"], abs=1e-6)
    assert any(len({one["rank"] for one in level["candidates"]}) > 1 for level in alone["report"]["levels"])


def test_a_synchronised_metric_brings_no_warning(ranks):
    assert [rank["synchronised"]["warnings"] for rank in ranks] == [[], []]


def test_processes_that_log_different_values_are_told_so_once(ranks):
    told = [one for rank in ranks for one in rank["unsynchronised"]["warnings"]]
    assert [one for one in told if "different values of the metric" not in one] == []
    assert len(told) == 1
    assert "Log it with sync_dist=True" in told[0]


def test_training_that_follows_the_search_is_measured_the_same_on_both_ranks(ranks):
    scores = [rank["at epoch"]["report"]["trained_score"] for rank in ranks]
    assert scores[0] == scores[1] is not None


@pytest.mark.parametrize("name", REDUCTIONS)
def test_held_zeros_are_the_same_on_both_ranks(ranks, dense, name):
    first, second = (rank[f"held, {name}"] for rank in ranks)
    assert first["steps"] == second["steps"] == 4
    for one, other in zip(first["weights"].items(), second["weights"].items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    for weight, kept in first["mask"].items():
        assert torch.equal(first["weights"][weight] != 0, kept)
        assert (first["weights"][weight] != dense[weight])[kept].all()
    for rank in (first, second):
        assert rank["weight"] == rank["memory"] == rank["gradient"] == 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
