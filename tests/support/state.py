"""The state of a fit as something to compare, bit for bit."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchmetrics import Metric


class Same:
    """Equal only to a `Same` of the very same object."""

    def __init__(self, one):
        self.one = one

    def __eq__(self, other):
        return self.one is other.one


def content(value):
    """Return something that compares equal only if `value` is equal bit for bit.

    Tensors become bytes, containers and metrics become their contents, and other objects stay as they are.
    """
    if isinstance(value, torch.Tensor):
        known = value.detach().float() if value.dtype is torch.bfloat16 else value.detach()  # NumPy has no bfloat16
        return value.dtype, value.shape, known.numpy().tobytes()
    if isinstance(value, torch.Generator):
        return content(value.get_state())
    if isinstance(value, dict):
        return {key: content(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [content(one) for one in value]
    if isinstance(value, Metric) or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__")):
        return content(vars(value))
    return value


# Each validation makes an iterator. The names of metrics are looked up once.
UNSTABLE = {"combined_loader._iterator", "module._metric_attributes"}


def state_of(trainer, module):
    """Every attribute of the Trainer, loops, callbacks, loggers, loaders and modules, and every random state."""
    logs, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    owners = {
        "trainer": trainer,
        "trainer.state": trainer.state,
        "profiler": trainer.profiler,
        "fit_loop": trainer.fit_loop,
        "epoch_loop": trainer.fit_loop.epoch_loop,
        "val_loop": loop,
        "logger_connector": logs,
        "strategy": trainer.strategy,
        "combined_loader": SimpleNamespace() if loop._combined_loader is None else loop._combined_loader,
    }
    unused = [one for one in [loop._data_source.instance] if isinstance(one, DataLoader)]
    loaders = unused if loop._combined_loader is None else loop._combined_loader.flattened
    several = {"loader": loaders, "sampler": [one.sampler for one in loaders]}
    several |= {"callback": trainer.callbacks, "logger": trainer.loggers}
    owners |= {f"{kind}[{i}]": one for kind, listed in several.items() for i, one in enumerate(listed)}
    owners |= {f"module.{name}".rstrip("."): part for name, part in module.named_modules()}
    state = {f"{owner}.{name}": content(value) for owner, one in owners.items() for name, value in vars(one).items()}
    held = [trainer.callbacks, trainer.loggers, logs._callback_metrics, logs._logged_metrics]
    held += [logs._progress_bar_metrics, *module.parameters(), *module.buffers()]
    held += [group["lr"] for one in trainer.optimizers for group in one.param_groups]
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {name: value for name, value in state.items() if name not in UNSTABLE} | {
        "identities": [Same(one) for one in held],
        "chance": (torch.get_rng_state().numpy().tobytes(), random.getstate()),
        "numpy's chance": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "grad": torch.is_grad_enabled(),
        "gradients": content([parameter.grad for parameter in module.parameters()]),
        "optimizers": content([one.state_dict() for one in trainer.optimizers]),
        "schedulers": content([one.scheduler.state_dict() for one in trainer.lr_scheduler_configs]),
    }


def changed(before, after):
    """Names of the entries that differ between two dictionaries."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
