"""coremltools, which is an optional extra."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

MISSING = (
    "format='coreml' needs the package coremltools, which writes its files. "
    "Install the extra: pip install 'lightning-roulette[coreml]'."
)


def imported(module: str) -> Any:
    """A module of coremltools.

    Raises:
        ImportError: If it is not installed; the message names the extra.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(MISSING) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What coremltools says, which its users cannot change, is not shown: warnings, log lines and bars."""
    logger = logging.getLogger("coremltools")
    before = logger.disabled
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before
