"""Whether code communicates with other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d", "fsdp")


class Communication(TorchDispatchMode):
    """Notes whether code inside the block calls an operator of `torch.distributed`.

    Attributes:
        seen: Whether it does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Call an operator."""
        self.seen = self.seen or func.namespace.startswith(_NAMESPACES)
        return func(*args, **(kwargs or {}))
