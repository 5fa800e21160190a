"""The wheel of ExecuTorch, which is an optional extra."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

MISSING = (
    "format='executorch' needs the package executorch, which exports and runs its files. "
    "Install the extra: pip install 'lightning-roulette[executorch]'."
)


def imported(module: str) -> Any:
    """A module of ExecuTorch, or of what it needs.

    Raises:
        ImportError: If it is not installed; the message names the extra.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ExecuTorch and torchao use what newer versions of PyTorch deprecate
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(MISSING) from error
