"""Checks name the argument, what came and what is allowed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_roulette import Tree, Wheel
from lightning_roulette.checks import (
    as_group,
    check_choice,
    check_count,
    check_epochs,
    check_number,
    check_seed,
    check_words,
)


def test_what_is_allowed_passes():
    for number in (0, 1.5, math.inf, np.float32(2.5), Fraction(1, 3)):
        check_number("x", number, at_least=0)
    for count in (1, 5, np.int64(5)):
        check_count("n", count)
    for epochs in (None, 0, 3, [0], (1, 4), range(10, 30)):
        check_epochs(epochs)
    check_epochs(3, confidence=0.95)
    for seed in (-(2**63), 0, 2**63 - 1, np.int64(1)):
        check_seed(seed)
    check_choice("mode", "max", ("max", "min"))
    for words in ([], ["a"], ("a", "b")):
        check_words("names", words, "names")
    assert as_group("tree", Tree(), Tree) == as_group("tree", {}, Tree) == Tree()
    assert as_group("wheel", {"sharpness": 4}, Wheel) == Wheel(4)


@pytest.mark.parametrize("value", [True, "4", None, torch.tensor(4.0), [1]])
@pytest.mark.parametrize("check", [check_number, check_count])
def test_what_is_not_a_number_is_refused(check, value):
    with pytest.raises(TypeError, match="^x is .*, but must be a (whole )?number"):
        check("x", value)


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_a_count_must_be_a_whole_number(value):
    with pytest.raises(TypeError, match=f"^n is {value}, but must be a whole number"):
        check_count("n", value)


@pytest.mark.parametrize(
    ("bounds", "value", "message"),
    [
        ({"at_least": 1, "below": 2}, 2, "at least 1 and less than 2"),
        ({"at_least": 1, "below": 2}, 0.9, "at least 1 and less than 2"),
        ({"above": 0, "below": 1}, 0, "more than 0 and less than 1"),
        ({"above": 0}, math.nan, "more than 0"),
        ({"at_least": 0}, math.nan, "at least 0"),
        ({"at_least": 0}, -math.inf, "at least 0"),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_all_bounds(bounds, value, message):
    with pytest.raises(ValueError, match=rf"^x is {value}, but must be {message}\. Do this\.$"):
        check_number("x", value, **bounds, remedy="Do this.")


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (check_count, ("n", 0), ValueError, "n is 0, but must be at least 1"),
        (check_epochs, (-1,), ValueError, "at_epoch is -1, but must be at least 0"),
        (check_epochs, (1.0,), TypeError, "at_epoch is 1.0, but must be a whole number"),
        (check_epochs, ({1, 2},), TypeError, "at_epoch is {1, 2}, but must be a number, or a list or range of numbers"),
        (check_epochs, ([1, 0.5],), TypeError, "an epoch of at_epoch is 0.5, but must be a whole number"),
        (check_epochs, ([],), ValueError, "several epochs must rise"),
        (check_epochs, ([3, 3],), ValueError, "several epochs must rise"),
        (
            check_epochs,
            ([1, 2], 0.95),
            ValueError,
            "confidence is 0.95, .* cannot be certified",
        ),
        (check_seed, (0.5,), TypeError, "seed is 0.5, but must be a whole number"),
        (check_seed, (2**63,), ValueError, "seed is 9223372036854775808, but must be a signed 64-bit number"),
        (
            check_choice,
            ("mode", "maximum", ("max", "min")),
            ValueError,
            "mode is 'maximum', but must be one of",
        ),
        (check_words, ("names", "net", "patterns"), TypeError, "names is 'net', but must be a list of patterns"),
        (check_words, ("names", [1], "patterns"), TypeError, r"names is \[1\], but must be a list of patterns"),
        (check_words, ("names", None, "patterns"), TypeError, "names is None, but must be a list of patterns"),
        (as_group, ("tree", Wheel(), Tree), TypeError, r"tree is Wheel\(.*\), but must be a Tree\(\.\.\.\) of"),
        (
            as_group,
            ("wheel", 4, Wheel),
            TypeError,
            r"wheel is 4, but must be a Wheel\(\.\.\.\) .* or a dict of its fields",
        ),
        (
            as_group,
            ("wheel", {"sharpnes": 1}, Wheel),
            TypeError,
            "wheel has the field 'sharpnes', but a Wheel has sharpness, .*Did you mean 'sharpness'",
        ),
    ],
)
def test_a_mistake_is_named(check, arguments, error, message):
    with pytest.raises(error, match=message):
        check(*arguments)
