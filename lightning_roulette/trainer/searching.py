"""Searches the network of a Trainer, and loads, measures and saves the winner."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace

from lightning_roulette.judge.evaluator import Evaluator
from lightning_roulette.judge.noted import Noted
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.lending import named_tensors
from lightning_roulette.report.records import StopReason
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.search import search
from lightning_roulette.search.winner import Winner, load
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.files import checkpoint_with_these_weights, save_accepted_levels
from lightning_roulette.trainer.fit_state import FitState, Phase, batches_trained
from lightning_roulette.trainer.footprint import footprint_of
from lightning_roulette.trainer.hold_zeros import held_by_others, load_into_average
from lightning_roulette.trainer.observers import Comparable, Latest, Several
from lightning_roulette.trainer.preparing import calibration_of, measured, ready
from lightning_roulette.trainer.resuming import journal_of
from lightning_roulette.trainer.saved import read_back, rehearse_saving
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.scores.setup import CandidateValidation
from lightning_roulette.trainer.show.show import Show
from lightning_roulette.trainer.shrinking import save_shrunk_winner
from lightning_roulette.trainer.units import say_units, units_for


def search_network(fit: FitState) -> None:
    """Search the network as it is now, load the winner in place, measure it and save it.

    If the search fails, the network is dense, and the accepted levels are kept in the report and in a file.
    """
    held = held_by_others(fit.trainer, fit.module, fit.callback)  # before the dense network is measured
    judges, latest = ready(fit), Latest()
    fit.know_files()
    rehearse_saving(fit, judges.weights)
    with Show(fit.trainer, judges.metric, fit.choices) as shown:
        try:
            with noted(fit, judges) as evaluate:
                observer = Several(_comparable(fit, judges), latest, shown)
                winner = _searched(fit, judges, evaluate, observer, held)
                _load(fit, winner, judges.metric, judges.data)
            if fit.result.between_epochs is not None:
                fit.result.between_epochs.over = True
        except BaseException as error:
            if fit.result.history is None:  # the winner was not loaded
                reason = StopReason.INTERRUPTED if isinstance(error, KeyboardInterrupt) else StopReason.FAILED
                _keep_accepted(fit, latest.so_far, judges.metric, reason)
            raise
    show_result(fit, shown)


def show_result(fit: FitState, shown: Show) -> None:
    """Show the weights that were loaded, if the network was pruned, and the report."""
    report, mask = fit.result.report, fit.result.mask
    assert report is not None
    if report.winner is not None and mask is not None:
        shown.on_weights(report.winner.level, mask, named_tensors(fit.module))
    shown.on_end(report)


def measure_and_save(fit: FitState) -> None:
    """Measure and save the winner as further training has changed it."""
    report = fit.result.report
    assert report is not None
    held_by_others(fit.trainer, fit.module, fit.callback)
    score = measured(fit, report.monitor)
    fit.result.report = replace(report, trained_score=score, footprint=footprint_of(fit))
    fit.result.measured_at_batch = batches_trained(fit.trainer)
    fit.know_files()
    if report.winner is not None:
        save_winner(fit)
        save_shrunk_winner(fit)


def save_winner(fit: FitState) -> None:
    """Write the checkpoint of the winner, if files are written. It names itself as `best_model_path`."""
    if fit.files is None:
        return
    before, fit.result.best_model_path = fit.result.best_model_path, fit.files.pruned
    fit.writes_winner = True
    try:
        fit.trainer.save_checkpoint(fit.files.pruned, weights_only=False)
    except BaseException:
        fit.result.best_model_path = before
        raise
    finally:
        fit.writes_winner = False
    read_back(fit)


def save_dense(fit: FitState) -> None:
    """Write the checkpoint of the dense network, if files are written."""
    if fit.files is not None:
        fit.trainer.save_checkpoint(fit.files.dense, weights_only=False)


@contextlib.contextmanager
def noted(fit: FitState, judges: CandidateValidation) -> Iterator[Evaluator]:
    """Record scores in a journal inside the block. The journal is removed if the block ends without an error."""
    metric = replace(judges.metric, why="")  # a resumed fit may find the same metric in another way
    settings = fit.choices.of_search(fit.only_tries)
    settings["tree"] = replace(settings["tree"], max_time=None)  # a resumed search may be given more time
    facts = [settings, *judges.weights, metric, judges.data.folds, judges.size]
    journal = journal_of(fit.trainer, fit.module, fit.files, facts)
    yield judges.evaluate if journal is None else Noted(judges.evaluate, journal)
    if journal is not None:
        journal.remove()


def _searched(
    fit: FitState, judges: CandidateValidation, evaluate: Evaluator, observer: Several, held: Mask | None
) -> Winner:
    units = units_for(fit, judges.weights, judges.data)
    say_units(fit, units)
    with judges.validation:
        calibration = calibration_of(fit, judges.validation)
        settings = fit.choices.of_search(fit.only_tries)
        settings |= {"calibration": calibration, "observer": observer, "units": units, "held": held}
        winner = search(judges.weights, evaluate, **settings)
        judges.data.check()
    judges.evaluate.unmoved.check()
    return winner


def _comparable(fit: FitState, judges: CandidateValidation) -> Comparable:
    """Return what refuses a metric of which parts of the data say nothing about all of it."""
    metric = judges.metric
    grows = metric.monitor in (*metric.sums, *metric.others)
    return Comparable(None if grows else fit.facts.dense_measured, metric)


def _load(fit: FitState, winner: Winner, metric: MonitoredMetric, data: FoldedData) -> None:
    """Load the winner in place, measure it and save it. The dense network is saved before."""
    result, pruned = fit.result, winner.report.winner is not None
    if pruned and _must_save_dense(fit):
        save_dense(fit)
    result.winner = winner.cpu()
    load(fit.module, winner)
    if pruned:
        load_into_average(fit.trainer, fit.module)
    result.report = fit.report_of(winner.report, metric)
    result.history, result.module = result.winner.history, weakref.ref(fit.module)
    try:
        result.report = replace(result.report, score=measured(fit, metric.monitor, data))
        result.report = replace(result.report, footprint=footprint_of(fit, data))
        result.measured_at_batch = batches_trained(fit.trainer)
    except BaseException:
        if pruned and fit.trainer.world_size == 1:  # with several processes it would wait for the others
            save_winner(fit)
        raise
    if pruned:
        save_winner(fit)
        save_shrunk_winner(fit, data)


def _must_save_dense(fit: FitState) -> bool:
    """Whether no ModelCheckpoint keeps the dense weights. In further training it may remove its files."""
    if fit.files is None:
        return False
    return fit.phase is Phase.EPOCH_BEGINS or not checkpoint_with_these_weights(fit.trainer, fit.module)


def _keep_accepted(fit: FitState, so_far: Winner | None, metric: MonitoredMetric, reason: StopReason) -> None:
    """Keep the report of a search that did not end, and write its masks into a file."""
    if so_far is None:
        return
    report: SearchReport = replace(fit.report_of(so_far.report, metric), stop_reason=reason)
    fit.result.report = report
    if fit.files is not None and report.accepted and fit.trainer.is_global_zero:
        weights = so_far.whole if so_far.refits else {}
        save_accepted_levels(fit.files.interrupted, so_far.history, report.to_dict(), weights)
        warnings.warn(
            f"RouletteWheelPruning: the search did not end. The {len(report.accepted)} levels accepted so far are in "
            f"{fit.files.interrupted!r}. apply_mask(module, path) applies level {so_far.history.level}.",
            stacklevel=2,
        )
