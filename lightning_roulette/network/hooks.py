"""Listening to the calls of a network's modules while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Removable(Protocol):
    """What a torch hook leaves in the hand of the one who registered it."""

    def remove(self) -> None:
        """Take the hook off."""
        ...


class Enough(BaseException):
    """Ends a run of which the rest is not needed; no `except Exception` of the network stops it."""


@contextmanager
def every_call_seen() -> Iterator[None]:
    """Inside the block no network is run by fused or compiled code that calls no hook."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
        if stance is None:
            yield
        else:
            with stance("force_eager"):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def listening(
    parts: Sequence[nn.Module] | dict[nn.Module, None],
    meet: Callable[[nn.Module, tuple[Any, ...], Any], Any],
    piece: Callable[[], object],
) -> None:
    """Run a network on some samples; `meet` is told of each call of these parts, and may give another output."""
    hooks: list[Removable] = []
    try:
        for part in parts:
            hooks.append(part.register_forward_hook(meet))
        with every_call_seen(), torch.no_grad():
            piece()
    except Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
