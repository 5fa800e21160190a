"""The outputs of a network on which nothing later depends, as its modules give them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.hooks import Enough, run_with_hooks
from lightning_roulette.refit.backward_run import NoGradients, first_floating, turn_gradients_on, with_floating
from lightning_roulette.refit.owners import calls_in


class LastOutputs:
    """The last outputs of some modules, in runs of a network on pieces of data.

    An output is a last one if no later output of these modules depends on it. Those of a classifier are the outputs of
    its last layer.

    Args:
        modules: The modules. Parameters of all of them need gradients while this is used.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._known: dict[int, tuple[int, list[int]]] = {}  # for each piece: calls, and which outputs are last ones

    def of(self, number: int, piece: Callable[[], object]) -> list[Tensor]:
        """Return the last outputs in a run. They can be differentiated.

        Args:
            number: Number of the piece. Its first run finds which outputs are last ones.
            piece: Runs the network.

        Raises:
            NoGradients: If they cannot be differentiated, or if the network calls fewer modules than in the first run.
        """
        if number not in self._known:
            calls = calls_in(piece, self._modules).total()
            seen = self._run(piece, calls, range(calls))
            self._known[number] = calls, _last(seen)
        else:
            seen = self._run(piece, *self._known[number])
        _, places = self._known[number]
        if len(seen) <= places[-1]:
            raise NoGradients("the network calls other layers after its weights have changed")
        return [seen[place] for place in places]

    def _run(self, piece: Callable[[], object], calls: int, places: Container[int]) -> list[Tensor]:
        """Return the outputs of the first calls in a run. It ends there: what follows may not work with gradients.

        The network goes on with copies of the outputs at some places, so that they stay as they are if it writes to
        them.
        """
        seen: list[Tensor] = []
        left = calls

        def begin(part: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            turn_gradients_on()

        def meet(part: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            nonlocal left
            left -= 1
            place, tensor = first_floating(output)
            if tensor is not None and tensor.requires_grad:
                if len(seen) in places:
                    output = with_floating(output, place, tensor.clone())
                seen.append(tensor)
            if not left:
                raise Enough
            return output

        run_with_hooks(piece, self._modules, before=begin, after=meet)
        return seen


def _last(outputs: list[Tensor]) -> list[int]:
    """Return the places of the outputs on which no later one depends, in order.

    Raises:
        NoGradients: If there is none.
    """
    reached: set[int] = set()
    found: list[int] = []
    for place in reversed(range(len(outputs))):
        if place in reached:
            continue
        found.insert(0, place)
        earlier = [one for one in range(place) if one not in reached]
        if earlier:
            given = torch.autograd.grad(
                outputs[place].sum(), [outputs[one] for one in earlier], retain_graph=True, allow_unused=True
            )
            reached |= {one for one, derivative in zip(earlier, given, strict=True) if derivative is not None}
    if not found:
        raise NoGradients("the network's outputs have no derivatives with respect to its weights")
    return found
