"""Calls of a network, one after another, that compute a product again only if one of its operands has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    {
        *(functional.linear, functional.bilinear, functional.scaled_dot_product_attention),
        *(torch.addmm, torch.baddbmm, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__),
        *(functional.conv1d, functional.conv2d, functional.conv3d),
        *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    }
)


def remembering(run: Callable[[], Any]) -> Callable[[], Any]:
    """What calls a network as `run` does, and keeps the products of the last call.

    After a change of some layers, a call computes these layers and what the change reaches. It returns what a first
    call returns. It must be called without gradients.
    """
    memory = _Memory()

    def again() -> Any:
        with memory:
            return run()

    return again


@dataclass(frozen=True, eq=False)
class _Product:
    """A product that was computed.

    Attributes:
        function: What computed it.
        operands: Copies of its arguments; of a parameter, itself and its version.
        named: The same of its named arguments.
        value: A copy of the product.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    named: Mapping[str, Any]
    value: Tensor

    def is_of(self, function: Callable[..., Any], operands: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """Whether a function of these arguments is this product."""
        return (
            function is self.function
            and (len(operands), named.keys()) == (len(self.operands), self.named.keys())
            and all(map(_is_same, self.operands, operands))
            and all(_is_same(one, named[name]) for name, one in self.named.items())
        )


class _Memory(TorchFunctionMode):
    """The products of the last call of a network, in the order in which they were computed."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, _Product] = {}
        self._place = 0

    def __enter__(self) -> Any:  # each call of the network begins here
        self._place = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func not in _PRODUCTS or "out" in named:
            return func(*args, **named)
        self._place += 1
        last = self._last.get(self._place)
        if last is not None and last.is_of(func, args, named):
            return last.value.clone()  # the next operation may change it in place
        value = func(*args, **named)
        operands, others = tuple(map(_kept, args)), {name: _kept(one) for name, one in named.items()}
        self._last[self._place] = _Product(func, operands, others, value.clone())
        return value


def _kept(one: Any) -> Any:
    if isinstance(one, nn.Parameter):
        return one, one._version
    return one.clone() if isinstance(one, Tensor) else one


def _is_same(kept: Any, one: Any) -> bool:
    if isinstance(one, nn.Parameter):
        return isinstance(kept, tuple) and kept[0] is one and bool(kept[1] == one._version)
    if not isinstance(one, Tensor):
        return not isinstance(kept, Tensor) and bool(kept == one)
    return isinstance(kept, Tensor) and _layout(kept) == _layout(one) and torch.equal(kept, one)


def _layout(one: Tensor) -> tuple[Any, ...]:
    return one.dtype, one.device, one.shape, one.stride()
