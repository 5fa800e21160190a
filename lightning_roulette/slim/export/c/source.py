"""The C source and its header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_roulette.slim.export.c import kernels, unweighted
from lightning_roulette.slim.export.c.memory import Memory, plan
from lightning_roulette.slim.export.c.tables import (
    Source,
    Table,
    add_table,
    float_text,
    layer_table,
    windows_table,
)
from lightning_roulette.slim.export.operations import (
    Activate,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Pool2d,
    Reshape,
    Value,
)


@dataclass(frozen=True, eq=False)
class Written:
    """The two texts, and what they take on a device.

    Attributes:
        header: The header.
        source: The source.
        tables: The constants of each operation.
        memory: Bytes of static memory.
    """

    header: str
    source: str
    tables: Sequence[Table]
    memory: int

    @property
    def flash(self) -> int:
        """Bytes of constants."""
        return sum(table.size for table in self.tables)


def written(source: Source, name: str) -> Written:
    """Return the C source of a program: a function `name` of an input and an output."""
    memory = plan(source.program)
    operations = source.program.operations
    tables = [_table(source, one, number) for number, one in enumerate(operations)]
    calls = [_call(source, one, number, memory, tables[number]) for number, one in enumerate(operations)]
    if memory.same[source.program.output.name] == source.program.input.name:
        calls.append(f"    copy({source.program.output.size}, input, output);\n")
    parts = [_opening(name), *_functions(source, tables), *_tables(tables), *_statics(source, memory)]
    parts.append(f"void {name}({_arguments(source, name.upper())})\n{{\n{''.join(calls)}}}\n")
    size = memory.size * _bytes(source) + 4 * _sums(source)
    return Written(_header(source, name, size, tables), "\n".join(parts), tables, size)


def _table(source: Source, operation: Operation, number: int) -> Table:
    if isinstance(operation, (Linear, Conv2d)):
        return layer_table(source, operation, number)
    if isinstance(operation, Add):
        return add_table(source, operation, number)
    return windows_table(operation, number) if isinstance(operation, (Pool2d, Pad)) else Table("", 0)


def _call(source: Source, operation: Operation, number: int, memory: Memory, table: Table) -> str:
    """Return the statement that runs an operation; nothing for a reshape."""
    if isinstance(operation, Reshape):
        return ""
    made = _place(source, operation.output, memory)
    if isinstance(operation, Add):
        first, second = (_place(source, one, memory) for one in (operation.first, operation.second))
        return f"    add(&add_{number}, {first}, {second}, {made});\n"
    given = _place(source, operation.input, memory)
    if isinstance(operation, (Linear, Conv2d)) and table.weights is not None:
        kind = "linear" if isinstance(operation, Linear) else "conv"
        return f"    {kind}_{table.weights.form}(&layer_{number}, {given}, {made});\n"
    if isinstance(operation, Activate):
        limits = ", ".join(source.limits(operation.output.name, operation.activation))
        return f"    activate({operation.output.size}, {limits}, {given}, {made});\n"
    channels = operation.output.shape[0]
    if isinstance(operation, Pool2d):
        return f"    {operation.kind}_pool(&windows_{number}, {channels}, {given}, {made});\n"
    zero = "0.0f" if source.integers is None else source.integers.scales[operation.output.name].zero_point
    return f"    pad(&windows_{number}, {channels}, {zero}, {given}, {made});\n"


def _place(source: Source, value: Value, memory: Memory) -> str:
    """Return where a value is."""
    name = memory.same[value.name]
    if name == source.program.input.name:
        return "input"
    if name == memory.same[source.program.output.name]:
        return "output"
    return f"arena + {memory.offsets[name]}"


def _functions(source: Source, tables: Sequence[Table]) -> list[str]:
    """Return the functions that the program needs, each before those that use it."""
    values, operations = source.values, source.program.operations
    forms = sorted({table.weights.form for table in tables if table.weights is not None})
    kinds = {type(one) for one in operations}
    pools = {one.kind for one in operations if isinstance(one, Pool2d)}
    layers = bool(kinds & {Linear, Conv2d})
    integers = values == "int8"
    needed: list[tuple[bool, str]] = [
        (bool(kinds & {Conv2d, Pool2d, Pad}), kernels.WINDOWS),
        (layers, kernels.LAYER[values]),
        (Conv2d in kinds, kernels.CONV),
        (Conv2d in kinds and integers, f"static int32_t sums[{_sums(source)}];\n"),
        ("bitmap" in forms or "gaps" in forms, kernels.BIT),
        ("gaps" in forms, kernels.RICE),
        (layers or bool(kinds & {Add, Activate}), kernels.CLAMP),
        (integers and (layers or Add in kinds), kernels.RESCALED),
        (layers, kernels.finished(values)),
        (Conv2d in kinds, kernels.SPREAD),
        *((True, kernels.linear(one, values)) for one in forms if _has(source, tables, Linear, one)),
        *((True, kernels.conv(one, values)) for one in forms if _has(source, tables, Conv2d, one)),
        ("max" in pools, unweighted.MAX_POOL),
        ("mean" in pools, unweighted.MEAN_POOL),
        (Add in kinds, unweighted.ADD[values]),
        (Pad in kinds, unweighted.PAD),
        (Activate in kinds, unweighted.ACTIVATE),
        (not kinds - {Reshape}, unweighted.COPY),
    ]
    return [kernels.typed(text, values) for wanted, text in needed if wanted]


def _has(source: Source, tables: Sequence[Table], kind: type, form: str) -> bool:
    return any(
        isinstance(one, kind) and table.weights is not None and table.weights.form == form
        for one, table in zip(source.program.operations, tables, strict=True)
    )


def _tables(tables: Sequence[Table]) -> list[str]:
    return [table.text for table in tables if table.text]


def _statics(source: Source, memory: Memory) -> list[str]:
    return [f"static {_kind(source)} arena[{memory.size}];\n"] if memory.size else []


def _sums(source: Source) -> int:
    """Return the number of sums of the largest channel that a convolution makes; none are needed for floats."""
    areas = [one.output.shape[1] * one.output.shape[2] for one in source.program.operations if isinstance(one, Conv2d)]
    return max(areas, default=0) if source.integers is not None else 0


def _kind(source: Source) -> str:
    return "float" if source.integers is None else "int8_t"


def _bytes(source: Source) -> int:
    return 4 if source.integers is None else 1


def _arguments(source: Source, prefix: str) -> str:
    kind = _kind(source)
    return f"const {kind} input[{prefix}_INPUT_SIZE], {kind} output[{prefix}_OUTPUT_SIZE]"


def _opening(name: str) -> str:
    floats = "#include <float.h>\n"
    return f'/* {name}.c, written by lightning_roulette: see {name}.h. */\n{floats}#include "{name}.h"\n'


def _header(source: Source, name: str, memory: int, tables: Sequence[Table]) -> str:
    prefix, program = name.upper(), source.program
    shapes = [" x ".join(map(str, one.shape)) for one in (program.input, program.output)]
    final = "" if program.final is None else f"   The {program.final} at the end of the network is not computed.\n"
    lines = [
        f"/* {name}.h, written by lightning_roulette: a neural network of {len(tables)} operations.\n",
        f"   Input: {shapes[0]}. Output: {shapes[1]}. Both are in the order of PyTorch: channel by channel.\n",
        f"{final}   Constants: {sum(one.size for one in tables):,} bytes. Static memory: {memory:,} bytes.\n",
        "   Not reentrant: all calls share this memory. */\n",
        f"#ifndef {prefix}_H\n#define {prefix}_H\n\n#include <stdint.h>\n\n",
        f"#define {prefix}_INPUT_SIZE {program.input.size}\n",
        f"#define {prefix}_OUTPUT_SIZE {program.output.size}\n",
        *_scale_macros(source, prefix),
        '\n#ifdef __cplusplus\nextern "C" {\n#endif\n',
        f"void {name}({_arguments(source, prefix)});\n",
        "#ifdef __cplusplus\n}\n#endif\n\n#endif\n",
    ]
    return "".join(lines)


def _scale_macros(source: Source, prefix: str) -> list[str]:
    """Return what the integers of input and output stand for."""
    if source.integers is None:
        return []
    lines = ["\n/* The integer i stands for SCALE * (i - ZERO_POINT). */\n"]
    for word, value in (("INPUT", source.program.input), ("OUTPUT", source.program.output)):
        scale = source.integers.scales[value.name]
        lines.append(f"#define {prefix}_{word}_SCALE {float_text(scale.scale)}\n")
        lines.append(f"#define {prefix}_{word}_ZERO_POINT ({scale.zero_point})\n")
    return [*lines[:1], *lines[1:]]
