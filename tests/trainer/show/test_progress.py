"""What a search shows while it runs: one line in the Trainer's bar, and what it says to the log."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
import threading
import time
from functools import partial

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from tqdm import tqdm

from lightning_roulette import LevelTime, RouletteWheelPruning, Tree, sparsity
from lightning_roulette.judge.race import rungs
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.show.bar import Line, ProgressLine, line_of
from lightning_roulette.trainer.show.display import Display
from lightning_roulette.trainer.show.log import log, speak_up
from lightning_roulette.trainer.show.show import Show
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from tests.support.callbacks import within
from tests.support.isolated import BY_DEFAULT, ON_ALL, judged_by, one_level
from tests.support.modules import Blobs

LEVELS = Tree(0.2, max_levels=2)
CHOICES = Choices.of(RouletteWheelPruning())
# How often a candidate of five is judged: once on all data, or in a race on half of the folds
JUDGED = [
    (ON_ALL, 5),
    (BY_DEFAULT, sum(rung.entrants * len(rung.parts) for rung in rungs(5, 8, 16, 4))),
]  # 4 folds of 200 make a batch of 64


def pruning(validation=BY_DEFAULT, **options):
    return RouletteWheelPruning(5, tolerance=math.inf, tree=LEVELS, refit=None, validation=validation, **options)


@pytest.fixture
def fit(fit):
    """As `fit`, with a progress bar; so do `at_hook` and `at_end`."""
    return partial(fit, enable_progress_bar=True)


def frames(text):
    """What a bar showed, frame after frame."""
    return [frame.strip() for frame in re.split(r"\r|\n|\x1b\[A", text) if frame.strip()]


@pytest.fixture
def terminal(capsys, monkeypatch):
    """The standard output, as `capsys` records it, is a terminal."""
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda _: True)
    return capsys


# ---- TQDM


@pytest.mark.parametrize(("validation", "judged"), JUDGED)
def test_tqdm_shows_one_line_and_no_validation_of_a_candidate(fit, terminal, validation, judged):
    fit(TQDMProgressBar())
    plain = frames(terminal.readouterr().out)
    fit(TQDMProgressBar(), pruning(validation))
    searched = frames(terminal.readouterr().out)

    def validating(shown):
        return sum(frame.startswith("Validation DataLoader") for frame in shown)

    assert validating(searched) == validating(plain) > 0
    ours = [frame for frame in searched if frame.startswith("Pruning")]
    for level in (1, 2):
        assert any(f"level {level}" in frame and "best" in frame and f" {judged}/{judged}" in frame for frame in ours)


def test_tqdm_draws_nothing_into_a_file_or_a_pipe(fit, capsys):
    assert not sys.stdout.isatty()
    fit(TQDMProgressBar(), pruning())
    assert not [frame for frame in frames(capsys.readouterr().out) if frame.startswith("Pruning")]


@pytest.mark.usefixtures("terminal")
def test_tqdm_measures_the_speed_of_this_level_alone_and_draws_ten_times_a_second(at_end):
    def look(trainer, module):
        now, drawn, line = [time.time()], [], line_of(trainer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(line._line, "_time", lambda: now[0])
            patch.setattr("time.time", lambda: now[0])
            patch.setattr(line._line, "display", lambda *_, **__: drawn.append(line._line.n))
            for seconds in (0.5, 0.01):  # of each candidate
                line.restart()
                drawn.clear()
                for done in range(1, 101):
                    now[0] += seconds
                    line.show("Pruning", done, 100)
                found.append((line._line.format_dict, list(drawn)))
        line.close()

    found = []
    at_end(look, TQDMProgressBar())
    (_, slow), (shown, fast) = found
    assert slow == list(range(1, 101))
    assert fast[-1] == 100
    assert len(fast) <= 11
    assert (shown["n"], shown["total"], shown["elapsed"]) == (100, 100, pytest.approx(1.0))
    assert shown["rate"] is None  # TQDM then shows n / elapsed


def test_tqdm_never_calls_the_line_of_a_search_a_validation(at_hook, capsys):
    def shown(trainer, module):
        capsys.readouterr()
        with Show(trainer, judged_by("val_acc"), CHOICES):
            return capsys.readouterr().out

    assert not [out for out in at_hook("on_train_epoch_start", shown, TQDMProgressBar()) if "Validation" in out]


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_validation_end", "on_train_end"])
def test_tqdm_prints_nothing_for_an_isolated_validation(hook, at_hook, capsys):
    def printed(trainer, module):
        capsys.readouterr()
        one_level(trainer, module)
        return capsys.readouterr()

    assert not any(stream for each in at_hook(hook, printed, TQDMProgressBar()) for stream in each)


def test_tqdm_bars_of_the_trainer_are_the_same_objects_after_a_search(fit):
    def look(trainer, module):
        if trainer.current_epoch == 1:
            found.append((bar._train_progress_bar, bar._val_progress_bar))

    bar, found = TQDMProgressBar(), []
    looks = [within(hook, look, times=99) for hook in ("on_train_epoch_start", "on_train_batch_start")]
    fit(bar, *looks, pruning(at_epoch=1))
    assert len(found) == 9
    assert all(train is found[0][0] and val is found[0][1] for train, val in found)


# ---- Rich


def rich_bar():
    return RichProgressBar(console_kwargs={"file": io.StringIO(), "force_terminal": True})


@pytest.fixture
def thread_errors(monkeypatch):
    """What threads died of."""
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    return errors


def shown_tasks(bar):
    return [task.description for task in bar.progress.tasks if task.visible]


class Between(Callback):
    """Notes the tasks of a bar before and after a search in `on_train_end`, which comes between the two."""

    def __init__(self, bar):
        self.bar, self.noted = bar, []

    def on_train_end(self, trainer, module):
        self.noted.append(shown_tasks(self.bar))
        self.alive = self.bar.progress.live._refresh_thread.is_alive()

    on_fit_end = on_train_end


@pytest.mark.parametrize(("validation", "judged"), JUDGED)
def test_rich_shows_one_task_and_takes_it_away(fit, thread_errors, monkeypatch, validation, judged):
    bar, shown, confirmed = rich_bar(), [], []
    between, ours = Between(bar), pruning(validation)
    on_candidate, on_confirmed = ProgressLine.on_candidate, ProgressLine.on_confirmed

    def tasks_now():
        return [(task.description, task.completed, task.total) for task in bar.progress.tasks if task.visible]

    def note(self, *arguments):
        on_candidate(self, *arguments)
        shown.append(tasks_now())

    def note_confirmed(self, *arguments):
        on_confirmed(self, *arguments)
        confirmed.append(tasks_now()[-1])

    monkeypatch.setattr(ProgressLine, "on_candidate", note)
    monkeypatch.setattr(ProgressLine, "on_confirmed", note_confirmed)
    fit(bar, between, ours)
    before, after = between.noted
    assert before == after
    assert between.alive
    assert not thread_errors
    assert all(len(tasks) == len(before) + 1 for tasks in shown)
    assert [tasks[-1][1:] for tasks in shown] == [(done, judged) for done in range(1, judged + 1)] * 2
    lines = [(f"Confirming level {level} of 2", level, 2) for level in (1, 2)]
    assert confirmed == ([] if validation is ON_ALL else lines)
    assert all(re.match(r"Pruning level [12] to \d+\.\d+%, best", tasks[-1][0]) for tasks in shown)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_validation_end", "on_train_end"])
def test_rich_can_refresh_within_an_isolated_validation_and_gets_no_task_from_it(hook, at_hook, thread_errors):
    bar = rich_bar()

    def search(trainer, module):
        before = shown_tasks(bar)
        with IsolatedValidation(trainer, module) as validation:
            bar.progress.refresh()
            validation.run()
            bar.progress.refresh()
        assert shown_tasks(bar) == before
        assert bar.progress.live._refresh_thread.is_alive()

    at_hook(hook, search, bar)
    assert not thread_errors


def test_rich_still_finds_its_own_tasks_after_a_search(at_hook, thread_errors):
    bar, hook = rich_bar(), "on_validation_batch_end"
    read = at_hook(hook, lambda *_: bar.val_progress_bar.description, bar, pruning(at_epoch=1), times=99)
    assert set(read) == {"Validation"}
    assert not thread_errors


@pytest.mark.parametrize("rich", [True, False])
def test_the_levels_are_a_table_in_the_console_of_a_rich_bar(rich, fit, capsys, thread_errors):
    console = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": console, "width": 200}) if rich else TQDMProgressBar()
    ours = pruning()
    fit(bar, ours)
    assert not thread_errors
    said = console.getvalue() + capsys.readouterr().out
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in said.splitlines()]
    assert ([row for row in cells if row] == ours.report.rows()) is rich
    assert ("Levels of the search" in said) is rich


# ---- no bar


class OtherBar(ProgressBar):
    """A bar of a kind we do not know."""

    disable = enable = lambda self: None


def disabled(bar):
    bar.disable()
    return bar


@pytest.mark.parametrize(
    "bars",
    [
        lambda: [],
        lambda: [OtherBar()],
        lambda: [TQDMProgressBar(refresh_rate=0)],
        lambda: [RichProgressBar(refresh_rate=0)],
        lambda: [disabled(RichProgressBar())],
        lambda: [disabled(TQDMProgressBar())],
    ],
)
def test_a_trainer_without_a_shown_bar_prints_nothing(bars, fit, capsys):
    callbacks = bars()
    fit(pruning(), *callbacks, enable_progress_bar=bool(callbacks))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Pruning level" not in printed.err


@pytest.mark.usefixtures("terminal")
def test_the_line_is_that_of_the_bar_that_is_shown(at_end):
    def look(trainer, module):
        bars = len(tqdm._instances)
        line = line_of(trainer)
        line.show("Pruning", 1, 2)
        line.close()
        assert len(tqdm._instances) == bars
        return type(line).__name__

    kinds = [at_end(look, bar) for bar in (TQDMProgressBar(), rich_bar(), OtherBar(), disabled(TQDMProgressBar()))]
    assert kinds == ["TQDMLine", "RichLine", "Line", "Line"]


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("bar", [TQDMProgressBar, rich_bar])
def test_the_line_is_taken_away_when_the_search_fails(bar, fit, monkeypatch):
    class Failing(Blobs):
        def validation_step(self, batch, batch_idx):
            if 0 < sparsity({"": self.net[0].weight}) < 1:
                raise RuntimeError("in a candidate")
            super().validation_step(batch, batch_idx)

    closed, original = [], line_of

    def watched(trainer):
        line = original(trainer)
        close = line.close
        line.close = lambda: (closed.append(type(line).__name__), close())
        return line

    monkeypatch.setattr("lightning_roulette.trainer.show.bar.line_of", watched)
    with pytest.raises(RuntimeError, match="in a candidate"):
        fit(bar(), pruning(), module=Failing())
    assert closed in (["TQDMLine"], ["RichLine"])


# ---- the log


@pytest.fixture
def said(caplog):
    """A function that tells what the package has said."""
    caplog.set_level(logging.INFO, logger="lightning_roulette")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lightning_roulette"]


@pytest.fixture
def every_level(monkeypatch):
    """Every level is said, however soon it follows."""
    monkeypatch.setattr("lightning_roulette.trainer.show.log.SECONDS_BETWEEN_LEVELS", 0.0)


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("validation", [ON_ALL, BY_DEFAULT], ids=["all", "halves"])
@pytest.mark.parametrize(("monitor", "mode"), [("val_acc", "max"), ("val_loss", "min")])
def test_a_search_says_its_floor_each_level_and_its_end_in_units_of_the_metric(monitor, mode, validation, fit, said):
    ours, halves = pruning(validation, monitor=monitor), validation is BY_DEFAULT
    fit(ours, enable_progress_bar=False)
    lines, report = said(), ours.report
    assert all(line.startswith("RouletteWheelPruning: ") for line in lines)
    judged, prunable, dense, *levels = (line.removeprefix("RouletteWheelPruning: ") for line in lines)
    assert judged == f"judges candidates by {monitor} ({mode}, as asked), and ranks them by val_loss."
    assert prunable == "624 of 624 weights in matrices are prunable (100.0%)."
    data = "the search half (8 of 16 folds)" if halves else "all validation data"
    floor = "no floor" if math.isinf(report.floor) else f"floor {report.floor:.6g}"
    start = f"dense network on {data}: {monitor} {report.dense_score:.6g}, {floor}. "
    assert dense.startswith(start)
    assert re.fullmatch(r"A level of 5 candidates will take about \d+\.\d s\.", dense.removeprefix(start))
    said_of = [
        f"level {number}: sparsity {level.sparsity:.2%}, {monitor} {level.score:.6g}, accepted"
        for number, level in enumerate(report.levels, 1)
    ]
    assert [line for line in levels if " took " not in line] == said_of + report.summary()
    assert report.floor < report.dense_score if mode == "max" else report.floor > report.dense_score


def test_levels_that_follow_soon_are_not_said(fit, said):
    fit(pruning(), enable_progress_bar=False)
    assert [line.split(":")[1] for line in said() if "accepted" in line] == [" level 1"]


def test_a_level_below_the_floor_is_said_to_be(fit, said):
    ours = RouletteWheelPruning(2, monitor="val_acc", tree=Tree(pruning_rate=0.99, patience=1))
    fit(ours, enable_progress_bar=False)
    assert any(line.endswith(f"below the floor {ours.report.floor:.6g}") for line in said())


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_speaks_and_draws(first, fit, said, tmp_path, monkeypatch):
    drawn = []
    logger = CSVLogger(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step: drawn.extend(metrics))

    def search(trainer, module):
        monkeypatch.setattr(type(trainer), "is_global_zero", first)
        winner = one_level(trainer, module)
        with Show(trainer, judged_by("val_acc"), CHOICES) as show:
            show.on_dense(winner, 1.0)
            show.on_level(winner.report.levels[0], winner)
            show.on_timed(winner.report.levels[0], winner, LevelTime(2.0, 1.5))
            show.on_confirmed(winner.report.levels[0], winner)
            show.on_end(winner.report)
        monkeypatch.setattr(type(trainer), "is_global_zero", True)

    fit(within("on_train_end", search), logger=logger, enable_progress_bar=False)
    assert any(tag.startswith("roulette/") for tag in drawn) is first
    assert bool(said()) is first


def test_a_new_display_sees_every_step_in_units_of_the_metric(fit, monkeypatch):
    steps = []

    class Notes(Display):
        def on_dense(self, report, mask, work):
            steps.append(("dense", report.dense_score, mask.sparsity))

        def on_level(self, report, mask):
            steps.append(("level", report.levels[-1].score, mask.sparsity))

        def on_timed(self, report, seconds):
            assert seconds.seconds >= seconds.refit == 0
            steps.append(("timed", report.levels[-1].score))

        def on_confirmed(self, report, level):
            steps.append(("confirmed", level.held_out_score, level.sparsity))

        def on_end(self, report):
            steps.append(("end", report.score, report.sparsity))

        def close(self):
            steps.append("closed")

    monkeypatch.setattr("lightning_roulette.trainer.show.show.DISPLAYS", (Notes,))
    ours = pruning(monitor="val_loss")
    fit(ours, enable_progress_bar=False)
    report = ours.report
    assert steps == [
        ("dense", report.dense_score, 0),
        *(step for one in report.levels for step in (("level", one.score, one.sparsity), ("timed", one.score))),
        *(("confirmed", one.held_out_score, one.sparsity) for one in report.levels),
        "closed",
        ("end", report.score, report.sparsity),
    ]
    assert report.dense_score > 0


def test_the_line_tells_a_falling_metric_in_its_own_units(fit, monkeypatch):
    shown = []
    monkeypatch.setattr(Line, "show", lambda self, text, done, total: shown.append(text))
    ours = pruning(ON_ALL, monitor="val_loss")
    fit(ours, enable_progress_bar=False)
    best = ours.report.levels[0].score
    assert shown[4].endswith(f"best {best:.4g}")
    assert best > 0


# ---- who is heard


@pytest.fixture(autouse=True)
def give_back_the_level():
    """What `speak_up` sets stays for the process."""
    level = log.level
    yield
    log.setLevel(level)


def new_process(monkeypatch, *handlers):
    """The package's logger as a new process has it, and these handlers at the root."""
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(logging.getLogger(), "handlers", list(handlers))
    log.setLevel(logging.NOTSET)


def test_log_lines_are_seen_where_the_user_arranged_nothing(monkeypatch, capsys):
    new_process(monkeypatch)
    speak_up()
    speak_up()
    log.info("a level")
    assert capsys.readouterr().err == "a level\n"


@pytest.mark.parametrize("before", [True, False])
def test_a_user_who_configured_logging_hears_each_line_once(monkeypatch, capsys, before):
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    new_process(monkeypatch, *([handler] if before else []))
    speak_up()
    if not before:
        logging.getLogger().handlers.append(handler)
    log.info("a level")
    assert heard.getvalue() + capsys.readouterr().err == "a level\n"
    assert bool(heard.getvalue()) == before


def test_a_level_that_the_user_chose_stays(monkeypatch, capsys):
    new_process(monkeypatch)
    log.setLevel(logging.WARNING)
    speak_up()
    log.info("a level")
    assert capsys.readouterr().err == ""
