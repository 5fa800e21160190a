"""What the network of a fit takes, for the report: bytes, and multiply-adds of one sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_roulette.large.limits import are_few
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.multiply_adds import multiply_adds
from lightning_roulette.network.samples import rows_of
from lightning_roulette.report.records import Footprint
from lightning_roulette.slim.files.compressed import compressed
from lightning_roulette.slim.measuring.bounds import each_once
from lightning_roulette.trainer.data.folded_data import FoldedData, KeptData
from lightning_roulette.trainer.fit_state import FitState
from lightning_roulette.trainer.preparing import judging_of
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.validation.isolation import IsolatedValidation
from lightning_roulette.trainer.validation.loop import transferred

_Found = TypeVar("_Found")
_PerSample = tuple[int | None, int | None]


def footprint_of(fit: FitState, data: FoldedData | None = None) -> Footprint | None:
    """Return what the network takes as it is. What cannot be measured is None, and a line for debugging says why.

    The input is the module's `example_input_array` if it is set. Otherwise it is the first batch of the validation data
    with one process, for which the module takes one validation step. A step that runs the network several times
    counts all of them. The first dimension of the tensors counts the samples.

    Args:
        fit: The run, with the network in its module.
        data: The validation data, if a search has read them. Without them, and without an example input, the
            multiply-adds are those of the last report.
    """
    if any_sharded(fit.module.parameters()):
        return None
    state = dict(_tried("state dict", fit.module.state_dict) or {})
    if (tensors := _tried("bytes", lambda: each_once(state))) is None:
        return None
    file = _tried("compressed file", lambda: compressed(state, "float32")) if are_few(tensors) else None
    found = _tried("multiply-adds", lambda: _per_sample(fit, data))
    dense, effective = _known(fit) if found is None else found
    return Footprint(sum(one.nbytes for one in tensors), None if file is None else len(file), dense, effective)


def _tried(what: str, measure: Callable[[], _Found]) -> _Found | None:
    """Return what `measure` returns; None if it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return measure()
        except Exception as error:
            log.debug(f"RouletteWheelPruning: {what} not measured ({type(error).__name__}: {error})")
            return None


def _known(fit: FitState) -> _PerSample:
    """Return the multiply-adds of the last report."""
    before = None if fit.result.report is None else fit.result.report.footprint
    return (None, None) if before is None else (before.dense_multiply_adds, before.effective_multiply_adds)


def _per_sample(fit: FitState, data: FoldedData | None) -> _PerSample | None:
    """Return the multiply-adds of one sample, dense and effective; None if there is no input."""
    example = fit.module.example_input_array
    # in several processes a step may wait for the others
    if example is None and (data is None or fit.trainer.world_size > 1):
        return None
    with judging_of(fit).isolated() as validation:
        given = first_batch(validation, data) if example is None else example
        if given is None or not (samples := rows_of(given)):
            return None
        with validation.seeing():
            run = _forward(fit, given) if example is not None else lambda: validation.validation_step(given)
            found = multiply_adds(fit.module, run)
    return round(found.dense / samples), round(found.effective / samples)


def first_batch(validation: IsolatedValidation, data: FoldedData | None) -> Any:
    """Return the first batch of the validation data, from memory if it is there; None if steps take no batches."""
    if validation.hands_over_iterator:
        return None
    batches = data.of([0]) if isinstance(data, KeptData) else validation.read()
    found = next(batches)[0]
    batches.close()  # type: ignore[attr-defined]  # what a reader changes is put back before the step
    return found


def _forward(fit: FitState, example: Any) -> Callable[[], object]:
    """Return what calls the forward of the module with an example input."""
    forward = caller_of(fit.module, transferred(fit.trainer, example, 0))(None)

    def run() -> None:
        with fit.trainer.precision_plugin.val_step_context():
            forward()

    return run
