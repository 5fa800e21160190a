"""The steps of optimizers of every kind, seen from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.optim import Optimizer

from lightning_roulette.network.hooks import Removable

Action = Callable[..., None]


def with_inner(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Each optimizer, and after it the optimizers of torch that it wraps: those in its attributes, and theirs."""
    seen: set[int] = set()
    ahead = list(optimizers)
    while ahead:
        one = ahead.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        ahead[:0] = [inner for value in getattr(one, "__dict__", {}).values() for inner in _optimizers_in(value)]


def _optimizers_in(value: Any) -> list[Optimizer]:
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [one for one in several if isinstance(one, Optimizer)]


def watch_steps(optimizer: Any, before: Action, after: Action) -> list[Removable]:
    """Call `before` and `after` around every step of an optimizer.

    - For an optimizer of torch these are its own hooks.
    - For any other, its `step` is replaced on the object. This includes subclasses of `Optimizer` that never called
      `Optimizer.__init__`, and those that share the attributes of an optimizer which they wrap: torch calls the hooks
      of these too early or never.

    Returns:
        Handles that end this; none if the steps cannot be watched, because the object accepts no new attribute.
    """
    if getattr(getattr(type(optimizer), "step", None), "hooked", False) and _has_hooks(optimizer):
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        return [_WatchedStep(optimizer, before, after)]
    except AttributeError:  # the class has __slots__, or a `step` that is read only
        return []


def watch_loads(optimizer: Any, after: Action) -> list[Removable]:
    """Call `after(optimizer)` whenever an optimizer of torch has loaded a state. Others are not watched."""
    return [optimizer.register_load_state_dict_post_hook(after)] if _has_hooks(optimizer) else []


def _has_hooks(optimizer: Any) -> bool:
    """Whether hooks can be registered. They cannot if `Optimizer.__init__` was never called."""
    if not isinstance(optimizer, Optimizer):
        return False
    try:
        optimizer.register_step_post_hook(_nothing).remove()
        optimizer.register_load_state_dict_post_hook(_nothing).remove()
    except AttributeError:
        return False
    return True


def _nothing(*_: Any) -> None:
    pass


class _WatchedStep:
    """A `step` on an object, in place of the one that it had."""

    def __init__(self, optimizer: Any, before: Action, after: Action) -> None:
        self._optimizer, self._watching = optimizer, True
        self._own = vars(optimizer).get("step") if hasattr(optimizer, "__dict__") else None
        step = optimizer.step

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._watching:
                return step(*args, **kwargs)
            before()
            result = step(*args, **kwargs)
            after()
            return result

        self._step = watched
        optimizer.step = watched

    def remove(self) -> None:
        """Put the old `step` back. If it was replaced since, only the watching ends."""
        self._watching = False
        if vars(self._optimizer).get("step") is not self._step:
            return
        if self._own is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._own
