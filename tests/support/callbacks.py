"""Callbacks that act or count in the hooks of a fit."""

from __future__ import annotations

import itertools

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback

HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)
ALL_HOOKS = [name for name in dir(Callback) if name.startswith("on_")]


def within(hook, action, times=3):
    """A callback that calls `action(trainer, module)` in one hook of `fit`, at the first calls of the hook."""
    calls = itertools.count()

    def call(self, trainer, module, *_):
        if not trainer.sanity_checking and next(calls) < times:
            action(trainer, module)

    return type("Within", (Callback,), {hook: call})()


def counting_class(count):
    """A callback that passes the name of each of its hooks to `count`."""
    return type("Counting", (Callback,), {name: lambda self, *_, name=name, **__: count(name) for name in ALL_HOOKS})()


def counting_lambdas(count):
    """The same as a `LambdaCallback`, which has fewer hooks."""
    hooks = [name for name in ALL_HOOKS if name in LambdaCallback.__init__.__annotations__]
    return LambdaCallback(**{name: lambda *_, name=name: count(name) for name in hooks})
