"""What a file holds of a network's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_roulette.large.digests import digest_of

_WRAPPERS = {"_orig_mod", "_forward_module"}  # parts of names that compiled and wrapped modules add


@dataclass(frozen=True)
class Stored:
    """What a file holds of a network's weights.

    Attributes:
        differing: The names of the tensors that have other values in the file, another shape, or none.
        found: How many tensors of the network the file has.
        without: Whether the file has none of the weights that matter.
    """

    differing: tuple[str, ...]
    found: int
    without: bool

    @property
    def faithful(self) -> bool:
        """Whether the file holds the weights that matter, or some of them, and nothing else in their place."""
        return not self.differing and not self.without

    @classmethod
    def of(cls, state: Any, tensors: Mapping[str, Tensor], matter: Collection[str]) -> Stored:
        """Compare what a file holds with a network.

        A file may leave out tensors, have more of them, have them in another precision, and have a prefix in front of
        all names or leave out a common one.

        Args:
            state: The state dict of the file.
            tensors: Name to parameter or buffer of the network.
            matter: Names of weights. The file must have at least one of them.
        """
        state = state if isinstance(state, Mapping) else {}
        names = _names_in(state, tensors)
        differing = [name for name, stored in names.items() if not holds(state[stored], tensors[name])]
        return cls(tuple(differing), len(names), not any(name in names for name in matter))


def holds(stored: Any, value: Tensor) -> bool:
    """Whether a stored tensor has the values of another one, up to its precision. NaN equals NaN.

    Tensors that cannot be compared, such as quantised ones, are different.
    """
    if not isinstance(stored, Tensor) or stored.shape != value.shape:
        return False
    if stored.layout != torch.strided or value.layout != torch.strided:
        return stored.dtype == value.dtype and digest_of(stored) == digest_of(value)
    try:
        return _is_same(stored, value) or _equal(stored.detach().cpu(), value.detach().cpu().to(stored.dtype))
    except (RuntimeError, TypeError):
        return False


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape share one memory, so that nothing has to be compared."""
    return one.data_ptr() == other.data_ptr() != 0 and one.dtype == other.dtype and one.stride() == other.stride()


def _equal(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _names_in(state: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The name that each tensor of the network has in the file, if it is there."""
    plain = {_plain(key): key for key in state if isinstance(key, str)}
    ours = {_plain(name): name for name in tensors}
    if plain.keys() & ours.keys():
        return {ours[name]: plain[name] for name in ours if name in plain}
    some = list(ours)[:20]  # all have the same prefix
    found = Counter(change for name in some for key in plain if (change := _change(name, key)) is not None)
    if not found:
        return {}
    less, more = found.most_common(1)[0][0]
    changed = {name: more + name.removeprefix(less) for name in ours if name.startswith(less)}
    return {ours[name]: plain[key] for name, key in changed.items() if key in plain}


def _change(name: str, key: str) -> tuple[str, str] | None:
    """The prefix to remove from a name, and the one to add; None if a name and a key differ otherwise."""
    if key.endswith(f".{name}"):
        return "", key.removesuffix(name)
    return (name.removesuffix(key), "") if name.endswith(f".{key}") else None


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
