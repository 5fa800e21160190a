"""Killed at any moment and resumed in a new process: the run ends as the one that was not killed.

Run as a script, `python tests/trainer/test_killed.py FOLDER MOMENTS`, it kills that many runs and prints what became
of each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_roulette import LeastSquares, Tree
from lightning_roulette.judge.journal import Journal
from lightning_roulette.trainer.scores.trainer_evaluator import TrainerEvaluator
from tests.support.fits import pruner
from tests.support.modules import Blobs, blobs, val_loader
from tests.support.processes import QUIET
from tests.support.results import load
from tests.support.runs import run_script

RUNS = {
    "at the end": {"refit": LeastSquares(batches=4)},
    "at an epoch": {"at_epoch": 2},
    "certified": {"tolerance": 0.4, "confidence": 0.8},
}
MOMENTS = 6  # in the suite


class Moments(Callback):
    """Counts the moments of a run: steps, hooks, and what is written; at one of them the process is killed."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.count, self.search = folder, at, 0, (0, 0)

    def tick(self, *_) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, what: str) -> None:
        with open(self.folder / "events", "a") as file:
            file.write(f"{what}\n")

    def watch(self, trainer: Trainer) -> None:
        """Before and after each answer is noted, in the middle of its line, and around each file."""
        note, write, remove, lend = Journal.note, Journal._write, Journal.remove, TrainerEvaluator._as

        def ticking_write(journal, path, line):
            if self.count + 1 == self.at:
                write(journal, path, line[: len(line) // 2])
            self.tick()
            write(journal, path, line)

        def counting_lend(evaluator, candidate):
            if candidate.mask.survivors < candidate.mask.size:
                self.say("validated")
            return lend(evaluator, candidate)

        def ticking_remove(journal):
            self.search = (self.search[0], self.count)
            self.say("ended")
            self.around(remove)(journal)

        def ticking_note(journal, *arguments):
            self.search = (self.search[0] or self.count, 0)
            self.around(note)(journal, *arguments)

        Journal.note, Journal._write, Journal.remove = ticking_note, ticking_write, ticking_remove
        TrainerEvaluator._as = counting_lend
        trainer.save_checkpoint = self.around(trainer.save_checkpoint)

    def around(self, function):
        def ticking(*arguments, **options):
            self.tick()
            result = function(*arguments, **options)
            self.tick()
            return result

        return ticking

    on_train_start = on_train_batch_end = on_train_epoch_end = on_train_end = on_fit_end = tick


class Ticking(Blobs):
    """Steps of a validation are moments, those of candidates among them."""

    moments: Moments

    def validation_step(self, batch, batch_idx):
        self.moments.tick()
        super().validation_step(batch, batch_idx)


def run(folder: Path, name: str, at: int | None) -> None:
    """Fit from the last checkpoint, if there is one; what came out is written when all is done."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    moments, module = Moments(folder, at), Ticking()
    module.moments = moments
    pruning = pruner(tree=Tree(0.2, max_levels=2), **RUNS[name])
    callbacks = [pruning, ModelCheckpoint(folder / "epochs", save_top_k=-1), moments]
    options = QUIET | {"enable_checkpointing": True, "callbacks": callbacks}
    trainer = Trainer(accelerator="cpu", max_epochs=3, default_root_dir=folder, **options)
    moments.watch(trainer)
    data = blobs(200, 1)
    by_epoch = DistributedSampler(data, num_replicas=1, rank=0)  # an order that depends on the epoch alone
    loader = DataLoader(data, batch_size=50, sampler=by_epoch)
    trainer.fit(module, loader, val_loader(), ckpt_path=last_checkpoint(folder))
    result = {
        "weights": {key: value.tolist() for key, value in module.state_dict().items()},
        "file": {key: value.tolist() for key, value in load(pruning.best_model_path)["state_dict"].items()},
        "report": pruning.report.to_dict() | {"seconds": None},
        "journals": [path.name for path in folder.rglob("search*")],
        "moments": [(1, moments.count), moments.search],
    }
    (folder / "result.json").write_text(json.dumps(result))


def last_checkpoint(folder: Path) -> Path | None:
    """Of the last epoch that was trained to its end."""
    found = {int(re.findall(r"epoch=(\d+)", path.name)[0]): path for path in folder.glob("epochs/epoch=*.ckpt")}
    return found[max(found)] if found else None


def in_new_process(folder: Path, name: str, at: int | None = None, seconds: float | None = None) -> bool:
    """One run in a process of its own; whether it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=run, args=(folder, name, at))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def counted(folder: Path) -> tuple[int, bool]:
    """How often networks were validated, and whether the search ended, in all processes so far."""
    events = (folder / "events").read_text().split() if (folder / "events").exists() else []
    return events.count("validated"), "ended" in events


def main(folder: Path, moments: int) -> None:
    """Kill runs at random moments: in the search, anywhere, by the clock; every other once more when resumed."""
    chance, whole, seconds, told = random.Random(1), {}, {}, []
    for name in RUNS:
        began = time.monotonic()
        assert not in_new_process(folder / name, name)
        seconds[name] = time.monotonic() - began
        whole[name] = json.loads((folder / name / "result.json").read_text())
        whole[name]["validated"] = counted(folder / name)[0]
    for number in range(moments):
        name = list(RUNS)[number % len(RUNS)]
        anywhere, in_search = whole[name]["moments"]
        moments_of = {"at": chance.randint(*in_search)}, {"at": chance.randint(*anywhere)}
        by_clock = {"seconds": chance.random() * seconds[name]}
        moment = (*moments_of, by_clock)[chance.randrange(3) if number > 2 else number]
        place = folder / str(number)
        killed = in_new_process(place, name, **moment)
        ended, began = counted(place)[1], counted(place)[0] > 0
        from_file = last_checkpoint(place) is not None
        again = number % 2 and in_new_process(place, name, chance.randint(1, anywhere[1] // 2))
        ended |= counted(place)[1]
        if killed or again:
            assert not in_new_process(place, name)
        result = json.loads((place / "result.json").read_text())
        search = "ended" if ended else "begun" if began else "to come"
        differs = [key for key in ("weights", "file", "report") if result[key] != whole[name][key]]
        one = {"run": name, **moment, "kills": killed + again, "from a file": from_file, "search": search}
        one |= {"validated": counted(place)[0], "of": whole[name]["validated"]}
        told.append(one | {"differs": differs, "journals": result["journals"]})
    (folder / "told.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What became of each run."""
    folder = tmp_path_factory.mktemp("killed")
    run_script(__file__, folder, MOMENTS)
    return json.loads((folder / "told.json").read_text())


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_files_and_report_of_the_run_that_was_not(told):
    assert len(told) == MOMENTS
    assert sum(one["kills"] for one in told) > MOMENTS // 2  # the clock may come too late
    assert [one for one in told if one["differs"] or one["journals"]] == []


@pytest.mark.slow
def test_a_killed_search_does_not_repeat_its_validations(told):
    """But the one that was under way. Of a search that had ended nothing is kept: it may be made once more."""
    assert {"begun", "ended"} & {one["search"] for one in told}
    for one in told:
        if one["search"] != "ended":
            assert one["of"] <= one["validated"] <= one["of"] + one["kills"], one


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    for line in json.loads((Path(sys.argv[1]) / "told.json").read_text()):
        print(line)
