"""Checks of arguments: which argument, what came, what is allowed, what to do."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    remedy: str = "",
) -> None:
    """Raise unless `value` is a number within the bounds; NaN is within none.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, but must be a number. {remedy}".rstrip())
    bounds = [(at_least, operator.ge, "at least"), (above, operator.gt, "more than"), (below, operator.lt, "less than")]
    asked = [f"{words} {bound:g}" for bound, _, words in bounds if bound is not None]
    if not all(holds(value, bound) for bound, holds, _ in bounds if bound is not None):
        raise ValueError(f"{name} is {value!r}, but must be {' and '.join(asked)}. {remedy}".rstrip())


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raise unless `value` is a whole number of `at_least` or more.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is less.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, but must be a whole number.")
    check_number(name, value, at_least=at_least)


def check_epochs(at_epoch: Any, confidence: float | None = None) -> None:
    """Raise unless `at_epoch` is None, a number of epochs, or several in rising order.

    Raises:
        TypeError: If it holds anything but whole numbers.
        ValueError: If a number is negative, there is none, or they do not rise; or if several come with a confidence.
    """
    if at_epoch is None or not isinstance(at_epoch, Sequence) or isinstance(at_epoch, str):
        if isinstance(at_epoch, Iterable) and not isinstance(at_epoch, str):
            raise TypeError(f"at_epoch is {at_epoch!r}, but must be a number, or a list or range of several.")
        if at_epoch is not None:
            check_count("at_epoch", at_epoch, at_least=0)
        return
    for epoch in at_epoch:
        check_count("an epoch of at_epoch", epoch, at_least=0)
    if not at_epoch or any(later <= earlier for earlier, later in pairwise(at_epoch)):
        raise ValueError(f"at_epoch is {at_epoch!r}, but several epochs must rise, as range(10, 30) does.")
    if confidence is not None:
        raise ValueError(
            f"at_epoch is {at_epoch!r} and confidence {confidence}, but a level that is judged until it holds cannot "
            "be certified. Leave confidence out, or search once, with a single at_epoch or none."
        )


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is a signed 64-bit number.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it has more bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed is {seed!r}, but must be a whole number.")
    if not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"seed is {seed}, but must be a signed 64-bit number.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...], *, remedy: str = "") -> None:
    """Raise unless `value` is one of the allowed words.

    Raises:
        ValueError: If it is not.
    """
    if value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{name} is {value!r}, but must be one of {words}. {remedy}".rstrip())


def check_words(name: str, value: Any, what: str) -> None:
    """Raise unless `value` is a sequence of strings, and not itself one.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{name} is {value!r}, but must be a list of {what}.")


def check_group(name: str, value: Any, group: type) -> None:
    """Raise unless `value` is an instance of the settings group.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, group):
        raise TypeError(f"{name} is {value!r}, but must be a {group.__name__}(...) of lightning_roulette.")
