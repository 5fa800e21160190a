"""Whether code communicates with other processes, beside what FSDP2 does to gather weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d")
_FSDP2 = ("torch.distributed.fsdp", "torch.distributed._composable")


class Communication(TorchDispatchMode):
    """Notes whether code inside the block calls an operator of `torch.distributed`. Calls by FSDP2 do not count.

    Attributes:
        seen: Whether it does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Call an operator."""
        self.seen = self.seen or (func.namespace.startswith(_NAMESPACES) and not _called_by_fsdp2())
        return func(*args, **(kwargs or {}))


def _called_by_fsdp2() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_FSDP2):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
