"""How close to the exact solution of least squares a layer is solved."""

from __future__ import annotations

from torch import Tensor

_THOUSANDTH = 1e-3
_LOOSE = 0.1  # allowed share from which float32 is exact enough
_OF_SAMPLING = 0.1  # share of the error that comes from the choice of the rows


def allowed_share(kept: Tensor, rows: int) -> Tensor:
    """Return by which share the squared error of an output may exceed that of the exact solution.

    It is a thousandth, or more if there are few rows. With `n` rows and `k` kept inputs, the squared error of the exact
    solution is larger on other rows, by a factor of about `1 / (1 - k / n) ** 2` (generalised cross-validation; Golub,
    Heath and Wahba 1979), because it fits the sample. About `k / n` of that error comes from the choice of the rows. A
    tenth of this is allowed, and at most the error itself.

    Steps of conjugate gradients end by an estimate of the error that is left, so the share may be larger. With about as
    many kept inputs as rows, and with inputs that almost depend on one another, the error on the rows that were solved
    was 10 to 400 times that of the exact solution. On other rows it was at most 1.02 times that, and mostly much less.

    Args:
        kept: Number of inputs that each output keeps.
        rows: Number of rows that they are solved on.

    Returns:
        Float64, the shape of `kept`, from 0.001 to 1.
    """
    fitted = (kept.double() / max(1, rows)).clamp(max=1)
    return (_OF_SAMPLING * fitted / (1 - fitted).square()).nan_to_num(_THOUSANDTH).clamp(_THOUSANDTH, 1)


def is_loose(kept: Tensor, rows: int) -> bool:
    """Return whether all outputs may be so far from the exact solution that float32 is exact enough.

    Args:
        kept: Number of inputs that each output keeps.
        rows: Number of rows that they are solved on.
    """
    return bool((allowed_share(kept, rows) >= _LOOSE).all())
