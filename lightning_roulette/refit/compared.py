"""The calls of a network's first run with which a trial compares its own."""

from __future__ import annotations

from collections import Counter

from lightning_roulette.large.digests import digests_of
from lightning_roulette.network.containers import tensors_of
from lightning_roulette.network.samples import bytes_of
from lightning_roulette.refit.traversal import Call, Given, Step

_ALIKE = 2  # batches on which calls of a step are compared
_MOST = 3  # the same, if the last has inputs of another shape


class Compared:
    """Digests of the arguments of some calls of the first run.

    Each step is compared on the first two batches that call it, and on one more if the shapes of its arguments are
    others there. If a network keeps something between two layers, a second batch between them changes it. If it keeps
    something until the shape changes, a batch of another shape does. More batches would only repeat this.

    Attributes:
        digests: For each compared call, the digests of its arguments.
        sizes: For each step and batch, the bytes of the arguments of its largest call.
    """

    def __init__(self) -> None:
        self.digests: dict[Call, list[int]] = {}
        self.sizes: Counter[tuple[Step, int]] = Counter()
        self._shapes: dict[Step, dict[int, list[tuple[int, ...]]]] = {}  # of the first call on each compared batch

    @property
    def batches(self) -> list[int]:
        """Numbers of the batches with compared calls."""
        return sorted({call.batch for call in self.digests})

    def note(self, call: Call, given: Given) -> None:
        """Note a call of the first run."""
        tensors, place = tensors_of(given), (call.step, call.batch)
        self.sizes[place] = max(self.sizes[place], bytes_of(given))
        known = self._shapes.setdefault(call.step, {})
        if call.batch not in known and call.number == 0:
            shapes = [tuple(one.shape) for one in tensors]
            if len(known) < _ALIKE or (len(known) < _MOST and shapes not in known.values()):
                known[call.batch] = shapes
        if call.batch in known:
            self.digests[call] = digests_of(tensors)
