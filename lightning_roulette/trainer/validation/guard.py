"""Guards the parameters of a module: tells which of them a validation changes, and puts them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_roulette.large.copies import copies_of
from lightning_roulette.large.digests import digests_of
from lightning_roulette.large.shards import any_sharded, local, reshard
from lightning_roulette.network.hooks import every_call_seen
from lightning_roulette.network.lending import copy_into, surely
from lightning_roulette.network.parameters import owners_of
from lightning_roulette.trainer.pace import PacedCheck

_IN_USE = "while the network runs, its values are not those from before"
_AFTERWARDS = "afterwards its values are not those from before"


class Guard:
    """Guards the values of a module's parameters, by a copy and by digests.

    Args:
        module: The module. Parameters without values are not guarded.

    Attributes:
        changed: Names of parameters that had other values when the network ran, or had other values afterwards, each
            with a clause that says when.
        called: Names of parameters whose modules were called.
    """

    def __init__(self, module: nn.Module) -> None:
        reshard(module)  # otherwise gathered weights would be guarded, which have no memory between forwards
        self._parameters = {name: one for name, one in module.named_parameters() if _has_values(one)}
        self._before = copies_of(self._parameters)
        self._owned = _owned(module, self._parameters)
        self.changed: dict[str, str] = {}
        self.called: dict[str, None] = {}

    @contextmanager
    def watching(self, in_use: bool = True, puts_back: bool = True) -> Iterator[None]:
        """Watch the parameters while the network runs inside the block, and put back those that changed.

        They are compared at the end of the block with their values at its beginning, which may be lent. After an error
        all parameters are put back.

        Args:
            in_use: Whether each parameter is also compared when the module that owns it is first called. This finds
                weights that a validation replaces while it runs. Compiled code runs uncompiled then.
            puts_back: Whether those that changed are put back at the end of the block. Otherwise call `put_back`.
        """
        lent = _digests(self._parameters)

        def compare(names: Mapping[str, Tensor], when: str) -> None:
            now = _digests(names)
            for name in (one for one, digest in now.items() if digest != lent[one]):
                self.changed.setdefault(name, when)

        try:
            with ExitStack() as stack:
                if in_use and not any_sharded(self._parameters.values()):  # a forward gathers shards elsewhere
                    stack.enter_context(every_call_seen())
                    self._listen(stack, compare)
                yield
            compare(self._parameters, _AFTERWARDS)
        except BaseException:
            surely(lambda: copy_into(self._parameters, self._before))
            raise
        if puts_back:
            self.put_back()

    def put_back(self) -> None:
        """Put back the parameters that changed."""
        surely(lambda: copy_into(self._parameters, {name: self._before[name] for name in self.changed}))

    def _listen(self, stack: ExitStack, compare: Callable[[Mapping[str, Tensor], str], None]) -> None:
        for part, its in self._owned.items():
            stack.callback(part.register_forward_pre_hook(self._at_first_call(its, compare)).remove)

    def _at_first_call(
        self, its: Mapping[str, Tensor], compare: Callable[[Mapping[str, Tensor], str], None]
    ) -> Callable[..., None]:
        waits = True

        def before(*_: Any) -> None:
            nonlocal waits
            if waits:
                waits = False
                self.called |= dict.fromkeys(its)
                compare(its, _IN_USE)

        return before


def digests_of_parameters(module: nn.Module) -> dict[str, int]:
    """Return the digest of each parameter of a module that has values, by name."""
    reshard(module)
    return _digests({name: one for name, one in module.named_parameters() if _has_values(one)})


class Unmoved(PacedCheck):
    """Checks that weights keep their values while networks are validated.

    Args:
        weights: The weights, by name.
        by_time: See `PacedCheck`.
    """

    def __init__(self, weights: Mapping[str, Tensor], by_time: bool) -> None:
        super().__init__(by_time)
        self._weights = weights
        with self.measured():
            self._before = _digests(weights)

    def check(self) -> None:
        """Compare the weights with their values at the beginning.

        Raises:
            RuntimeError: If one of them differs.
        """
        with self.measured():
            now = _digests(self._weights)
        moved = [name for name, digest in self._before.items() if now[name] != digest]
        if moved:
            raise RuntimeError(
                f"RouletteWheelPruning: {', '.join(moved)} changed while candidates were validated. The scores do not "
                "belong to the masks, so the search ends, and nothing is pruned. Load the network from a checkpoint of "
                "the training, and find what writes these weights in validation."
            )


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the digest of each tensor, or of this process's shard of it."""
    return dict(zip(tensors, digests_of(local(one) for one in tensors.values()), strict=True))


def _has_values(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, UninitializedParameter) and not parameter.is_meta


def _owned(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[nn.Module, dict[str, Tensor]]:
    """Return the parameters of each module that owns some of them."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for name, (owner, _) in owners_of(module).items():
        if name in parameters:
            found.setdefault(owner, {})[name] = parameters[name]
    return found
