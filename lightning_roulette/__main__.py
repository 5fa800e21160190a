"""The command line: `python -m lightning_roulette prune --help`."""

import sys

from lightning_roulette.trainer.command.main import main

if __name__ == "__main__":
    main(sys.argv[1:])
