"""A trial before a search: is validation a function of the weights, and does it leave them as they are?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from lightning_roulette.large.limits import are_few
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.lending import applied
from lightning_roulette.trainer.validation.guard import Guard
from lightning_roulette.trainer.validation.logged import Logged

_Weights = Mapping[str, nn.Parameter]


class WeightsChanged(RuntimeError):
    """Validation changes a prunable weight."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a network logged: dense, with all prunable weights at zero, and dense again.

    Attributes:
        dense: Logged by the dense network.
        at_zero: Logged at zero weights. None if validation failed there, or if the network is too large for it.
        again: Logged by the dense network after the others.
        called: Whether the module of a prunable weight was called.
    """

    dense: Logged
    at_zero: Logged | None
    again: Logged
    called: bool


def tried(guard: Guard, weights: _Weights, run: Callable[[], Logged], carrying: AbstractContextManager[None]) -> Trial:
    """Validate a network dense, at zero weights, without every eighth weight, and dense again.

    Args:
        guard: Guards the parameters of the network.
        weights: Its prunable parameters.
        run: Validates the network as it is, always on the same data.
        carrying: Inside this context nothing but the weights is put back between validations.

    Raises:
        WeightsChanged: If validation changes a prunable weight. The network has its old values then.
    """

    def logged(mask: Mask) -> Logged:
        with applied(mask, weights), guard.watching(puts_back=False):
            found = run()
        refuse_changed(guard.changed, weights)
        return found

    try:
        with carrying:
            dense = logged(Mask({}))
            at_zero = _if_possible(lambda: logged(Mask.nothing(weights))) if are_few(weights.values()) else None
            if not any_sharded(weights.values()):
                _if_possible(lambda: logged(Mask.thinned(weights)))
            again = logged(Mask({}))
    finally:
        guard.put_back()
    return Trial(dense, at_zero, again, any(name in guard.called for name in weights))


def _if_possible(logged: Callable[[], Logged]) -> Logged | None:
    """Return what a pruned network logs; None if its validation fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return logged()
        except WeightsChanged:
            raise
        except Exception:
            return None


def refuse_changed(changed: Mapping[str, str], prunable: Iterable[str], what: str = "validation") -> None:
    """Raise if a prunable weight is among the parameters that a validation has changed.

    Args:
        changed: Names of parameters, each with a clause that says when it changed.
        prunable: Names of the prunable weights.
        what: What has changed them, for the error message.

    Raises:
        WeightsChanged: If one of them is prunable.
    """
    found = [name for name in prunable if name in changed]
    if not found:
        return
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise WeightsChanged(
        f"RouletteWheelPruning: {what} changes the prunable weight {found[0]!r}{more}: {changed[found[0]]}. The "
        "scores would belong to another network than the one that is kept. Likely causes: (1) A hook swaps the weights "
        "around validation, for example with optimizer.eval() and optimizer.train() of a schedule-free optimizer, or "
        "for averaged weights. Train without RouletteWheelPruning, save the weights that are validated, load them "
        "into a module without the swap, and prune that module. For averages use lightning's WeightAveraging callback. "
        "(2) The network normalises or clips its weights in place when it runs. Let it compute with a changed copy "
        f"instead, or pass exclude=[{found[0]!r}]."
    )
