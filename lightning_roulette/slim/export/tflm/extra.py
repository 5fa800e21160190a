"""The wheel of TensorFlow Lite Micro, which is an optional extra: its runtime and the schema of its files."""

from __future__ import annotations

import importlib
from typing import Any

MISSING = (
    "format='tflm' needs the package tflite-micro, which holds the runtime and the schema of its files. "
    "Install the extra: pip install --pre 'lightning-roulette[tflm]'."
)


def runtime() -> Any:
    """The module `tflite_micro.runtime`.

    Raises:
        ImportError: If the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("tflite_micro").runtime
    except ModuleNotFoundError as error:
        raise ImportError(MISSING) from error


def schema() -> Any:
    """The module with the classes of a TensorFlow Lite file, as generated from its FlatBuffers schema.

    Raises:
        ImportError: If the package is not installed; the message names the extra.
    """
    return runtime().schema_fb
