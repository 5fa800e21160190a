"""Constants that a layer reads, and their place in its bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_roulette.network.hooks import Removable
from lightning_roulette.network.kinds import AffineKind, affine_kind_of
from lightning_roulette.network.parameters import CONVOLUTIONS


class Folding:
    """The inputs of a layer that were equal in all calls, and how they are folded into its bias.

    Args:
        module: A linear layer, or a convolution that is not transposed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kind = affine_kind_of(module) or AffineKind(nn.Linear)
        self._values: Tensor | None = None  # of each input, nan where it differs
        self._varies: Tensor | None = None  # whether each input depends on what the network is given
        self._calls: list[Tensor] = []
        self._bias = getattr(module, self._kind.bias or "", None)

    def listening(self) -> Iterator[Removable]:
        """Yield hooks that look at the inputs of all calls, until they are removed."""
        self._values = self._varies = None
        yield cast(Removable, self._module.register_forward_pre_hook(self._look, with_kwargs=True))

    def comparing(self) -> Iterator[Removable]:
        """Yield hooks that compare the inputs of the calls of two runs, until they are removed."""
        self._calls.clear()
        yield cast(Removable, self._module.register_forward_pre_hook(self._hold, with_kwargs=True))

    def compare(self) -> None:
        """Take an input for no constant if it differed between the calls of the first run and those of the second."""
        half, calls = len(self._calls) // 2, self._calls
        for one, other in zip(calls[:half], calls[half:], strict=False):
            differs = (one != other).any(0) if one.shape == other.shape else torch.ones_like(one[0], dtype=torch.bool)
            self._varies = differs if self._varies is None else self._varies | differs
        self._calls = []

    def exact(self) -> Tensor:
        """Whether each column of the weight reads a constant that can be folded, or zero. Shape `(columns,)`."""
        if self._values is None or self._varies is None:
            return torch.zeros(self._columns, dtype=torch.bool)
        foldable = self._bias is not None and not _is_padded(self._module)
        each = (~self._values.isnan() if foldable else self._values == 0) & ~self._varies
        return each.reshape(-1, self._columns).all(0).cpu()

    @torch.no_grad()
    def fold(self, chosen: Tensor) -> None:
        """Add what the chosen columns contribute to the bias.

        Args:
            chosen: Shape `(columns,)`. They may be folded.
        """
        if self._values is None or self._bias is None or not bool((values := self._values.double()).nan_to_num().any()):
            return
        wanted = chosen.to(values.device).repeat(len(values) // self._columns)
        each = torch.where(wanted, values, 0.0).reshape(-1, self._columns, 1)
        matrices = self._matrix.double().reshape(len(each), -1, self._columns)
        self._bias.copy_(self._bias.double() + (matrices @ each).flatten())

    @property
    def _matrix(self) -> Tensor:
        """The sum of the weight over positions, shape `(outputs, columns)`."""
        weight: Tensor = self._kind.matrix(getattr(self._module, self._kind.weight).detach())
        return weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight

    @property
    def _columns(self) -> int:
        weight: Tensor = self._kind.matrix(getattr(self._module, self._kind.weight).detach())
        return weight.shape[1]

    def _look(self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        rows = _rows(module, arguments, named)
        first = rows[0] if self._values is None else self._values
        self._values = torch.where((rows == first).all(0), first, torch.nan)

    def _hold(self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._calls.append(_rows(module, arguments, named).detach().clone())


def foldings_of(network: nn.Module) -> dict[str, Folding]:
    """The layers whose biases can take constants, by the names of their weights."""
    found = {}
    for name, part in network.named_modules():
        kind = affine_kind_of(part)
        if kind is not None or isinstance(part, (nn.Linear, *CONVOLUTIONS)):
            weight = "weight" if kind is None else kind.weight
            found[f"{name}.{weight}" if name else weight] = Folding(part)
    return found


def _rows(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return what a layer is called with, shape `(samples and positions, inputs)`."""
    given: Tensor = arguments[0] if arguments else next(iter(named.values()))
    if isinstance(module, _ConvNd):
        batched = given.dim() == module.weight.dim()
        return given.transpose(0, 1).flatten(1).T if batched else given.flatten(1).T
    return given.reshape(-1, given.shape[-1])


def _is_padded(part: nn.Module) -> bool:
    """Whether a convolution reads zeros beyond the border."""
    if not isinstance(part, _ConvNd) or part.padding_mode != "zeros":
        return False
    if isinstance(part.padding, str):
        return part.padding == "same" and any(size > 1 for size in part.kernel_size)
    return any(part.padding)
