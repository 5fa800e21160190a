"""Pruning between epochs: the trained network is judged, and if it keeps the floor one more level is cut."""

from __future__ import annotations

from dataclasses import replace

from lightning_roulette.mask.history import History
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.between_epochs import BetweenEpochs
from lightning_roulette.trainer.fit_state import FitState, batches_trained
from lightning_roulette.trainer.footprint import footprint_of
from lightning_roulette.trainer.hold_zeros import held_by_others, load_into_average
from lightning_roulette.trainer.preparing import calibration_of, measured, ready_between_epochs, warn_of_other_data
from lightning_roulette.trainer.saved import rehearse_saving
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.searching import noted, save_dense, save_winner, show_result
from lightning_roulette.trainer.show.show import ShowBetweenEpochs
from lightning_roulette.trainer.shrinking import save_shrunk_winner
from lightning_roulette.trainer.units import say_units, units_for


def judge_and_cut(fit: FitState, cuts: BetweenEpochs, number: int) -> None:
    """Judge the network as trained. If it keeps the floor, cut one more level.

    Args:
        fit: The run.
        cuts: The state of pruning between epochs.
        number: The number of the cut, from 1.
    """
    zeros = held_by_others(fit.trainer, fit.module, fit.callback)
    judges, epoch = ready_between_epochs(fit), fit.trainer.current_epoch
    warn_of_other_data(fit, cuts, judges.data)
    fit.know_files()
    if fit.result.history is None:
        rehearse_saving(fit, judges.weights)
    units = units_for(fit, judges.weights, judges.data)
    if fit.result.history is None:
        say_units(fit, units)
    with ShowBetweenEpochs(fit.trainer, judges.metric, fit.choices) as shown, noted(fit, judges) as evaluate:
        with judges.validation:
            calibration = calibration_of(fit, judges.validation)
            held = cuts.gradual.judge(judges.weights, evaluate, calibration, shown, units, zeros)
        _take_judgement(fit, cuts, held, judges.metric, shown)
        if not held:
            return
        with judges.validation:
            network = cuts.gradual.cut(number, epoch)
        if network is not None:
            _train_on(fit, cuts, network, judges.metric, shown)


def end_cuts(fit: FitState, cuts: BetweenEpochs) -> None:
    """Judge the last level, load the slimmest that held, measure it and save it."""
    zeros = held_by_others(fit.trainer, fit.module, fit.callback)
    judges, result = ready_between_epochs(fit), fit.result
    warn_of_other_data(fit, cuts, judges.data)
    fit.know_files()
    with ShowBetweenEpochs(fit.trainer, judges.metric, fit.choices) as shown:
        with judges.validation:
            held = cuts.gradual.judge(judges.weights, judges.evaluate, held=zeros)
        _take_judgement(fit, cuts, held, judges.metric, shown)
        cuts.load_kept(fit.module)
        load_into_average(fit.trainer, fit.module)
        cuts.over = True
        report = fit.report_of(cuts.gradual.ended(), judges.metric)
        fit.hold_zeros()
        score = measured(fit, report.monitor, judges.data)
        report = result.report = replace(report, score=score, footprint=footprint_of(fit, judges.data))
        result.measured_at_batch = batches_trained(fit.trainer)
        if report.winner is not None:
            save_winner(fit)
            save_shrunk_winner(fit, judges.data)
    show_result(fit, shown)


def _take_judgement(
    fit: FitState, cuts: BetweenEpochs, held: bool, metric: MonitoredMetric, shown: ShowBetweenEpochs
) -> None:
    """Take over the report. Keep and save a network that held; the first is the dense one."""
    report, history = _take_report(fit, cuts, metric)
    shown.on_judged(report, history.mask, fit.trainer.current_epoch)
    if not report.levels:
        shown.on_weights(0, history.mask, named_tensors(fit.module))
    if not held:
        return
    cuts.keep(fit.module)
    if report.levels:
        save_winner(fit)
    else:
        save_dense(fit)


def _train_on(
    fit: FitState, cuts: BetweenEpochs, network: PrunedWeights, metric: MonitoredMetric, shown: ShowBetweenEpochs
) -> None:
    """Load the network that was cut, so that training goes on with it."""
    copy_into(named_tensors(fit.module), network.weights)
    if network.refitted:
        load_into_average(fit.trainer, fit.module)
    report, _ = _take_report(fit, cuts, metric)
    shown.on_cut(report, network.mask)
    fit.hold_zeros()


def _take_report(fit: FitState, cuts: BetweenEpochs, metric: MonitoredMetric) -> tuple[SearchReport, History]:
    """Take over the report, in units of the metric, and the masks of all levels. Return both."""
    (report, history), before = cuts.gradual.found, fit.result.report
    if fit.facts.dense_measured is None:
        fit.facts.dense_measured = _dense_on_all(before, metric.units_of(report))
    fit.result.report, fit.result.history = fit.report_of(report, metric), history
    return fit.result.report, history


def _dense_on_all(before: SearchReport | None, now: SearchReport) -> float | None:
    """Return the metric of the dense network on all validation data, from an earlier run or the first judgement."""
    if before is not None and before.dense_measured is not None:
        return before.dense_measured
    return now.held_out_dense if now.folds[1] == 0 else None
