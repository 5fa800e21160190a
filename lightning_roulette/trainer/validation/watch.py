"""Tells which parameters have other values while a network runs, or after it, than before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_roulette.large.digests import digest_of
from lightning_roulette.large.shards import any_sharded, local
from lightning_roulette.network.hooks import every_call_seen
from lightning_roulette.network.parameters import owners_of


@dataclass(eq=False)
class Watch:
    """What was seen of some parameters while a network ran.

    Attributes:
        changed: Names of parameters that had other values when the network ran, or have other values afterwards, each
            with a clause that says when.
        called: Names of parameters whose modules were called.
    """

    changed: dict[str, str] = field(default_factory=dict)
    called: dict[str, None] = field(default_factory=dict)


@contextmanager
def watched(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[Watch]:
    """Compare parameters with their values before the block, by digests.

    A parameter is compared when the module that owns it is first called, and at the end of the block. The first finds
    weights that a validation swaps for others and then swaps back.

    Args:
        module: The network, which runs inside the block.
        parameters: Some of its parameters, by name.

    Yields:
        What was seen; it is complete after the block.
    """
    watch, before = Watch(), {name: digest_of(local(one)) for name, one in parameters.items()}

    def compare(names: Mapping[str, Tensor], when: str) -> None:
        for name, one in names.items():
            if digest_of(local(one)) != before[name]:
                watch.changed.setdefault(name, when)

    with ExitStack() as stack:
        stack.enter_context(every_call_seen())
        if not any_sharded(parameters.values()):  # a forward gathers shards into other tensors
            for part, its in _owned(module, parameters).items():
                stack.callback(part.register_forward_pre_hook(_AtFirstCall(watch, its, compare)).remove)
        yield watch
    compare(parameters, "it has other values afterwards than before")


class _AtFirstCall:
    """A hook that compares the parameters of a module at its first call."""

    def __init__(self, watch: Watch, its: Mapping[str, Tensor], compare: Any) -> None:
        self._watch, self._its, self._compare = watch, its, compare

    def __call__(self, *_: Any) -> None:
        if not self._watch.called.keys() >= self._its.keys():
            self._watch.called |= dict.fromkeys(self._its)
            self._compare(self._its, "it has other values when the network runs than before")


def _owned(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[nn.Module, dict[str, Tensor]]:
    """Return the parameters of each module that owns some of them."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for name, (owner, _) in owners_of(module).items():
        if name in parameters:
            found.setdefault(owner, {})[name] = parameters[name]
    return found
