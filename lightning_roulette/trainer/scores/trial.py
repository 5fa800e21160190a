"""A trial before a search: is validation a function of the weights, and does it leave them as they are?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_roulette.large.copies import copies_of
from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.lending import applied, copy_into, surely
from lightning_roulette.trainer.validation.logged import Logged
from lightning_roulette.trainer.validation.watch import Watch, watched

_Weights = Mapping[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class Trial:
    """What a network logged: dense, with all prunable weights at zero, and dense again.

    Attributes:
        dense: Logged by the dense network.
        at_zero: Logged at zero weights. None if validation failed there, or if the network is too large for it.
        again: Logged by the dense network after the others.
        called: Whether the module of a prunable weight was called.
        restless: Names of parameters that are not prunable and that validation changed. They were put back.
    """

    dense: Logged
    at_zero: Logged | None
    again: Logged
    called: bool
    restless: tuple[str, ...]


def tried(module: nn.Module, weights: _Weights, run: Callable[[], Logged]) -> Trial:
    """Validate a network dense, at zero weights, without every eighth weight, and dense again.

    Args:
        module: The network.
        weights: Its prunable parameters.
        run: Validates the network as it is, always on the same data.

    Raises:
        RuntimeError: If validation changes a prunable weight. The network has its old values then.
    """
    trying = _Trying(module, weights, run)
    dense = trying.logged(Mask({}))
    at_zero = trying.logged_if_possible(Mask.nothing(weights)) if _is_small(weights) else None
    if not any_sharded(weights.values()):
        trying.logged_if_possible(Mask.thinned(weights))
    called = any(name in trying.called for name in weights)
    return Trial(dense, at_zero, trying.logged(Mask({})), called, tuple(trying.restless))


def refuse_changed(changed: Mapping[str, str], prunable: Iterable[str], what: str = "validation") -> None:
    """Raise if a prunable weight is among the parameters that a validation has changed.

    Args:
        changed: Names of parameters, each with a clause that says when it changed.
        prunable: Names of the prunable weights.
        what: What has changed them, for the error message.

    Raises:
        RuntimeError: If one of them is prunable.
    """
    found = [name for name in prunable if name in changed]
    if not found:
        return
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise RuntimeError(
        f"RouletteWheelPruning: {what} changes the prunable weight {found[0]!r}{more}: {changed[found[0]]}. Then "
        "another network would be judged than the one that is kept. Likely causes: (1) A hook swaps the weights around "
        "validation, for example with optimizer.eval() and optimizer.train() of a schedule-free optimizer, or for "
        "averaged weights. Train without RouletteWheelPruning, save the weights that are validated, load them into a "
        "module without the swap, and prune that module. For averages use lightning's WeightAveraging callback. "
        "(2) The network normalises or clips its weights in place when it runs. Let it compute with a changed copy "
        f"instead, or pass exclude=[{found[0]!r}]."
    )


class _Trying:
    """Validates pruned networks, and puts back what the validation has changed.

    Args:
        module: See `tried`.
        weights: See `tried`.
        run: See `tried`.

    Attributes:
        called: Names of parameters whose modules were called.
        restless: See `Trial`.
    """

    def __init__(self, module: nn.Module, weights: _Weights, run: Callable[[], Logged]) -> None:
        self._module, self._weights, self._run = module, weights, run
        self._everything = parameters_of(module)
        self._before = copies_of(self._everything)
        self.called: dict[str, None] = {}
        self.restless: dict[str, None] = {}

    def logged(self, mask: Mask) -> Logged:
        """Return what the network logs with a mask, which need not name all weights."""
        logged, watch = self._run_with(mask)
        self._take(watch)
        return logged

    def logged_if_possible(self, mask: Mask) -> Logged | None:
        """Return what the network logs with a mask; None if its validation fails, as it may at zero weights."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                logged, watch = self._run_with(mask)
            except Exception:
                return None
        self._take(watch)
        return logged

    def _run_with(self, mask: Mask) -> tuple[Logged, Watch]:
        try:
            with applied(mask, self._weights), watched(self._module, self._everything) as watch:
                logged = self._run()
        except BaseException:  # what has changed by then is not known
            surely(lambda: copy_into(self._everything, self._before))
            raise
        copy_into(self._everything, {name: self._before[name] for name in watch.changed})
        return logged, watch

    def _take(self, watch: Watch) -> None:
        refuse_changed(watch.changed, self._weights)
        self.restless |= dict.fromkeys(watch.changed)
        self.called |= watch.called


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that have values, by name."""
    named = module.named_parameters()
    return {name: one for name, one in named if not isinstance(one, UninitializedParameter) and not one.is_meta}


def _is_small(weights: _Weights) -> bool:
    return sum(weight.numel() for weight in weights.values()) <= limits().held_weights
