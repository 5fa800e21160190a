"""Packages that only some methods of a report need."""

from __future__ import annotations

import importlib
from typing import Any


def imported(module: str, method: str, extra: str) -> Any:
    """Return a module of an optional package.

    Args:
        module: Name of the module.
        method: What needs it, for the error.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: If it is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name != package:
            raise
        install = f"pip install 'lightning-roulette[{extra}]'"
        raise ImportError(
            f"{method} needs the package {package}. Install the extra: {install}.", name=package
        ) from error
