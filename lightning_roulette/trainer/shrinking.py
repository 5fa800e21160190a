"""The file of the winner without its dead units."""

from __future__ import annotations

import warnings

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_roulette.network.containers import rebuilt
from lightning_roulette.slim.removal.shrunk import contents_of
from lightning_roulette.trainer.data.folded_data import FoldedData
from lightning_roulette.trainer.example import example_of
from lightning_roulette.trainer.files import write_file
from lightning_roulette.trainer.fit_state import FitState
from lightning_roulette.trainer.preparing import prunable
from lightning_roulette.trainer.removing import removal_from
from lightning_roulette.trainer.saved import note
from lightning_roulette.trainer.show.log import log


def rehearse_shrinking(fit: FitState) -> None:
    """Raise if `shrink` is True and the network is not found that would be shrunk.

    Raises:
        RuntimeError: If there is no example of the input.
    """
    if not fit.choices.shrink:
        return
    try:
        example_of(fit, None, prunable(fit))
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f"shrink is True, but there is no example of the input of the network: {error} Set the module's "
            "example_input_array, or leave shrink out."
        ) from error


def save_shrunk_winner(fit: FitState, data: FoldedData | None = None) -> None:
    """Write the network without its dead units, if `shrink` asks for it. The first process writes.

    The winner is saved before. So what fails here is a warning and a note in the report.

    Args:
        fit: The run, with the winner in its module.
        data: The validation data, if a search has read them.
    """
    if not fit.choices.shrink:
        return
    try:
        path, example, _ = example_of(fit, data, prunable(fit))  # a step may wait for the other processes
        fit.result.example = path, rebuilt(example, copies=True)
        if fit.trainer.is_global_zero:
            _write(fit)
    except Exception as error:
        _say_why_not(fit, error)


def _write(fit: FitState) -> None:
    found = removal_from(fit.result)
    count = found.count
    said = f"{count.dead:,} of {count.units:,} units of the network are dead"
    if fit.files is None:
        log.info(f"RouletteWheelPruning: {said}. No file of the network without them is written, see dirpath.")
        return
    write_file(fit.files.shrunk, contents_of(found))
    log.info(f"RouletteWheelPruning: {said}. The network without them is in {fit.files.shrunk!r}.")


def _say_why_not(fit: FitState, error: Exception) -> None:
    """Say why there is no file. A file that further training has made outdated is removed."""
    where = ""
    if fit.files is not None:
        where = f" The winner with its first shapes is in {fit.files.pruned!r}."
        if fit.trainer.is_global_zero and (files := get_filesystem(fit.files.shrunk)).exists(fit.files.shrunk):
            files.rm(fit.files.shrunk)
    sentence = f"The network was not shrunk ({type(error).__name__}: {error}).{where}"
    note(fit, sentence)
    if fit.trainer.is_global_zero:
        warnings.warn(f"RouletteWheelPruning: {sentence}", stacklevel=2)
