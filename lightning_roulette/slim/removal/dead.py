"""Which units are without effect: nothing reads them, or what they give is constant and is folded into a bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.groups import Group, Member
from lightning_roulette.network.hooks import Removable
from lightning_roulette.network.lending import lent, named_tensors
from lightning_roulette.slim.removal.constants import Folding, foldings_of


class DeadUnits:
    """The dead units of each group. Finding them changes the network, but not what it computes.

    A unit is dead if all entries that read it are zero. A unit whose weights are all zero is constant: it becomes dead
    when its constant is folded into the biases of what reads it, where that is exact. The entries that compute a dead
    unit are set to zero, which may leave further units dead.

    Args:
        network: The network, as `borrowed` lends it.
        groups: Its units.
        runs: What calls the network, with several inputs.
    """

    def __init__(self, network: nn.Module, groups: Sequence[Group], runs: Sequence[Callable[[], Any]]) -> None:
        self._groups, self._tensors = groups, named_tensors(network)
        self._foldings = foldings_of(network)
        self._runs = runs
        self.dead = {one.name: torch.zeros(one.size, dtype=torch.bool) for one in groups}
        self.constant = {one.name: torch.zeros(one.size, dtype=torch.bool) for one in groups}
        while self._unread() or self._folded():
            pass

    @torch.no_grad()
    def _unread(self) -> bool:
        """Find units that nothing reads, and set what computes them to zero. Return whether there are new ones."""
        found = False
        for group in self._groups:
            unread = ~self._any_entry(group.size, group.consumers)
            if bool((unread & ~self.dead[group.name]).any()):
                found = True
                self.dead[group.name] |= unread
                for member in group.producers:
                    _fill(self._tensors[member.name], member, unread)
        return found

    @torch.no_grad()
    def _folded(self) -> bool:
        """Fold the constants of units without weights. Return whether there were any."""
        waiting = {}
        for group in self._groups:
            weights = [one for one in group.producers if self._tensors[one.name].dim() > 1]
            silent = ~self._any_entry(group.size, weights) & ~self.dead[group.name]
            waiting[group.name] = silent & ~self.constant[group.name]
            self.constant[group.name] |= silent
        chosen = [group for group in self._groups if bool(waiting[group.name].any())]
        return bool(chosen) and self._fold(chosen, waiting)

    def _fold(self, groups: Sequence[Group], waiting: Mapping[str, Tensor]) -> bool:
        names = {member.name for group in groups for member in group.consumers}
        foldings = {name: one for name, one in self._foldings.items() if name in names}
        _listen([one.listening() for one in foldings.values()], self._runs)
        self._compare(foldings, groups, waiting)
        found = False
        for group in groups:
            exact = waiting[group.name].clone()
            for member in group.consumers:
                exact &= _exact(foldings.get(member.name), member, group.size)
            for member in group.consumers if bool(exact.any()) else ():
                chosen = (member.units >= 0) & exact[member.units.clamp(min=0)]
                foldings[member.name].fold(chosen)
                _fill(self._tensors[member.name], member, exact)
            found = found or bool(exact.any())
        return found

    def _compare(self, foldings: Mapping[str, Folding], groups: Sequence[Group], waiting: Mapping[str, Tensor]) -> None:
        """Look whether the units depend on the network's input, also with biases that no ReLU cuts off.

        What else is added to a unit, such as a mean over the inputs, would be hidden where a ReLU gives zero.
        """
        biases = [one for group in groups for one in group.producers if self._tensors[one.name].dim() == 1]
        waits = {id(one): waiting[group.name] for group in groups for one in group.producers}
        for value in (1.0, -1.0):
            with lent({one.name: self._tensors[one.name] for one in biases}):
                for one in biases:
                    own = abs(value) if one.name.endswith("running_var") else value
                    _fill(self._tensors[one.name], one, waits[id(one)], own)
                _listen([one.comparing() for one in foldings.values()], self._runs)
            for folding in foldings.values():
                folding.compare()

    def _any_entry(self, size: int, members: Sequence[Member]) -> Tensor:
        """Return for each unit whether an entry of it is not zero in any member."""
        found = torch.zeros(size, dtype=torch.int64)
        for member in members:
            found += _entries(self._tensors[member.name], member, size)
        return found > 0


def _entries(tensor: Tensor, member: Member, size: int) -> Tensor:
    """Number of indices of each unit at which a tensor has an entry that is not zero."""
    used = (tensor != 0).transpose(0, member.dim).flatten(1).any(1).cpu() if tensor.dim() > 1 else (tensor != 0).cpu()
    there = member.units >= 0
    return torch.zeros(size, dtype=torch.int64).index_add(0, member.units[there], used[there].long())


def _fill(tensor: Tensor, member: Member, chosen: Tensor, value: float = 0.0) -> None:
    places = ((member.units >= 0) & chosen[member.units.clamp(min=0)]).nonzero().flatten()
    tensor.index_fill_(member.dim, places.to(tensor.device), value)


def _listen(listening: Sequence[Iterator[Removable]], runs: Sequence[Callable[[], Any]]) -> None:
    hooks = [hook for one in listening for hook in one]
    try:
        for run in runs:
            run()
    finally:
        for hook in hooks:
            hook.remove()


def _exact(folding: Folding | None, member: Member, size: int) -> Tensor:
    """Whether each unit's constant may be folded into the bias of a layer that reads it."""
    if folding is None:
        return torch.zeros(size, dtype=torch.bool)
    there = member.units >= 0
    wrong = torch.zeros(size, dtype=torch.int64).index_add(0, member.units[there], (~folding.exact()[there]).long())
    return wrong == 0
