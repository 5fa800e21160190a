"""Heads of attention: of `nn.MultiheadAttention`, and of modules that hold projections of known names.

Groups are guesses from names and sizes. What they say is checked by `check.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.groups import Group, Member
from lightning_roulette.network.kinds import AffineKind, affine_kind_of
from lightning_roulette.network.lending import named_tensors

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
_PACKED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj")
_OUTPUT = ("o_proj", "out_proj", "c_proj", "proj", "out_lin", "dense", "o", "to_out.0", "output.dense")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True, eq=False)
class _Projection:
    """A linear layer of an attention."""

    name: str
    module: nn.Module

    @property
    def _kind(self) -> AffineKind:
        return affine_kind_of(self.module) or AffineKind(nn.Linear)

    @property
    def _matrix(self) -> Tensor:
        matrix: Tensor = getattr(self.module, self._kind.weight)
        return self._kind.matrix(matrix)

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self._matrix.shape[0]

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self._matrix.shape[1]

    def rows(self, units: Tensor) -> Iterator[Member]:
        """Yield the rows of the weight, and the bias."""
        kind = self._kind
        yield Member(f"{self.name}.{kind.weight}", int(kind.transposed), units)
        if kind.bias is not None and getattr(self.module, kind.bias, None) is not None:
            yield Member(f"{self.name}.{kind.bias}", 0, units)

    def columns(self, units: Tensor) -> Member:
        """Return the columns of the weight."""
        return Member(f"{self.name}.{self._kind.weight}", int(not self._kind.transposed), units)


def heads_of(network: nn.Module) -> dict[str, list[Group]]:
    """What the heads of each attention may be, by the name of the attention: the likeliest first."""
    parts = dict(network.named_modules())
    found = {}
    for name, part in parts.items():
        groups = [_torchs(name, part)] if isinstance(part, nn.MultiheadAttention) else list(_others(name, part, parts))
        if groups and groups[0].size > 1:
            found[name] = [one for group in groups for one in (*_with_tables(group, part), group)]
    return found


def _with_tables(group: Group, part: nn.Module) -> Iterator[Group]:
    """Yield a group with the other tensors of the attention that have a dimension for its heads, if there are some.

    Examples are tables of relative positions, and scales. First buffers are among them, then not. Buffers that are not
    in the state dict stay whole.
    """
    known = {one.name for one in (*group.producers, *group.consumers)}
    heads, prefix = _number(part, _HEADS) or group.size, f"{group.name}." if group.name else ""
    stored = part.state_dict()
    found = {
        f"{prefix}{own}": one
        for own, one in named_tensors(part).items()
        if own in stored and one.is_floating_point() and list(one.shape).count(heads) == 1
    }
    tables = {name: one for name, one in found.items() if name not in known and heads % group.size == 0}
    parameters = {name: one for name, one in tables.items() if isinstance(one, nn.Parameter)}
    units = torch.arange(heads) * group.size // heads
    for chosen in (tables, parameters) if len(parameters) < len(tables) else (tables,):
        members = [Member(name, one.shape.index(heads), units) for name, one in chosen.items()]
        if members:
            yield replace(group, producers=(*group.producers, *members))


def _torchs(name: str, part: nn.MultiheadAttention) -> Group:
    prefix = f"{name}." if name else ""
    width = part.num_heads * part.head_dim  # of all heads
    heads = torch.arange(width) // part.head_dim
    producers = [
        Member(f"{prefix}{own}", 0, heads.repeat(len(one) // width))
        for own in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
        if (one := getattr(part, own)) is not None
    ]
    producers += [Member(f"{prefix}{own}", 2, heads) for own in ("bias_k", "bias_v") if getattr(part, own) is not None]
    return Group(name, "head", part.num_heads, tuple(producers), (Member(f"{prefix}out_proj.weight", 1, heads),))


def _others(name: str, part: nn.Module, parts: dict[str, nn.Module]) -> Iterator[Group]:
    """Yield the groups that the projections of a module may form."""
    size, count = _number(part, _HEAD_SIZE), _number(part, _HEADS)
    output = _output(name, parts)
    if output is None or (size is None and count is None):
        return
    size = output.inputs // count if size is None and count else size
    if not size or output.inputs % size:
        return
    prefix = f"{name}." if name else ""
    for names in _SEPARATE:
        if all(f"{prefix}{own}" in parts for own in names):
            inputs = [_Projection(f"{prefix}{own}", parts[f"{prefix}{own}"]) for own in names]
            if all(_is_linear(one.module) and one.outputs % size == 0 for one in inputs):
                yield from _separate(name, inputs, output, size)
    for own in _PACKED:
        if _is_linear(parts.get(f"{prefix}{own}")):
            yield from _packed(name, _Projection(f"{prefix}{own}", parts[f"{prefix}{own}"]), output, size)


def _number(part: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first of several attributes that is a number: of a module, or of its configuration."""
    found = (getattr(one, name, None) for one in (part, getattr(part, "config", None)) for name in names)
    return next((one for one in found if isinstance(one, int)), None)


def _output(name: str, parts: dict[str, nn.Module]) -> _Projection | None:
    """Return the output projection: in the module of the attention, or beside it."""
    parent = name.rpartition(".")[0]
    for prefix in (name, parent):
        for own in _OUTPUT:
            place = f"{prefix}.{own}" if prefix else own
            if _is_linear(parts.get(place)):
                return _Projection(place, parts[place])
    return None


def _is_linear(part: nn.Module | None) -> bool:
    return part is not None and (isinstance(part, nn.Linear) or affine_kind_of(part) is not None)


def _separate(name: str, inputs: list[_Projection], output: _Projection, size: int) -> Iterator[Group]:
    """Yield the heads of three projections. Query heads that share a head of keys and values are one unit."""
    units = min(one.outputs // size for one in inputs)
    widths = [one.outputs for one in inputs] + [output.inputs]
    if any(width % (units * size) for width in widths):
        return
    rows = [torch.arange(width) * units // width for width in widths]
    producers = [member for one, row in zip(inputs, rows[:3], strict=True) for member in one.rows(row)]
    yield Group(name, "head", units, tuple(producers), (output.columns(rows[3]),))


def _packed(name: str, packed: _Projection, output: _Projection, size: int) -> Iterator[Group]:
    """Yield the heads of one projection for queries, keys and values: each whole, or head by head."""
    width, units = packed.outputs, output.inputs // size
    if width != 3 * output.inputs:
        return
    columns = output.columns(torch.arange(output.inputs) // size)
    for rows in (torch.arange(width) % output.inputs // size, torch.arange(width) // (3 * size)):
        yield Group(name, "head", units, tuple(packed.rows(rows)), (columns,))
