"""`export(..., format="c")`: the files, and what they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from lightning_roulette.checks import check_choice
from lightning_roulette.slim.export.c.arm import compiled
from lightning_roulette.slim.export.c.kernels import Values
from lightning_roulette.slim.export.c.source import Written, written
from lightning_roulette.slim.export.c.tables import Source, Table, dense_size
from lightning_roulette.slim.export.exported import Exported, StoredLayer
from lightning_roulette.slim.export.integer_reference import run_as_floats
from lightning_roulette.slim.export.integers import IntegerProgram
from lightning_roulette.slim.export.operations import Conv2d, Linear, Program, Weighted
from lightning_roulette.slim.export.quantised import quantise
from lightning_roulette.slim.export.reference import run

_WORDS = """
auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while main
stdint
"""  # the last one is no word of C, but its header


def write(program: Program, path: Path, *, calibration: Tensor | None, values: Values = "int8") -> Exported:
    """Write a program as C99: `path` with the endings `.c` and `.h`.

    Args:
        program: The program.
        path: Where. Its last part, without an ending, is the name of the function.
        calibration: Inputs as in use, for the scales of 8-bit integers. Not used for float32.
        values: Type of weights and values: "int8" takes a quarter of the memory, and no floating point.

    Raises:
        ValueError: If `values` is unknown, if calibration inputs are missing, or if the name is no name in C.
    """
    check_choice("values", values, ("int8", "float32"))
    name, source = _function(path), _source(program, calibration, values)
    texts = written(source, name)
    _check_alone(path, name, texts.source)
    files = (path.with_name(f"{name}.c"), path.with_name(f"{name}.h"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(files, (texts.source, texts.header))
    layers = tuple(
        _stored(source, one, table)
        for one, table in zip(source.program.operations, texts.tables, strict=True)
        if isinstance(one, (Linear, Conv2d))
    )
    return Exported(
        format="c",
        values=values,
        files=files,
        flash=texts.flash,
        dense_flash=texts.flash + sum(one.dense - one.stored for one in layers),
        ram=_memory(source, texts),
        layers=layers,
        run=_runner(source),
        final=program.final,
        notes=_notes(files[0], texts),
    )


def sizes(program: Program, calibration: Tensor | None, values: Values) -> tuple[int, int]:
    """Return the bytes of flash and of memory that `write` gives for a program, without writing it."""
    source = _source(program, calibration, values)
    texts = written(source, "network")
    return texts.flash, _memory(source, texts)


def _source(program: Program, calibration: Tensor | None, values: Values) -> Source:
    integers = _integers(program, calibration, values)
    return Source(program if integers is None else integers.program, integers)


def _memory(source: Source, texts: Written) -> int:
    """Return the bytes of all values that are computed, and of the input and the output."""
    program = source.program
    return texts.memory + (program.input.size + program.output.size) * (4 if source.integers is None else 1)


def _integers(program: Program, calibration: Tensor | None, values: Values) -> IntegerProgram | None:
    if values == "float32":
        return None
    if calibration is None:
        raise ValueError(
            "calibration is None, but values='int8' needs some hundred inputs as in use, to find the range of each "
            "value. Give a tensor of inputs or a loader of training data, or write values='float32'."
        )
    return quantise(program, calibration)


def _function(path: Path) -> str:
    name = path.name.removesuffix(".c").removesuffix(".h")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in _WORDS.split():
        raise ValueError(
            f"path is {str(path)!r}, but its last part must be a name in C, as in 'firmware/digits.c': letters, digits "
            "and underscores."
        )
    return name


def _check_alone(path: Path, name: str, text: str) -> None:
    """Check that the source uses the name of its function for nothing else."""
    code = re.sub(r'/\*.*?\*/|"[^"]*"', "", text, flags=re.DOTALL)
    if len(re.findall(rf"\b{name}\b", code)) != 1:
        raise ValueError(
            f"path is {str(path)!r}, but the source uses the name {name!r} for something else. Choose another name."
        )


def _write(files: Sequence[Path], texts: Sequence[str]) -> None:
    """Write all files beside their places, and then move them there."""
    parts = [one.with_name(f"{one.name}.part") for one in files]
    try:
        for part, text in zip(parts, texts, strict=True):
            part.write_text(text)
        for part, file in zip(parts, files, strict=True):
            part.replace(file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _runner(source: Source) -> Callable[[Tensor], Tensor]:
    if source.integers is None:
        return partial(run, source.program)
    return partial(run_as_floats, source.integers)


def _stored(source: Source, layer: Weighted, table: Table) -> StoredLayer:
    assert table.weights is not None
    kept = int((source.weight(layer) != 0).sum())
    shape = tuple(layer.weight.shape)
    return StoredLayer(layer.name, shape, kept, table.weights.form, table.weights.size, dense_size(source, layer))


def _notes(source: Path, texts: Written) -> tuple[str, ...]:
    found = compiled(source)
    if found is None:
        return ()
    return (
        f"Compiled for a Cortex-M4 with -Os: {found.flash:,} bytes of flash, {found.flash - texts.flash:,} of them for "
        f"code and alignment, and {found.memory:,} bytes of static memory.",
    )
