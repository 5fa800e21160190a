"""Units are cut out of the tensors of a network, and the sizes that its modules hold follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_roulette.network.coupling.graph import passes_channels
from lightning_roulette.network.coupling.groups import Group, Member
from lightning_roulette.network.coupling.narrow_attention import narrowed
from lightning_roulette.network.kinds import AffineKind, affine_kind_of
from lightning_roulette.network.parameters import TRANSPOSED

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim", "hidden_size", "dim")
_MISSING = object()
_OUTPUTS, _INPUTS = ("nf", "out_features", "outputs"), ("nx", "in_features", "inputs")


class Cut:
    """Changes of a network that can be taken back.

    Args:
        network: The network.

    Attributes:
        network: The network.
        sizes: The attributes that were set and kept, by the name of the module.
    """

    def __init__(self, network: nn.Module) -> None:
        self.sizes: dict[str, dict[str, Any]] = {}
        self.network = network
        self._left: dict[tuple[str, int], Tensor] = {}  # indices of the first network, of each dimension that was cut
        self._names = {part: name for name, part in network.named_modules()}
        # a convolution may pass channels only after a cut: its groups are those of the first network
        self._passing = {one for one in self._names if isinstance(one, _ConvNd) and passes_channels(one)}
        self._undo: list[Callable[[], object]] = []
        self._set_now: list[tuple[str, str, Any]] = []

    def remove(self, group: Group, dead: Tensor, is_same: Callable[[], bool]) -> str:
        """Cut the dead units of a group out of all tensors. One unit stays.

        Args:
            group: The group.
            dead: Shape `(size,)`, bool.
            is_same: Calls the network, and returns whether it gives what it gave before.

        Returns:
            Why the network is not the same with fewer units; empty if it is.
        """
        self._remove(group, dead)
        number = f"another number of its {group.word}"
        try:
            return "" if is_same() else f"the outputs of the network differ with {number}"
        except Exception:  # of a network that computes with numbers of units
            return f"the network cannot be called with {number}"

    def _remove(self, group: Group, dead: Tensor) -> None:
        stays = ~dead
        stays[0] |= not bool(stays.any())
        members = (*group.producers, *group.consumers)
        sizes = {part: self._sizes_of(part) for part in (self._owner(one.name) for one in members)}
        for member in members:
            self._cut(member, stays)
        for part, now in sizes.items():
            self._resize(part, now())
        if group.kind == "head":
            part = self.network.get_submodule(group.name)
            self._resize(part, _of_attention(part, group, stays))
            for encoder in self._names:  # its fused code takes no narrow heads
                if isinstance(encoder, nn.TransformerEncoder) and part in set(encoder.modules()):
                    self._resize(encoder, {"use_nested_tensor": False})

    def take_back(self) -> None:
        """Undo all that was done since the start or since the last `keep`."""
        while self._undo:
            self._undo.pop()()
        self._set_now.clear()

    def keep(self) -> None:
        """Keep what was done."""
        for module, name, value in self._set_now:
            self.sizes.setdefault(module, {})[name] = value
        self._undo.clear()
        self._set_now.clear()

    def _sizes_of(self, part: nn.Module) -> Callable[[], Mapping[str, Any]]:
        """What gives the sizes that a module should hold, by attribute, once its tensors are cut."""
        return _of_convolution(part, part in self._passing) if isinstance(part, _ConvNd) else _of_other(part)

    def _owner(self, name: str) -> nn.Module:
        return self.network.get_submodule(name.rpartition(".")[0])

    def _cut(self, member: Member, stays: Tensor) -> None:
        there = self._left.get((member.name, member.dim), torch.arange(len(member.units)))
        units = member.units[there]
        places = ((units < 0) | stays[units.clamp(min=0)]).nonzero().flatten()
        part, own = self._owner(member.name), member.name.rpartition(".")[2]
        holder: dict[str, Any] = part._parameters if own in part._parameters else part._buffers
        old = holder[own]
        new = old.detach().index_select(member.dim, places.to(old.device))
        self._put(holder, own, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        self._put(self._left, (member.name, member.dim), there[places])

    def _put(self, holder: dict[Any, Any], key: Any, value: Any) -> None:
        before = dict(holder)
        self._undo.append(lambda: holder.update(before) if key in before else holder.pop(key, None))
        holder[key] = value

    def _resize(self, part: nn.Module, sizes: Mapping[str, Any]) -> None:
        for name, value in sizes.items():
            before = getattr(part, name, _MISSING)
            if before != value:
                self._undo.append(partial(_set, part, name, before))
                setattr(part, name, value)
                self._set_now.append((self._names[part], name, value))


def _set(part: nn.Module, name: str, value: Any) -> None:
    if value is not _MISSING:
        setattr(part, name, value)
    elif hasattr(part, name):
        delattr(part, name)


def _of_attention(part: nn.Module, group: Group, stays: Tensor) -> Mapping[str, Any]:
    """The number of heads, and their width together, of an attention that holds some of `stays`."""
    if isinstance(part, nn.MultiheadAttention):
        return narrowed(part, stays)
    width, heads = len(group.consumers[0].units), int(stays.sum())
    known = {name: size for name in (*_COUNTS, *_WIDTHS) if isinstance(size := part.__dict__.get(name), int)}
    return {
        name: size // group.size * heads
        for name, size in known.items()
        if size % group.size == 0 and (name in _COUNTS or size == width)
    }


def _of_other(part: nn.Module) -> Callable[[], Mapping[str, Any]]:
    if isinstance(part, nn.Linear):
        return lambda: dict(zip(("out_features", "in_features"), part.weight.shape, strict=True))
    if isinstance(part, _NormBase):
        return lambda: _of_norm(part)
    if isinstance(part, nn.PReLU):
        return lambda: {"num_parameters": len(part.weight)}
    if isinstance(part, nn.Embedding):
        return lambda: {"embedding_dim": part.weight.shape[1]}
    kind = affine_kind_of(part)
    return dict if kind is None else _of_kind(part, kind)


def _of_kind(part: nn.Module, kind: AffineKind) -> Callable[[], Mapping[str, Any]]:
    before = kind.matrix(getattr(part, kind.weight)).shape
    known = [
        (name, place)
        for place, names in enumerate((_OUTPUTS, _INPUTS))
        for name in names
        if part.__dict__.get(name) == before[place]
    ]
    return lambda: {name: kind.matrix(getattr(part, kind.weight)).shape[place] for name, place in known}


def _of_norm(part: _NormBase) -> Mapping[str, int]:
    found = next((one for one in (part.weight, part.running_mean) if one is not None), None)
    return {} if found is None else {"num_features": len(found)}


def _of_convolution(part: _ConvNd, passes: bool) -> Callable[[], Mapping[str, int]]:
    each = part.out_channels // part.in_channels if passes else None

    def now() -> Mapping[str, int]:
        first, second = part.weight.shape[:2]
        if isinstance(part, TRANSPOSED):
            return {"in_channels": first, "out_channels": second * part.groups}
        groups = part.groups if each is None else first // each
        return {"out_channels": first, "in_channels": second * groups, "groups": groups}

    return now
