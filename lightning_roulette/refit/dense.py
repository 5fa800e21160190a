"""Outputs of the dense network's layers, which a refit approximates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_roulette.large.copies import Place, TensorFile
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.matrices import RowSampler, matrix_of, outputs_of
from lightning_roulette.refit.traversal import Call, Given


@dataclass(frozen=True)
class DenseRows:
    """Outputs of a layer of the dense network in one call.

    Attributes:
        count: Number of rows that the network gives the layer.
        outputs: Its outputs on the chosen rows, shape `(groups, rows, outputs)`.
    """

    count: int
    outputs: Tensor


class DenseOutputs:
    """Outputs of the dense network on the chosen rows of all calls.

    Args:
        tensors: Parameters of the network by name.
        sampler: Chooses the rows.
        memory: Bytes that stay in memory. More go to a temporary file if it can be written.

    Attributes:
        bytes: Bytes in memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sampler: RowSampler, memory: int) -> None:
        self._tensors, self._sampler, self._memory = tensors, sampler, memory
        self._kept: dict[tuple[Layer, int, int], tuple[int, Tensor | Place]] = {}  # by batch and number of the call
        self._file: TensorFile | None = None
        self.bytes = 0

    def keep(self, call: Call, given: Given) -> None:
        """Keep the outputs of a call. The network must be dense."""
        for layer in call.step.layers:
            if (key := (layer, call.batch, call.number)) in self._kept:  # several steps may solve a layer
                continue
            rows = self._sampler.rows(layer, call, given)
            outputs = outputs_of(rows.values, matrix_of(layer, self._tensors))
            stored_in = torch.promote_types(self._tensors[layer.names[0]].dtype, torch.float32)
            self._kept[key] = rows.count, self._put(outputs.to(stored_in))

    def of(self, layer: Layer, call: Call) -> DenseRows:
        """Return the outputs of a layer in a call."""
        count, kept = self._kept[layer, call.batch, call.number]
        if isinstance(kept, Place):
            assert self._file is not None
            name = layer.names[0]
            kept = self._file.read(kept, f"outputs of {name!r}").to(self._tensors[name].device)
        return DenseRows(count, kept)

    def _put(self, outputs: Tensor) -> Tensor | Place:
        if self.bytes + outputs.nbytes > self._memory:
            try:
                self._file = self._file or TensorFile()
                return self._file.add(outputs)
            except OSError:  # the disk is full, or there is no folder for temporary files
                pass
        self.bytes += outputs.nbytes
        return outputs
