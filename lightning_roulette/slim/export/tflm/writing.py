"""`export(..., format="tflm")`: the file, and what it takes in the runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_roulette.slim.export.exported import Exported, StoredLayer
from lightning_roulette.slim.export.integers import IntegerProgram
from lightning_roulette.slim.export.operations import Conv2d, Linear, Program
from lightning_roulette.slim.export.quantised import quantise
from lightning_roulette.slim.export.rescaling import to_floats, to_integers
from lightning_roulette.slim.export.tflm.decoding import COST, encoded_size, gets_smaller
from lightning_roulette.slim.export.tflm.extra import runtime
from lightning_roulette.slim.export.tflm.interpreter import Interpreter, load
from lightning_roulette.slim.export.tflm.latency import times_of
from lightning_roulette.slim.export.tflm.lowering import lowered, weight_name
from lightning_roulette.slim.export.tflm.memory import Packed, packed, smallest
from lightning_roulette.slim.export.tflm.model import Model, StoredTensor
from lightning_roulette.slim.files.container import write_whole


def write(program: Program, path: Path, *, calibration: Tensor | None, max_ram: int | None = None) -> Exported:
    """Write a program as a TensorFlow Lite file for TensorFlow Lite Micro: int8, with a scale for each output.

    Weights that get smaller by it are stored as a bitmap and the values that are not zero. The device's runtime decodes
    them into memory when their layer runs.

    Args:
        program: The program.
        path: Where.
        calibration: Inputs as in use, for the scales of 8-bit integers.
        max_ram: The largest arena in bytes. Weights that do not fit into it decoded are decoded in parts, by outputs,
            or stay plain. None: no limit.

    Raises:
        ImportError: If tflite-micro is not installed.
        ValueError: If calibration inputs are missing, if the runtime has no operator for an operation, or if `max_ram`
            is too little.
    """
    runtime()
    integers = quantise(program, _given(calibration, max_ram))
    model = lowered(integers)
    plain, found = packed(model, {}), smallest(model, max_ram)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(found.file))
    return Exported(
        format="tflm",
        values="int8",
        files=(path,),
        flash=len(found.file),
        dense_flash=len(plain.file),
        ram=found.arena,
        layers=_layers(program, model, found),
        run=runner(integers, found),
        final=program.final,
        notes=_notes(integers, plain, found),
    )


def runner(integers: IntegerProgram, found: Packed) -> Callable[[Tensor], Tensor]:
    """What the runtime computes: from inputs in float32, shape `(n, ...)`, channels first, outputs in float32."""
    return partial(_run, load(found.model, found.file), integers)


def _run(interpreter: Interpreter, integers: IntegerProgram, inputs: Tensor) -> Tensor:
    given, made = (integers.scales[one.name] for one in (integers.program.input, integers.program.output))
    rows = _moved(to_integers(inputs, given), -3, -1).contiguous().numpy()
    outputs = torch.from_numpy(np.concatenate([interpreter(one[None]) for one in rows]))
    return _moved(to_floats(outputs, made), -1, -3).contiguous()


def _moved(values: Tensor, source: int, target: int) -> Tensor:
    """Images with the dimension of channels elsewhere; other values as they are."""
    return values.movedim(source, target) if values.ndim == 4 else values


def _given(calibration: Tensor | None, max_ram: int | None) -> Tensor:
    if calibration is None:
        raise ValueError(
            "calibration is None, but format='tflm' needs some hundred inputs as in use, to find the range of each "
            "value. Give a tensor of inputs or a loader of training data."
        )
    if max_ram is not None and (isinstance(max_ram, bool) or not isinstance(max_ram, int) or max_ram < 1):
        raise ValueError(f"max_ram is {max_ram!r}, but must be a number of bytes, at least 1, or None for no limit.")
    return calibration


def _layers(program: Program, model: Model, found: Packed) -> tuple[StoredLayer, ...]:
    weighted = [one for one in program.operations if isinstance(one, Linear | Conv2d)]
    tensors = [model.tensors[weight_name(one, program.operations)] for one in weighted]
    return tuple(_stored(one, tensor, found) for one, tensor in zip(weighted, tensors, strict=True))


def _stored(one: Linear | Conv2d, tensor: StoredTensor, found: Packed) -> StoredLayer:
    assert tensor.data is not None
    count = found.parts.get(tensor.name, 0)
    form = "dense" if not count else "bitmap" if count == 1 else f"bitmap in {count} parts"
    size = encoded_size(tensor.data) - COST if count else tensor.size
    return StoredLayer(one.name, tuple(one.weight.shape), int(np.count_nonzero(tensor.data)), form, size, tensor.size)


def _notes(integers: IntegerProgram, plain: Packed, found: Packed) -> tuple[str, ...]:
    given, made = (integers.scales[one.name] for one in (integers.program.input, integers.program.output))
    notes = [
        f"The input is int8: round(x / {given.scale:.9g}) {_signed(given.zero_point)}, images with channels last. The "
        f"output is {made.scale:.9g} * (y {_signed(-made.zero_point)}).",
        "The memory is the arena, by the runtime on this machine; with pointers of 32 bits it is less.",
    ]
    if found.parts:
        before, after = times_of(plain, found)
        notes.append(
            f"Decoding takes memory and time: with plain weights the arena has {plain.arena:,} bytes, and an inference "
            f"takes {after} on this machine, {after.seconds / before.seconds:.1f} times as long as with them."
        )
    left = [name for name, one in plain.model.tensors.items() if gets_smaller(one) and name not in found.parts]
    if left:
        notes.append(f"Plain because of max_ram: {', '.join(left)}. format='c' decodes no weights into memory.")
    return tuple(notes)


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"
