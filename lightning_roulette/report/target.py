"""Whether a network costs no more than its target allows."""

from __future__ import annotations

_ROUNDING = 1e-9  # share of the cost of the dense network by which sums of floats may differ


def over_target(left: float, whole: float, share: float) -> float:
    """Return by how much a network costs more than its target allows; 0 or less if the target is met.

    Args:
        left: What the network costs.
        whole: What the dense network costs.
        share: Share of this cost that is to be removed.

    Examples:
        >>> over_target(20.0, 100.0, 0.8)  # although 1 - 0.8 is less than 0.2
        0.0
        >>> over_target(25.0, 100.0, 0.8) > 0
        True
    """
    over = left - (1 - share) * whole
    return over if abs(over) > _ROUNDING * whole else 0.0
