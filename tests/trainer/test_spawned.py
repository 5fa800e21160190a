"""What worker processes find comes back to the callback of the process that started them; copies go their own way."""

from __future__ import annotations

import math
import os
import pickle
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette import Mask, StopReason, Tree, sparsity
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from lightning_roulette.trainer.spawned import Handover
from tests.support import fits
from tests.support.copies import COPIES
from tests.support.failing import Fails, counting
from tests.support.modules import Blobs, blobs, val_loader
from tests.support.processes import QUIET
from tests.support.results import equal, load, nonzeros, told
from tests.support.runs import run_script

pruner = partial(fits.pruner, tree=Tree(0.2, max_levels=2))


def note(evaluator) -> None:
    """How many candidates there were in a process, in a file."""
    module = evaluator._module
    (module.folder / f"judged{evaluator._trainer.global_rank}").write_text(str(module.judged))


def fit_in_two(folder: Path, strategy: str, pruning, module, ckpt_path=None) -> None:
    options = QUIET | {"enable_checkpointing": True, "callbacks": [pruning, ModelCheckpoint(folder, save_top_k=-1)]}
    trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=2, default_root_dir=folder, **options)
    loader = torch.utils.data.DataLoader(blobs(400, 1), batch_size=25)
    trainer.fit(module, loader, val_loader(25), ckpt_path=ckpt_path)


def found(pruning, module) -> dict:
    """What the main process has; nothing of it but by the public names."""
    mask = None if pruning.mask is None else dict(pruning.mask)
    return {"report": told(pruning), "mask": mask, "zeros": dict(nonzeros(module)), "path": pruning.best_model_path}


def spawned(folder: Path) -> dict:
    """A fit, a copy made before and one made after it, and a second fit with the same callback."""
    pruning, module = pruner(), Blobs()
    before = COPIES["deepcopy"](pruning)
    fit_in_two(folder, "ddp_spawn", pruning, module)
    sent = COPIES["pickle"](pruning)  # before anybody asks
    after, first = COPIES["deepcopy"](pruning), found(pruning, module)
    with pytest.raises(RuntimeError) as said:
        pruning.weights_at(1)
    sparsities = [sparsity(pruning.mask_at(level)) for level in range(3)]
    fit_in_two(folder / "second", "ddp_fork", pruning, module)
    return {
        "first": first,
        "second": found(pruning, module),
        "before": before.report is None and before.mask is None,
        "copies": [found(one, module)["report"] == first["report"] for one in (after, sent)],
        "said": str(said.value),
        "sparsities": sparsities,
    }


def cut_short(folder: Path) -> dict:
    """A search that fails in both processes, is resumed, and is compared with one that did not fail."""
    TrainerEvaluator._as = counting(note)
    results = {}
    for name, place, at in (("whole", "whole", None), ("cut", "cut", 6), ("resumed", "cut", None)):
        pruning, module, place = pruner(), Fails(at), folder / place
        module.folder = folder
        path = max(place.glob("epoch=*.ckpt")) if name == "resumed" else None
        try:
            fit_in_two(place, "ddp_fork", pruning, module, path)
        except torch.multiprocessing.ProcessRaisedException as error:
            assert "power cut" in str(error)  # noqa: PT017
        results[name] = found(pruning, module) | {
            "judged": [int((folder / f"judged{rank}").read_text()) for rank in (0, 1)],
            "journals": len(list(place.glob("search*"))),
            "weights": module.state_dict(),
        }
    return results


def main(folder: Path) -> None:
    """What the tests look at."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {"spawned": spawned(folder / "spawned"), "cut short": cut_short(folder)}
    results["warnings"] = [str(one.message) for one in caught if "RouletteWheelPruning" in str(one.message)]
    torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All of it, from a process of its own: one that may start others."""
    folder, place = tmp_path_factory.mktemp("handover"), tmp_path_factory.mktemp("temporary")
    run_script(__file__, folder, TMPDIR=place)
    left = [path.name for path in place.rglob("lightning_roulette*")]
    return torch.load(folder / "results.pt", weights_only=True) | {"left": left}


