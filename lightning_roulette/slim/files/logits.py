"""Logarithms and probabilities as integers, equal on every machine.

Logits are in units of 1/256, probabilities in units of 1/65536. Whoever reads a file must compute the very numbers that
were computed when it was written. So nothing here depends on how a processor rounds a sum or a logarithm.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]

UNIT = 256  # of logits
ONE = 65536  # a probability of 1
RAREST = 16  # the smallest probability; it bounds how few bits a weight can take
_STEPS = 256  # a mantissa is rounded to so many steps
LARGEST = math.floor(UNIT * math.log(ONE / RAREST - 1))

# `math.log` and `math.exp` may differ in their last bit between machines; a test shows that no entry depends on it
_OF_MANTISSA = np.array([round(UNIT * math.log(0.5 + (step + 0.5) / (2 * _STEPS))) for step in range(_STEPS)], np.int64)
_OF_EXPONENT = np.array([round(UNIT * math.log(2) * exponent) for exponent in range(64)], np.int64)
_PROBABILITIES = np.array([round(ONE / (1 + math.exp(-x / UNIT))) for x in range(-LARGEST, LARGEST + 1)], np.int64)


def logarithm(numbers: npt.NDArray[Any]) -> Integers:
    """The natural logarithms of whole numbers from 1 to 2^53, in units of 1/256, with an error of at most one unit."""
    mantissa, exponent = np.frexp(np.asarray(numbers, np.float64))
    steps = ((mantissa - 0.5) * (2 * _STEPS)).astype(np.int64)
    found: Integers = _OF_EXPONENT[exponent] + _OF_MANTISSA[steps]
    return found


def probability(logits: npt.NDArray[Any]) -> Integers:
    """The probabilities of logits, between `RAREST` and `ONE - RAREST`."""
    found: Integers = _PROBABILITIES[np.clip(logits, -LARGEST, LARGEST) + LARGEST]
    return found


def logit_of(share: float, step: int) -> int:
    """The logit of a share between 0 and 1 in units of 1/256, a multiple of `step`."""
    bounded = min(max(share, RAREST / ONE), 1 - RAREST / ONE)
    limit = LARGEST // step * step
    return min(max(step * round(UNIT * math.log(bounded / (1 - bounded)) / step), -limit), limit)
