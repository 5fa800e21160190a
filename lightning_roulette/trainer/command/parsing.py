"""Reads what LightningCLI reads for `fit`, and makes a Trainer with one RouletteWheelPruning."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_roulette.trainer.callback import RouletteWheelPruning
from lightning_roulette.trainer.command.given import Given
from lightning_roulette.trainer.show.log import log, speak_up

_DESCRIPTION = """Prune a trained network, without any training step. The arguments of the search are those of
RouletteWheelPruning, under --pruning. A configuration that LightningCLI reads for `fit` is read, too."""
_USAGE = "%(prog)s [--config FILE] [--model CLASS] [--data CLASS] [--ckpt_path FILE] [--pruning.ARGUMENT VALUE] ..."
_PATHS = {f"{RouletteWheelPruning.__module__}.RouletteWheelPruning", "lightning_roulette.RouletteWheelPruning"}


class PruneCLI(LightningCLI):
    """The module, the data module and the Trainer that a command line describes.

    A RouletteWheelPruning among the callbacks of a configuration gives the arguments of the search their values. Those
    under `pruning` override them.

    Args:
        args: The command line, without the name of the command.
        program: How the program is called.
    """

    def __init__(self, args: list[str], program: str) -> None:
        self.given = Given.on(args)
        super().__init__(
            args=self.given.in_order,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            # hyperparameters are saved as they were saved before
            load_from_checkpoint_support="_instantiator" in self.given.hyperparameters,
            parser_kwargs={"prog": f"{program} prune", "usage": _USAGE, "description": _DESCRIPTION},
        )

    @property
    def pruning(self) -> RouletteWheelPruning:
        """The callback with the arguments of the search."""
        callback: RouletteWheelPruning = self.config_init["pruning"]
        return callback

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what LightningCLI does not have without a command such as `fit`."""
        parser.add_lightning_class_args(RouletteWheelPruning, "pruning")
        parser.add_argument("--ckpt_path", type=str | None, help="Where the weights are: a checkpoint or a state dict.")
        parser.add_argument("--weights_only", type=bool | None, help="See torch.load.")
        for name in ("optimizer", "lr_scheduler"):
            parser.add_argument(f"--{name}", type=Any, help="Not used: nothing is trained.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line. The callback of a configuration becomes the default of `pruning`."""
        for part in self.given.nameless:
            parser.error(f"{part} has arguments in the configuration, but no class. Add --{part} my_module.MyClass")
        config = parser.parse_args(self.given.in_order)
        if (own := _of_configuration(config)) is not None:
            parser.set_defaults({"pruning": own.init_args.as_dict()})
            config = parser.parse_args(self.given.in_order)
            config.trainer.callbacks = [one for one in _callbacks(config) if one.get("class_path") not in _PATHS]
        if config.pruning.at_epoch is not None:
            speak_up()
            log.info("RouletteWheelPruning: at_epoch has no effect here, because nothing is trained.")
            config.pruning.at_epoch = None
        self.config = config

    def after_instantiate_classes(self) -> None:
        """Let the pruned network be written, also if the Trainer writes no checkpoints."""
        if self.pruning.dirpath is None and not self.trainer.checkpoint_callbacks:
            self.pruning.dirpath = self.trainer.default_root_dir


def _of_configuration(config: Namespace) -> Namespace | None:
    """Return the RouletteWheelPruning among the callbacks of the Trainer."""
    return next((one for one in _callbacks(config) if one.get("class_path") in _PATHS), None)


def _callbacks(config: Namespace) -> list[Namespace]:
    found = config.trainer.callbacks or []
    return found if isinstance(found, list) else [found]