@pytest.mark.slow
def test_the_main_process_gets_report_mask_and_path_back(results):
    first = results["spawned"]["first"]
    state = load(first["path"])["callbacks"]["RouletteWheelPruning"]
    assert Mask(first["mask"]) == Mask(first["zeros"]) == Mask.load(first["path"])
    assert Mask(first["mask"]).sparsity == pytest.approx(0.36, abs=0.01)
    assert first["report"] == state["report"] | {"seconds": None}
    assert first["report"]["score"] is not None
    assert results["spawned"]["sparsities"] == pytest.approx([0, 0.2, 0.36], abs=0.01)


@pytest.mark.slow
def test_there_is_nothing_to_warn_of(results):
    assert [one for one in results["warnings"] if "did not end" not in one] == []


@pytest.mark.slow
def test_weights_of_a_level_stayed_in_the_worker_and_that_is_said(results):
    assert "it searched in another process" in results["spawned"]["said"]


@pytest.mark.slow
def test_copies_of_the_callback_have_what_it_had(results):
    assert results["spawned"]["before"]
    assert results["spawned"]["copies"] == [True, True]


@pytest.mark.slow
def test_a_second_fit_in_workers_holds_the_zeros_and_does_not_search_again(results):
    first, second = results["spawned"]["first"], results["spawned"]["second"]
    assert second["report"]["trained_score"] is not None
    before = first["report"]
    assert second["report"] | {"trained_score": None, "footprint": before["footprint"]} == before
    assert Mask(second["mask"]) == Mask(second["zeros"]) == Mask(first["mask"])
    assert second["path"] != first["path"]


@pytest.mark.slow
def test_a_search_that_failed_in_several_processes_is_taken_up_by_all_of_them(results):
    whole, cut, resumed = (results["cut short"][name] for name in ("whole", "cut", "resumed"))
    assert cut["report"]["stop_reason"] == "FAILED"
    assert (cut["mask"], cut["judged"], cut["journals"]) == (None, [5, 5], 1)
    assert resumed["report"] == whole["report"]
    assert Mask(resumed["mask"]) == Mask(whole["mask"])
    assert equal(resumed["weights"], whole["weights"])
    assert [once + 5 for once in resumed["judged"]] == whole["judged"]
    assert resumed["journals"] == 0


@pytest.mark.slow
def test_no_file_of_the_way_back_is_left(results):
    assert results["left"] == []


# ---- one end of the way


def test_what_a_pickled_copy_writes_the_original_reads_once():
    original = Handover()
    worker = pickle.loads(pickle.dumps(original))
    assert original.received() is None
    worker.send({"report": 1})
    assert worker.received() is None
    assert original.received() == {"report": 1}
    assert original.received() is None


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_reads_what_its_own_workers_write_and_nothing_else(copied):
    original = Handover()
    other = copied(original)
    pickle.loads(pickle.dumps(other)).send({"report": 2})
    assert original.received() is None
    assert other.received() == {"report": 2}


@pytest.mark.parametrize("copied", [lambda one: one, *COPIES.values()], ids=["itself", *COPIES])
def test_what_a_forked_process_writes_is_read_by_the_one_that_forked_it(copied):
    original = Handover()
    other = copied(original)
    if (child := os.fork()) == 0:
        other.send({"report": 4})
        os._exit(0 if other.received() is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert other.received() == {"report": 4}
    assert original.received() is None


def test_what_was_never_read_goes_with_the_one_that_would_have():
    original = Handover()
    pickle.loads(pickle.dumps(original)).send({"report": 3})
    (left,) = Path(tempfile.gettempdir()).glob(f"{Path(original._inbox).name}*")
    del original
    assert not left.exists()


def test_a_single_process_hands_nothing_over(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pruning = pruner()
    fit(pruning)
    assert pruning.report is not None
    assert list(tmp_path.iterdir()) == []


def test_the_report_of_cuts_that_a_worker_did_not_finish_says_so(fit):
    original = pruner(at_epoch=[1, 2, 3], tolerance=math.inf)
    worker = pickle.loads(pickle.dumps(original))
    trainer = fit(worker, max_epochs=4).trainer
    found = worker.state_dict()
    found["gradual"]["over"] = False
    worker._handover.send({**found, "report": found["report"] | {"stop_reason": None}})
    original.on_exception(trainer, None, RuntimeError())
    assert original.report.stop_reason is StopReason.BROKEN_OFF
    assert original.report.levels == worker.report.levels


if __name__ == "__main__":
    main(Path(sys.argv[1]))
