"""`export(..., format="executorch")`: the file, and what it takes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_roulette.checks import check_choice
from lightning_roulette.slim.export.executorch.lowering import in_integers, to_pte
from lightning_roulette.slim.export.executorch.module import ProgramModule
from lightning_roulette.slim.export.executorch.runtime import Loaded
from lightning_roulette.slim.export.exported import Exported, StoredLayer
from lightning_roulette.slim.export.operations import Conv2d, Linear, Program
from lightning_roulette.slim.files.container import write_whole
from lightning_roulette.slim.measuring.timing import Latency

Values = Literal["float32", "int8"]
BYTES = {"float32": 4, "int8": 1}


def write(program: Program, path: Path, *, calibration: Tensor | None, values: Values = "float32") -> Exported:
    """Write a program as a .pte file for inputs of a batch of one, which XNNPACK computes.

    Args:
        program: The program.
        path: Where.
        calibration: Inputs as in use, for the scales of 8-bit integers. Not used for float32.
        values: Type of weights and values: "float32", or "int8" for a quarter of the bytes.

    Raises:
        ImportError: If ExecuTorch is not installed.
        ValueError: If `values` is unknown, or if calibration inputs are missing for "int8".
    """
    check_choice("values", values, tuple(BYTES))
    module: nn.Module = ProgramModule(program)
    module = module if values == "float32" else in_integers(module, _given(calibration))
    lowered = to_pte(module, torch.zeros(1, *program.input.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(lowered.file))
    loaded = Loaded(lowered.file)
    return Exported(
        format="executorch",
        values=values,
        files=(path,),
        flash=len(lowered.file),
        dense_flash=len(lowered.file),
        ram=lowered.planned,
        layers=tuple(_stored(one, values) for one in program.operations if isinstance(one, Linear | Conv2d)),
        run=loaded,
        final=program.final,
        notes=_notes(lowered.file, loaded.latency(program.input.shape)),
    )


def _given(calibration: Tensor | None) -> Tensor:
    if calibration is None:
        raise ValueError(
            "calibration is None, but values='int8' needs some hundred inputs as in use, to find the range of each "
            "value. Give a tensor of inputs or a loader of training data, or write values='float32'."
        )
    return calibration


def _stored(one: Linear | Conv2d, values: Values) -> StoredLayer:
    size = one.weight.numel() * BYTES[values]
    return StoredLayer(one.name, tuple(one.weight.shape), int(one.weight.count_nonzero()), "dense", size, size)


def _notes(file: bytes, latency: Latency) -> tuple[str, ...]:
    return (
        "XNNPACK computes with zeros as with other numbers: pruned weights make neither the file smaller nor an "
        "inference faster, outputs that were removed do. Deflated, as in the package of an app, the file has "
        f"{len(zlib.compress(file, 9)):,} bytes.",
        f"One inference takes {latency} on this machine. The memory is what the file plans; XNNPACK "
        "takes some for itself.",
    )
