"""How many calibration batches a refit needs, if their rows are many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from lightning_roulette.large.processes import Processes
from lightning_roulette.network.layers import channels
from lightning_roulette.refit.matrices import RowSampler, rows_in
from lightning_roulette.refit.traversal import Call, Given, Step

# Rows of one sample are alike, so at most one in this many is taken: then 16,384 rows of a language model come from at
# least 1,000 windows of 64 positions.
_ROWS_FOR_EACH_CHOSEN = 4
_ROWS_OF_STATISTICS = 2**16


class RowCount:
    """The rows that each step has in the first batch.

    Args:
        sampler: Chooses rows from all batches.
    """

    def __init__(self, sampler: RowSampler) -> None:
        self._sampler = sampler
        self._rows, self._wanted = Counter[Step](), Counter[Step]()

    def note(self, call: Call, given: Given) -> None:
        """Note a call of the first run."""
        if call.batch or self._sampler.processes.rank or self._sampler.total is not None:
            return
        if call.step.layers:
            found = [(rows_in(layer, given), self._sampler.wanted(layer, given)) for layer in call.step.layers]
        else:
            found = [(channels(*given)[:, 0].numel(), _ROWS_OF_STATISTICS)]
        self._rows[call.step] += min(rows for rows, _ in found)
        self._wanted[call.step] = max(wanted for _, wanted in found)

    def batches_for(self, steps: Sequence[Step], processes: Processes) -> int:
        """Return how many of the batches of all processes have enough rows for all steps.

        A layer needs four times the rows that are chosen for it, a batch normalisation 2**18. All batches are needed if
        a step is not called in the first one, or if the number of rows is given.

        Args:
            steps: The steps.
            processes: Those that share the batches. All call this.
        """
        found = self._sampler.batches
        if steps and all(self._rows[step] for step in steps):
            shares = [self._wanted[step] / self._rows[step] for step in steps]
            found = min(found, math.ceil(_ROWS_FOR_EACH_CHOSEN * max(shares)))
        return int(processes.each(torch.tensor(found))[0])
