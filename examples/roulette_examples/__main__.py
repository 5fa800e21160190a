"""Run an example by its name.

`python -m roulette_examples` lists the names. What follows a name overrides lines of its YAML file:

    python -m roulette_examples unet --trainer.max_epochs=2 --trainer.callbacks.tolerance=0.02
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_roulette import RouletteWheelPruning

CONFIGS = {file.stem: file for file in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


class ExampleCLI(LightningCLI):
    """A command line that prints the report of the search."""

    trainer: Trainer

    @property
    def pruning(self) -> RouletteWheelPruning:
        """The callback of the YAML file."""
        return next(one for one in self.trainer.callbacks if isinstance(one, RouletteWheelPruning))

    def after_fit(self) -> None:
        print(f"\n{self.pruning.report}")


def run(name: str, arguments: list[str]) -> ExampleCLI:
    """Train and prune the network of an example.

    Args:
        name: The name of the example.
        arguments: They override lines of its YAML file.
    """
    torch.set_num_threads(1)  # more threads are slower for tensors this small
    return ExampleCLI(args=["fit", "--config", str(CONFIGS[name]), *arguments], save_config_callback=None)


def summary(file: Path) -> str:
    """Return the first line of a YAML file, which says what the example is."""
    return file.read_text().splitlines()[0].removeprefix("# ")


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name not in CONFIGS:
        listed = "\n".join(f"  {one:10} {summary(file)}" for one, file in CONFIGS.items())
        sys.exit(f"usage: python -m roulette_examples NAME [--ARGUMENT=VALUE ...]\n\n{listed}")
    run(name, arguments)


if __name__ == "__main__":
    main()
