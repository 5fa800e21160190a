"""Outputs of the dense network's layers, which a refit approximates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_roulette.large.limits import limits
from lightning_roulette.refit.matrices import RowSampler, matrix_of, outputs_of
from lightning_roulette.refit.traversal import Call, Given, Step, Traversal

# For each layer of a step, the number of rows that the dense network gives it, and its outputs on the chosen rows.
Outputs = tuple[tuple[int, Tensor], ...]


class DenseOutputs:
    """Outputs of the dense network on calibration batches; kept up to `limits().dense_output_bytes`.

    Args:
        tensors: Parameters of the network by name.
        sampler: Chooses the rows.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sampler: RowSampler) -> None:
        self._tensors, self._sampler = tensors, sampler
        self._kept: dict[tuple[Step, int], list[Outputs]] = {}
        self._bytes = 0

    def keep(self, call: Call, given: Given) -> None:
        """Keep the outputs of a call if there is memory; the network must be dense."""
        if self._bytes < limits().dense_output_bytes:
            outputs = self._outputs(call, given)
            self._bytes += sum(values.nbytes for _, values in outputs)
            self._kept.setdefault((call.step, call.batch), []).append(outputs)

    def kept(self, step: Step, batch: int, calls: int) -> list[Outputs] | None:
        """Return the outputs of each call of a step on a batch; None if not all of them were kept."""
        found = self._kept.get((step, batch), [])
        return found if len(found) == calls else None

    def computed(self, traversal: Traversal, step: Step, batch: int) -> list[Outputs]:
        """Run the network, which must be dense, and return the outputs of each call of a step on a batch."""
        found: list[Outputs] = []
        traversal.calls_of(step, batch, lambda call, given: found.append(self._outputs(call, given)))
        return found

    def _outputs(self, call: Call, given: Given) -> Outputs:
        found = []
        for layer in call.step.layers:
            rows = self._sampler.rows(layer, call, given)
            outputs = outputs_of(rows.values, matrix_of(layer, self._tensors))
            stored_in = torch.promote_types(self._tensors[layer.names[0]].dtype, torch.float32)
            found.append((rows.count, outputs.to(stored_in)))
        return tuple(found)
