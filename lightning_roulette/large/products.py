"""Products of large matrices in float32, by the fastest library that torch has for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

_LEAST_COLUMNS = 256  # of a matrix whose copy for oneDNN pays


def products_with(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function of `rows` that returns `rows @ matrix.mT`.

    Large float32 matrices on the CPU are multiplied by oneDNN. It uses the processor's widest registers, also where the
    default library does not: on AMD's processors it takes half of the time. All other products are those of torch.
    Enter `full_precision` around the calls.

    Args:
        matrix: Shape `(rows, inputs)`, or `(groups, rows, inputs)` as the rows that it is multiplied with. It must not
            change as long as the function is used.
    """
    if not _by_onednn(matrix):
        return lambda rows: rows @ matrix.mT
    prepared = matrix.view(matrix.shape[-2:]).to_mkldnn()
    return lambda rows: linear(rows.to_mkldnn(), prepared).to_dense()


def _by_onednn(matrix: Tensor) -> bool:
    backend = torch.backends.mkldnn
    one = matrix.numel() == matrix.shape[-2:].numel() > 0
    large = one and matrix.dtype == torch.float32 and matrix.shape[-1] >= _LEAST_COLUMNS
    return large and matrix.device.type == "cpu" and backend.is_available() and bool(backend.enabled)
