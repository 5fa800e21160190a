"""Checks of arguments. Each error names the argument, the value, what is allowed and what to do."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar

_Group = TypeVar("_Group")


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    remedy: str = "",
) -> None:
    """Check that `value` is a number within the bounds that are given. NaN is out of all bounds.

    Args:
        name: The argument's name in error messages.
        value: The argument.
        at_least: Smallest value allowed.
        above: The value must be larger than this.
        below: The value must be smaller than this.
        remedy: A sentence that ends the error message.

    Raises:
        TypeError: If `value` is not a number.
        ValueError: If `value` is NaN or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, but must be a number. {remedy}".rstrip())
    bounds = [(at_least, operator.ge, "at least"), (above, operator.gt, "more than"), (below, operator.lt, "less than")]
    asked = [f"{words} {bound:g}" for bound, _, words in bounds if bound is not None]
    if not all(holds(value, bound) for bound, holds, _ in bounds if bound is not None):
        raise ValueError(f"{name} is {value!r}, but must be {' and '.join(asked)}. {remedy}".rstrip())


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Check that `value` is a whole number of at least `at_least`.

    Raises:
        TypeError: If `value` is not a whole number.
        ValueError: If `value` is smaller than `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, but must be a whole number.")
    check_number(name, value, at_least=at_least)


def check_epochs(at_epoch: Any, confidence: float | None = None) -> None:
    """Check that `at_epoch` is None, an epoch, or several epochs in rising order.

    Raises:
        TypeError: If an epoch is not a whole number.
        ValueError: In one of these cases:

            - An epoch is negative.
            - The list of epochs is empty.
            - The epochs do not rise.
            - There are several epochs and a confidence.
    """
    if at_epoch is None or not isinstance(at_epoch, Sequence) or isinstance(at_epoch, str):
        if isinstance(at_epoch, Iterable) and not isinstance(at_epoch, str):
            raise TypeError(f"at_epoch is {at_epoch!r}, but must be a number, or a list or range of numbers.")
        if at_epoch is not None:
            check_count("at_epoch", at_epoch, at_least=0)
        return
    for epoch in at_epoch:
        check_count("an epoch of at_epoch", epoch, at_least=0)
    if not at_epoch or any(later <= earlier for earlier, later in pairwise(at_epoch)):
        raise ValueError(f"at_epoch is {at_epoch!r}, but several epochs must rise, as range(10, 30) does.")
    if confidence is not None:
        raise ValueError(
            f"at_epoch is {at_epoch!r} and confidence is {confidence}, but a level that is judged until it holds "
            "cannot be certified. Leave out confidence, or search once, with a single at_epoch or none."
        )


def check_seed(seed: Any) -> None:
    """Check that `seed` is a signed 64-bit number.

    Raises:
        TypeError: If `seed` is not a whole number.
        ValueError: If `seed` needs more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed is {seed!r}, but must be a whole number.")
    if not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"seed is {seed}, but must be a signed 64-bit number.")


def duration(name: str, value: Any) -> timedelta:
    """Return a length of time, given as `"DD:HH:MM:SS"`, `"HH:MM:SS"`, a timedelta or a mapping of its arguments.

    Raises:
        TypeError: If `value` has another type.
        ValueError: If it is not positive, or no such string or mapping.
    """
    forms = 'must be "DD:HH:MM:SS" or "HH:MM:SS", a timedelta, or a dict of its arguments such as {"minutes": 30}'
    if isinstance(value, str):
        if (found := re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d):(\d\d)", value.strip())) is None:
            raise ValueError(f"{name} is {value!r}, but {forms}.")
        days, hours, minutes, seconds = (int(one or 0) for one in found.groups())
        length = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, Mapping):
        try:
            length = timedelta(**value)
        except TypeError as error:
            raise ValueError(f"{name} is {dict(value)!r}, but {forms}.") from error
    elif isinstance(value, timedelta):
        length = value
    else:
        raise TypeError(f"{name} is {value!r}, but {forms}.")
    if length <= timedelta():
        raise ValueError(f"{name} is {value!r}, but must be longer than zero.")
    return length


def check_choice(name: str, value: Any, allowed: tuple[str, ...], *, remedy: str = "") -> None:
    """Check that `value` is one of the allowed words.

    Raises:
        ValueError: If `value` is another word.
    """
    if value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{name} is {value!r}, but must be one of {words}. {remedy}".rstrip())


def check_words(name: str, value: Any, what: str) -> None:
    """Check that `value` is a sequence of strings. A single string is not allowed.

    Raises:
        TypeError: If `value` is anything else.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{name} is {value!r}, but must be a list of {what}.")


def as_group(name: str, value: Any, group: type[_Group]) -> _Group:
    """Return a group of settings. It may be given as a mapping from its fields to their values.

    Raises:
        TypeError: If `value` is anything else, or if the mapping has a field that the group does not have.
    """
    if isinstance(value, group):
        return value
    kind = group.__name__
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} is {value!r}, but must be a {kind}(...) of lightning_roulette, or a dict of its fields."
        )
    allowed = [one.name for one in fields(group)]  # type: ignore[arg-type]
    for field in value:
        if field not in allowed:
            close = get_close_matches(str(field), allowed, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name} has the field {field!r}, but a {kind} has {', '.join(allowed)}.{meant}")
    return group(**value)
