"""What worker processes find comes back to the callback of the process that started them; copies go their own way."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_roulette import Mask, RouletteWheelPruning, Tree, prunable_parameters, sparsity
from lightning_roulette.report.records import StopReason
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from lightning_roulette.trainer.spawned import Handover
from tests.support.failing import Fails, counting
from tests.support.modules import Blobs, blobs, train_loader, val_loader

ROOT = Path(__file__).parents[2]


def pruner(**options) -> RouletteWheelPruning:
    return RouletteWheelPruning(**{"branches": 2, "tolerance": 0.2, "tree": Tree(0.2, max_levels=2)} | options)


def note(evaluator) -> None:
    """How many candidates there were in a process, in a file."""
    module = evaluator._module
    (module.folder / f"judged{evaluator._trainer.global_rank}").write_text(str(module.judged))


def fit(folder: Path, strategy: str, pruning, module, ckpt_path=None, **options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [pruning, ModelCheckpoint(folder, save_top_k=-1)]
    options = {"accelerator": "cpu", "devices": 2, "max_epochs": 2, "default_root_dir": folder, **quiet} | options
    trainer = Trainer(strategy=strategy, callbacks=callbacks, **options)
    loader = torch.utils.data.DataLoader(blobs(400, 1), batch_size=25)
    trainer.fit(module, loader, val_loader(25), ckpt_path=ckpt_path)
    return trainer


def found(pruning, module) -> dict:
    """What the main process has; nothing of it but by the public names."""
    zeros = {name: weight.detach() != 0 for name, weight in prunable_parameters(module).items()}
    report = None if pruning.report is None else pruning.report.to_dict() | {"seconds": None}
    mask = None if pruning.mask is None else dict(pruning.mask)
    return {"report": report, "mask": mask, "zeros": zeros, "path": pruning.best_model_path}


def spawned(folder: Path) -> dict:
    """A fit, a copy made before and one made after it, and a second fit with the same callback."""
    pruning, module = pruner(refit=None), Blobs()
    before = copy.deepcopy(pruning)
    fit(folder, "ddp_spawn", pruning, module)
    sent = pickle.loads(pickle.dumps(pruning))  # before anybody asks
    after, first = copy.deepcopy(pruning), found(pruning, module)
    try:
        pruning.weights_at(1)
        said = ""
    except RuntimeError as error:
        said = str(error)
    sparsities = [sparsity(pruning.mask_at(level)) for level in range(3)]
    fit(folder / "second", "ddp_fork", pruning, module)
    return {
        "first": first,
        "second": found(pruning, module),
        "before": before.report is None and before.mask is None,
        "copies": [found(one, module)["report"] == first["report"] for one in (after, sent)],
        "said": said,
        "sparsities": sparsities,
    }


def cut_short(folder: Path) -> dict:
    """A search that fails in both processes, is resumed, and is compared with one that did not fail."""
    TrainerEvaluator._as = counting(note)
    results = {}
    for name, at, ckpt_path in (("whole", None, False), ("cut", 6, False), ("resumed", None, True)):
        pruning, module = pruner(refit=None), Fails()
        module.folder, module.at = folder, at
        place = folder / ("whole" if name == "whole" else "cut")
        path = max(place.glob("epoch=*.ckpt")) if ckpt_path else None
        try:
            fit(place, "ddp_fork", pruning, module, path)
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    left = [path.name for path in place.rglob("lightning_roulette*")]
    return torch.load(folder / "results.pt", weights_only=True) | {"left": left}


@pytest.mark.slow
def test_the_main_process_gets_report_mask_and_path_back(results):
    first = results["spawned"]["first"]
    stored = torch.load(first["path"], weights_only=True)
    state = stored["callbacks"]["RouletteWheelPruning"]
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
    assert second["report"] | {"trained_score": None} == first["report"]
    assert Mask(second["mask"]) == Mask(second["zeros"]) == Mask(first["mask"])
    assert second["path"] != first["path"]


@pytest.mark.slow
def test_a_search_that_failed_in_several_processes_is_taken_up_by_all_of_them(results):
    whole, cut, resumed = (results["cut short"][name] for name in ("whole", "cut", "resumed"))
    assert cut["report"]["stop_reason"] == "FAILED"
    assert (cut["mask"], cut["judged"], cut["journals"]) == (None, [5, 5], 1)
    assert resumed["report"] == whole["report"]
    assert Mask(resumed["mask"]) == Mask(whole["mask"])
    assert all(torch.equal(whole["weights"][name], value) for name, value in resumed["weights"].items())
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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_reads_what_its_own_workers_write_and_nothing_else(copied):
    original = Handover()
    other = copied(original)
    pickle.loads(pickle.dumps(other)).send({"report": 2})
    assert original.received() is None
    assert other.received() == {"report": 2}


@pytest.mark.parametrize("copied", [lambda one: one, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
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


def test_a_single_process_hands_nothing_over(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pruning = pruner(refit=None)
    make_trainer(callbacks=[pruning]).fit(Blobs(), train_loader(), val_loader())
    assert pruning.report is not None
    assert list(tmp_path.iterdir()) == []


def test_the_report_of_cuts_that_a_worker_did_not_finish_says_so(make_trainer):
    original = pruner(at_epoch=[1, 2, 3], tolerance=1.0, refit=None)
    worker = pickle.loads(pickle.dumps(original))
    trainer = make_trainer(callbacks=[worker], max_epochs=4)
    trainer.fit(Blobs(), train_loader(), val_loader())
    found = worker.state_dict()
    found["gradual"]["over"] = False
    worker._handover.send({**found, "report": found["report"] | {"stop_reason": None}})
    original.on_exception(trainer, None, RuntimeError())
    assert original.report.stop_reason is StopReason.BROKEN_OFF
    assert original.report.levels == worker.report.levels


if __name__ == "__main__":
    main(Path(sys.argv[1]))
