"""What a search in a fit needs: the metric, the validation data, and inputs from the training data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import nn

from lightning_roulette.network.coverage import coverage_of
from lightning_roulette.network.parameters import skipped_parameters
from lightning_roulette.network.steps import with_inner
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit_settings import Refit, refit_of
from lightning_roulette.report.names import shortened
from lightning_roulette.trainer.between_epochs import BetweenEpochs
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.data.training_inputs import (
    TrainerCalibration,
    calibration_batches,
    refuse_blind_to_training,
)
from lightning_roulette.trainer.fit_state import FitState, Phase
from lightning_roulette.trainer.preflight import find_prunable
from lightning_roulette.trainer.scores.monitored_metric import MonitoredMetric
from lightning_roulette.trainer.scores.refusals import refuse_too_few_samples
from lightning_roulette.trainer.scores.setup import CandidateValidation, ValidationSetup
from lightning_roulette.trainer.scores.trial import refuse_changed
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.validation.guard import Guard, digests_of_parameters
from lightning_roulette.trainer.validation.isolation import IsolatedValidation


def rehearse(fit: FitState, batches: float) -> None:
    """Find the metric by a short validation, and refuse what would fail in the search.

    Args:
        fit: The run.
        batches: How many batches of each loader are validated.

    Raises:
        RuntimeError: If the metric was not logged or is ambiguous, if the training data cannot be read by a refit, or
            if the validation data are too few for a certificate.
    """
    choices, judging = fit.choices, judging_of(fit)
    searched = fit.result.history is not None
    guard = Guard(fit.module)
    with judging.isolated() as validation, guard.watching(in_use=False):
        logged, samples = validation.run(batches), validation.samples()
    metric = remember(fit, judging.metric(logged))
    if not searched:
        judging.rehearse(guard, metric, prunable(fit), batches)
        if choices.needs_inputs:
            _rehearse_calibration(fit, judging)
    confidence, tolerance = choices.confidence, choices.tolerance
    if confidence is not None and tolerance is not None and not searched and not fit.only_tries:
        judged_by = logged.metrics.get(metric.monitor)
        refuse_too_few_samples(samples, judged_by, confidence, tolerance, choices.validation.confirm)


def _rehearse_calibration(fit: FitState, judging: ValidationSetup) -> None:
    """Refuse training data that cannot be read, and steps on them that fail or change prunable weights."""
    choices, guard = fit.choices, Guard(fit.module)
    remedy = "refit=None" if choices.refit is not None else "wheel=Wheel(importance='magnitude')"
    with judging.isolated() as validation, guard.watching():
        refuse_blind_to_training(fit.trainer, validation, choices.seed, remedy)
    refuse_changed(guard.changed, prunable(fit), "a step on training data, which a refit takes,")


def judging_of(fit: FitState) -> ValidationSetup:
    """Return how the network is judged: by the metric of the last search, or else by the metric asked for."""
    choices, report = fit.choices, fit.result.report
    monitor, mode = choices.monitor, choices.mode
    if fit.result.history is not None and report is not None:
        monitor, mode = report.monitor, report.mode
    return ValidationSetup(
        fit.trainer,
        fit.module,
        choices.validation,
        monitor,
        mode,
        math.inf if fit.only_tries else choices.tolerance,
        choices.seed,
        fit.callback,
        fit.restless,
        fit.facts.note,
        named=choices.include is not None,
    )


def remember(fit: FitState, metric: MonitoredMetric) -> MonitoredMetric:
    """Keep the metric for this run, and log its name."""
    said = [note for note in metric.notes if note not in fit.facts.notes]
    if fit.metric is None or not metric.judges_like(fit.metric):
        said.insert(
            0,
            f"judges candidates by {metric.monitor} ({metric.mode}, {metric.why}), and ranks them by {metric.rank_by}.",
        )
    for sentence in said if fit.trainer.is_global_zero else ():
        log.info(f"RouletteWheelPruning: {sentence}")
    for note in metric.notes:
        fit.facts.note(note)
    fit.metric = metric
    return metric


def ready(fit: FitState) -> CandidateValidation:
    """Return what judges the candidates of a search, with the validation data dealt to folds."""
    by_rows, first = fit.choices.confidence is not None, fit.result.history is None
    found = judging_of(fit).dealt(lambda: prunable(fit), by_rows, first)
    remember(fit, found.metric)
    if first:
        say_prunable(fit, found.unused)
        warn_of_untrained(fit, found.weights)
        score = found.score if found.score is not None else measured(fit, found.metric.monitor, found.data)
        fit.facts.dense_measured = score
    return found


def ready_between_epochs(fit: FitState) -> CandidateValidation:
    """Return what judges the trained network and the candidates of a cut.

    With one candidate per cut nothing is ranked, and the validation data is not divided.
    """
    if fit.choices.branches > 1:
        return ready(fit)
    judging = judging_of(fit)
    if (metric := fit.metric) is None:
        with judging.isolated() as validation:
            logged = validation.run(1)
        metric = remember(fit, judging.metric(logged))
    found = judging.undivided(metric, prunable(fit), first := fit.result.history is None)
    if first:
        say_prunable(fit, found.unused)
        warn_of_untrained(fit, found.weights)
    return found


def say_prunable(fit: FitState, unused: Mapping[str, str]) -> None:
    """Log what is prunable and what is skipped, and keep it for the report.

    Args:
        fit: The run.
        unused: The parameters that are skipped because validation does not use them, with the reason.
    """
    skipped = skipped_parameters(fit.module, include=fit.choices.include, exclude=fit.choices.exclude)
    coverage = coverage_of(fit.module, {**skipped, **unused})
    fit.facts.matrices, fit.facts.skipped = coverage.matrices, coverage.skipped
    if fit.trainer.is_global_zero:
        log.info(f"RouletteWheelPruning: {coverage.sentence}")


def warn_of_untrained(fit: FitState, weights: Mapping[str, nn.Parameter]) -> None:
    """Warn if training goes on after the search, but no optimizer trains some of the pruned weights."""
    optimizers = with_inner(fit.trainer.optimizers)
    groups = [group for one in optimizers for group in getattr(one, "param_groups", ())]
    trained = {id(one) for group in groups for one in group["params"]}
    names = [name for name, one in weights.items() if one.requires_grad and id(one) not in trained]
    if fit.phase is not Phase.EPOCH_BEGINS or not names:
        return
    said = (
        f"No optimizer trains {shortened(names)}. If something else writes these weights while training goes on, such "
        "as a moving average of other weights, their zeros are held, but the other weights do not adapt to the zeros."
    )
    fit.facts.note(said)
    if fit.trainer.is_global_zero:
        warnings.warn(
            f"RouletteWheelPruning: {said} Leave out at_epoch, so that the search comes after training, or leave them "
            "out with exclude.",
            stacklevel=2,
        )


def warn_of_other_data(fit: FitState, cuts: BetweenEpochs, data: FoldedData) -> None:
    """Warn if the validation data are not those by which the floor was set. The first ones are noted.

    Several processes have parts of the data each, and data that are not kept in memory are not compared.
    """
    if fit.trainer.world_size > 1 or (now := data.sum()) is None:
        return
    if fit.result.history is None:
        cuts.data = now
    said = (
        "The validation data have changed since the floor was set, before the first cut. Later levels were judged on "
        "other data, so their scores cannot be compared with the floor."
    )
    if cuts.data in (None, now) or said in fit.facts.notes:
        return
    fit.facts.note(said)
    warnings.warn(
        f"RouletteWheelPruning: {said} Use the same validation data in all epochs: let val_dataloader return the same "
        "samples each time it is called. Or search once, with at_epoch=None.",
        stacklevel=2,
    )


def prunable(fit: FitState) -> dict[str, nn.Parameter]:
    """Return the prunable parameters. After the first cut they stay the same, even if some are frozen since."""
    cuts = fit.result.between_epochs
    if cuts is None or (mask := cuts.mask) is None:
        return find_prunable(fit.module, fit.choices.include, fit.choices.exclude)
    found = dict(fit.module.named_parameters(remove_duplicate=False))
    return {name: found[name] for name in mask}


def calibration_of(fit: FitState, validation: IsolatedValidation) -> Calibration | None:
    """Return the network with batches of the training data; None if neither refit nor importance needs them."""
    choices = fit.choices
    if not choices.needs_inputs:
        return None
    how = refit_of(choices.refit) or Refit()
    batches = calibration_batches(fit.trainer, validation, 1 if fit.only_tries else how.batches, choices.seed)
    by_layer = choices.refit is not None or choices.wheel.importance in ("activation", "obs")
    return TrainerCalibration(fit.trainer, fit.module, validation, batches, choices.seed, by_layer, how.cache_bytes)


def measured(fit: FitState, monitor: str, data: FoldedData | None = None) -> float:
    """Return the metric of the network as it is, on all validation data.

    Args:
        fit: The run.
        monitor: The name of the metric.
        data: The validation data, if a search has read them.
    """
    score = judging_of(fit).measured(monitor, data)
    fit.measured_weights = digests_of_parameters(fit.module)
    return score
