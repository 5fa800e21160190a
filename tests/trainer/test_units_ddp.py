"""Two processes that remove neurons: the same ones on both, and those of one process with the same data."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from lightning_roulette import LeastSquares, Mask, Reduction, Tree, Wheel
from tests.support.isolated import ON_ALL
from tests.support.modules import Blobs, trained
from tests.support.results import equal
from tests.support.runs import assert_same_winners, train_with_search
from tests.support.together import two_processes

pytestmark = pytest.mark.slow

NEURON = {"wheel": Wheel(unit="neuron"), "validation": ON_ALL}
# Batches of calibration are those of training, which each process draws on its own: one process has other ones.
RUNS = {
    "not refitted": NEURON | {"refit": None},
    "refitted": NEURON | {"refit": LeastSquares(batches=4)},
    "in seconds": NEURON | {"tree": Tree(0.2, target=Reduction(latency=0.4)), "tolerance": math.inf, "refit": None},
}


def fit(name: str, folder: Path, weights, **devices) -> dict:
    """One of the runs; what it found, in plain tensors and numbers. A learning rate of 0 leaves the weights."""
    module = Blobs(lr=0.0)
    _, found = train_with_search(module, weights, folder, RUNS[name], **devices)
    return found | {"weights": module.state_dict(), "rank": module.global_rank}


def main(folder: Path) -> None:
    """What each of the processes does, which Lightning starts by running this file again."""
    torch.set_num_threads(1)
    weights = torch.load(folder / "trained.pt", weights_only=True)
    found = {name: fit(name, folder / name, weights, strategy="ddp", devices=2) for name in RUNS}
    torch.save(found, folder / f"rank{found['refitted']['rank']}.pt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    pytest.importorskip("torch_pruning")
    return trained(Blobs(lr=0.01), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def ranks(dense, tmp_path_factory):
    """What the two processes found in each run."""
    return two_processes(__file__, tmp_path_factory.mktemp("ddp"), dense)


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_lose_the_same_neurons_whole_and_report_the_same(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert equal(first["weights"], second["weights"])
    assert (first["report"], first["path"]) == (second["report"], second["path"])
    mask = Mask(first["mask"])
    assert mask == Mask(second["mask"])
    left = mask["net.0.weight"].any(1)
    assert torch.equal(mask["net.0.weight"], left[:, None].expand(24, 16))
    assert torch.equal(mask["net.2.weight"], left.expand(10, 24))
    assert int(left.sum()) == first["report"]["levels"][-1]["units"] < first["report"]["units"] == 24


def test_two_processes_find_the_neurons_of_one(ranks, dense, tmp_path):
    alone, both = fit("not refitted", tmp_path, dense, devices=1), ranks[0]["not refitted"]
    assert Mask(both["mask"]) == Mask(alone["mask"])
    assert_same_winners(alone["report"], both["report"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
