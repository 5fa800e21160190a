"""The pruned module of a result without its dead units."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule

from lightning_roulette.slim.removal.removal import Removal, removal_of
from lightning_roulette.trainer.persistence import Progress, Result


def refuse_unfinished(result: Result) -> None:
    """Raise if nothing is pruned yet.

    Raises:
        RuntimeError: If no search has ended.
    """
    if result.progress is not Progress.PRUNED:
        raise RuntimeError("no search has ended, so no network was pruned that could be shrunk. Call fit first.")


def removal_from(result: Result, example_input: Any = None) -> Removal:
    """Remove the dead units of the module that was pruned, in a copy.

    Args:
        result: The result of the search.
        example_input: What the forward of the module is called with. None: the example that the search kept, or the
            module's `example_input_array`.

    Raises:
        RuntimeError: If the module is not in this process.
        ValueError: If there is no example.
    """
    if (module := None if result.module is None else result.module()) is None:
        raise RuntimeError(
            "the module that was pruned is not known here: it was deleted, or the search ran in another process. "
            "Load shrunk.ckpt by load_shrunk, or call remove_dead on the network."
        )
    path, example = _example(module, result, example_input)
    return removal_of(module, move_data_to_device(example, module.device), inside=path)


def _example(module: LightningModule, result: Result, given: Any) -> tuple[str, Any]:
    if given is not None:
        return "", given
    if result.example is not None:
        return result.example
    if module.example_input_array is not None:
        return "", module.example_input_array
    raise ValueError(
        "there is no example of the input of the module, by which its units are found. Pass what its forward is called "
        "with: shrunk(example_input). Or set the module's example_input_array, or search with shrink=True."
    )
