"""Hooks on a network's modules while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

# Called before a module's forward: the module, its positional arguments, its keyword arguments.
BeforeCall = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]

# Called after a module's forward: the module, its positional arguments, its output. A result other than None replaces
# the output.
AfterCall = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class Removable(Protocol):
    """The handle that torch returns when a hook is registered."""

    def remove(self) -> None:
        """Remove the hook."""
        ...


class Enough(BaseException):
    """Raised by a hook to end the run early.

    It derives from `BaseException`, so an `except Exception` in the network does not catch it.
    """


@contextmanager
def every_call_seen() -> Iterator[None]:
    """Turn off fused attention and compiled code inside the block, because they skip hooks."""
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


def run_with_hooks(
    run: Callable[[], object],
    modules: Iterable[nn.Module],
    *,
    before: BeforeCall | None = None,
    after: AfterCall | None = None,
) -> None:
    """Call `run` without gradients while hooks listen to every call of some modules.

    A hook may raise `Enough` to end the run. All hooks are removed at the end, also after an exception.

    Args:
        run: Runs the network.
        modules: The modules that the hooks listen to.
        before: Called before each forward of these modules.
        after: Called after each forward of these modules.
    """
    try:
        with hooked(modules, before=before, after=after):
            run()
    except Enough:
        pass


@contextmanager
def hooked(
    modules: Iterable[nn.Module], *, before: BeforeCall | None = None, after: AfterCall | None = None
) -> Iterator[None]:
    """Hooks listen to every call of some modules inside the block, in all threads. This thread has no gradients.

    Args:
        modules: The modules.
        before: Called before each forward of these modules.
        after: Called after each forward of these modules.
    """
    hooks: list[Removable] = []
    listened = list(modules)
    known = {id(module) for module in listened}

    # a copy of a module that the network makes while it runs has the hooks, too
    def heard_before(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if before is not None and id(module) in known:
            before(module, arguments, named)

    def heard_after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return after(module, arguments, output) if after is not None and id(module) in known else None

    try:
        for module in listened:
            if before is not None:
                hooks.append(module.register_forward_pre_hook(heard_before, with_kwargs=True))
            if after is not None:
                hooks.append(module.register_forward_hook(heard_after))
        with every_call_seen(), torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
