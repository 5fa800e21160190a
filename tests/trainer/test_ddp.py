"""Two processes: the same mask on both, and the winner of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy

from lightning_roulette import HoldZeros, Mask, prunable_parameters
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, trained
from tests.support.processes import train_with_zeros
from tests.support.results import equal
from tests.support.runs import assert_same_winners, train_with_search
from tests.support.together import two_processes

pytestmark = pytest.mark.slow


class Synchronised(Blobs):
    """Logs one value for all processes, or each process its own."""

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
    "all data": ({"synchronised": True, "lr": 0.0}, {"validation": ON_ALL}),
    "synchronised": ({"synchronised": True, "lr": 0.0}, {}),
    "unsynchronised": ({"synchronised": False, "lr": 0.0}, {}),
    "at epoch": ({"synchronised": True, "lr": 0.01}, {"at_epoch": 1}),
}


def fit(name: str, folder: Path, weights, **devices) -> dict:
    """One of the runs; what it found, in plain tensors and numbers."""
    module_options, choices = RUNS[name]
    module = Synchronised(**module_options)
    _, found = train_with_search(module, weights, folder, choices, **devices)
    return found | {"weights": module.state_dict(), "rank": module.global_rank}


REDUCTIONS = ("mean", "views of buckets")  # Lightning registers other reductions on CUDA alone


def hold(name: str, folder: Path, weights) -> dict:
    """Train in two processes with held zeros."""
    module = Synchronised(synchronised=True, lr=0.01)
    module.load_state_dict(weights)
    shapes = {name: one.shape for name, one in prunable_parameters(module).items()}
    mask = Mask({name: torch.ones(shape).nonzero().sum(1).reshape(shape) % 3 == 0 for name, shape in shapes.items()})
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
    return trained(Synchronised(synchronised=True, lr=0.01), tmp_path_factory.mktemp("dense"))


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
    assert equal(first["weights"], second["weights"])
    assert (first["report"], first["path"]) == (second["report"], second["path"])


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_of_both_ranks_and_of_the_file_have_the_zeros(ranks, name):
    stored = torch.load(ranks[0][name]["path"], weights_only=True)["state_dict"]
    for weights in (ranks[0][name]["weights"], ranks[1][name]["weights"], stored):
        assert all(torch.equal(weights[weight] != 0, kept) for weight, kept in ranks[0][name]["mask"].items())


def test_two_processes_find_the_winner_of_one_where_the_metric_is_synchronised(ranks, dense, tmp_path):
    alone, both = fit("all data", tmp_path, dense, devices=1), ranks[0]["all data"]
    assert Mask(both["mask"]) == Mask(alone["mask"])
    assert_same_winners(alone["report"], both["report"])


def test_a_synchronised_metric_brings_no_warning(ranks):
    assert [rank["synchronised"]["warnings"] for rank in ranks] == [[], []]


def test_processes_that_log_different_values_are_told_so_once(ranks):
    (said,) = [one for rank in ranks for one in rank["unsynchronised"]["warnings"]]
    assert "different values of the metric" in said
    assert "Log it with sync_dist=True" in said


def test_training_that_follows_the_search_is_measured_the_same_on_both_ranks(ranks):
    scores = [rank["at epoch"]["report"]["trained_score"] for rank in ranks]
    assert scores[0] == scores[1] is not None


@pytest.mark.parametrize("name", REDUCTIONS)
def test_held_zeros_are_the_same_on_both_ranks(ranks, dense, name):
    first, second = (rank[f"held, {name}"] for rank in ranks)
    assert first["steps"] == second["steps"] == 4
    assert equal(first["weights"], second["weights"])
    for weight, kept in first["mask"].items():
        assert torch.equal(first["weights"][weight] != 0, kept)
        assert (first["weights"][weight] != dense[weight])[kept].all()
    for rank in (first, second):
        assert rank["weight"] == rank["memory"] == rank["gradient"] == 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
