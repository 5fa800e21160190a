"""How close to the exact solution of least squares a layer is solved."""

from __future__ import annotations

from torch import Tensor

_THOUSANDTH = 1e-3
_OF_SAMPLING = 0.1  # share of the error that comes from the choice of the rows


def allowed_share(kept: Tensor, rows: int) -> Tensor:
    """Return by which share the squared error of an output may exceed that of the exact solution.

    It is a thousandth, or a tenth of `kept / rows` if that is more. On rows that it was not solved on, the exact
    solution has a squared error that is larger by about `kept / rows`, so a tenth of this is not seen there.

    Args:
        kept: Number of inputs that each output keeps.
        rows: Number of rows that they are solved on.

    Returns:
        Float64, the shape of `kept`.
    """
    return (_OF_SAMPLING * kept.double() / max(1, rows)).clamp(min=_THOUSANDTH)
