"""The command line: prunes the network that a command line describes."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache

from lightning_roulette.slim.files.inspection import inspect
from lightning_roulette.trainer.callback import RouletteWheelPruning
from lightning_roulette.trainer.without_training import prune

PROGRAM = "python -m lightning_roulette"
_JSONARGPARSE = "jsonargparse[signatures]>=4.42,<5"


def main(args: Sequence[str]) -> None:
    """Run a command.

    - `prune` prints the report of the search and the path of the pruned checkpoint.
    - `inspect` prints what a file of weights holds.

    Args:
        args: The command and its arguments, such as `["prune", "--config", "config.yaml"]`.

    Raises:
        SystemExit: If an argument is wrong or the network cannot be pruned. The message is one of this package.
    """
    parser = ArgumentParser(PROGRAM, description="Weight pruning for PyTorch Lightning.", allow_abbrev=False)
    helps = f"prune a trained network, or print what a file of weights holds; see {PROGRAM} prune --help"
    parser.add_argument("command", choices=["prune", "inspect"], help=helps)
    if parser.parse_args(args[:1]).command == "inspect":
        _inspect(args[1:])
        return
    if not RequirementCache(_JSONARGPARSE):
        sys.exit(f"error: the command line needs jsonargparse. Run: pip install '{_JSONARGPARSE}'")
    try:
        _prune(list(args[1:]))
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        if not _is_for_users(error):
            raise
        sys.exit(f"error: {error}")


def _inspect(args: Sequence[str]) -> None:
    parser = ArgumentParser(f"{PROGRAM} inspect", description="Print what a file of weights holds.", allow_abbrev=False)
    parser.add_argument("file", help="a file of save_compressed or safetensors, a checkpoint or a state dict")
    try:
        print(inspect(parser.parse_args(args).file))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _prune(args: list[str]) -> RouletteWheelPruning:
    from lightning_roulette.trainer.command.parsing import PruneCLI  # needs jsonargparse

    cli = PruneCLI(args, PROGRAM)
    ckpt_path, weights_only = cli.config_init["ckpt_path"], cli.config_init["weights_only"]
    pruning = prune(cli.trainer, cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path, weights_only=weights_only)
    if cli.trainer.is_global_zero:
        print(f"\n{pruning.report}\n\npruned network: {pruning.best_model_path or 'not written'}")
    return pruning


def _is_for_users(error: Exception) -> bool:
    """Whether this package or Lightning raised the error about what a user passed. Others need their traceback."""
    if isinstance(error, MisconfigurationException) or str(error).startswith("RouletteWheelPruning: "):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_here = trace is not None and trace.tb_frame.f_globals["__name__"].startswith("lightning_roulette.")
    return raised_here and isinstance(error, TypeError | ValueError)
