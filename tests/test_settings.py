"""Settings: frozen, and every mistake is named with what came and what is allowed."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from lightning_roulette import Tree, Validation, Wheel
from lightning_roulette.checks import check_count, check_group, check_number

NUMBER, WHOLE = "but must be a number", "but must be a whole number"


def test_the_defaults_are_those_documented():
    assert Wheel() == Wheel(sharpness=16.0, importance=None, scope="global")
    assert Tree() == Tree(pruning_rate=0.1, max_levels=None, patience=3, smallest_rate=0.01)
    assert Validation() == Validation(rank_by=None, confirm=0.5, race=True, cache_bytes=2**31, keep_callbacks=())


@pytest.mark.parametrize(
    ("group", "fields"),
    [
        (Wheel, {"sharpness": 0}),
        (Wheel, {"sharpness": math.inf}),
        (Wheel, {"sharpness": np.float32(2.5)}),
        (Wheel, {"importance": "lamp", "scope": "layer"}),
        (Wheel, {"importance": lambda weights: weights}),
        (Tree, {"pruning_rate": 1e-9}),
        (Tree, {"pruning_rate": 0.999}),
        (Tree, {"max_levels": 1, "patience": 1}),
        (Tree, {"patience": np.int64(5)}),
        (Tree, {"smallest_rate": 2.0}),
        (Validation, {"rank_by": "val_loss"}),
        (Validation, {"confirm": 0}),
        (Validation, {"confirm": np.float32(0.999)}),
        (Validation, {"race": False, "cache_bytes": 0}),
        (Validation, {"cache_bytes": np.int64(2**40)}),
        (Validation, {"keep_callbacks": ("MyLogger",)}),
    ],
)
def test_what_is_in_range_is_taken(group, fields):
    taken = group(**fields)
    assert {name: getattr(taken, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("group", "field", "value", "error", "message"),
    [
        (Wheel, "sharpness", -0.1, ValueError, r"must be at least 0\. Infinity \(\.inf\) is magnitude pruning"),
        (Wheel, "sharpness", -math.inf, ValueError, "must be at least 0"),
        (Wheel, "sharpness", math.nan, ValueError, "must be at least 0"),
        (Wheel, "sharpness", True, TypeError, NUMBER),
        (Wheel, "sharpness", "4", TypeError, NUMBER),
        (Wheel, "sharpness", None, TypeError, NUMBER),
        (Wheel, "sharpness", torch.tensor(4.0), TypeError, NUMBER),
        (
            Wheel,
            "importance",
            "magnitud",
            ValueError,
            "must be one of 'magnitude', 'lamp', 'sensitivity', 'activation', 'obs'. Or pass a function",
        ),
        (Wheel, "importance", 1, ValueError, "must be one of 'magnitude', 'lamp'"),
        (Wheel, "scope", "local", ValueError, "must be one of 'global', 'layer'"),
        (Wheel, "scope", None, ValueError, "must be one of 'global', 'layer'"),
        (Tree, "pruning_rate", 0.0, ValueError, "must be more than 0 and less than 1. It is the share"),
        (Tree, "pruning_rate", 1.0, ValueError, "must be more than 0 and less than 1"),
        (Tree, "pruning_rate", 20, ValueError, "must be more than 0 and less than 1"),
        (Tree, "pruning_rate", -0.2, ValueError, "must be more than 0 and less than 1"),
        (Tree, "pruning_rate", math.nan, ValueError, "must be more than 0 and less than 1"),
        (Tree, "pruning_rate", True, TypeError, NUMBER),
        (Tree, "max_levels", 0, ValueError, "must be at least 1"),
        (Tree, "max_levels", -3, ValueError, "must be at least 1"),
        (Tree, "max_levels", 3.0, TypeError, WHOLE),
        (Tree, "max_levels", math.nan, TypeError, WHOLE),
        (Tree, "max_levels", True, TypeError, WHOLE),
        (Tree, "patience", 0, ValueError, "must be at least 1"),
        (Tree, "patience", None, TypeError, WHOLE),
        (Tree, "patience", False, TypeError, WHOLE),
        (Tree, "patience", 1.5, TypeError, WHOLE),
        (Tree, "smallest_rate", 0, ValueError, "must be more than 0"),
        (Tree, "smallest_rate", math.nan, ValueError, "must be more than 0"),
        (Tree, "smallest_rate", "small", TypeError, NUMBER),
        (Validation, "rank_by", 3, TypeError, "must be the name of a logged metric"),
        (Validation, "rank_by", ["val_loss"], TypeError, "must be the name of a logged metric"),
        (Validation, "confirm", 1, ValueError, "must be at least 0 and less than 1. It is the share of the data"),
        (Validation, "confirm", -0.1, ValueError, "must be at least 0 and less than 1"),
        (Validation, "confirm", math.nan, ValueError, "must be at least 0 and less than 1"),
        (Validation, "confirm", True, TypeError, NUMBER),
        (Validation, "confirm", None, TypeError, NUMBER),
        (Validation, "race", 1, TypeError, "must be True or False"),
        (Validation, "race", None, TypeError, "must be True or False"),
        (Validation, "race", "no", TypeError, "must be True or False"),
        (Validation, "cache_bytes", -1, ValueError, "must be at least 0"),
        (Validation, "cache_bytes", 2.0**31, TypeError, WHOLE),
        (Validation, "cache_bytes", math.inf, TypeError, WHOLE),
        (Validation, "cache_bytes", True, TypeError, WHOLE),
        (Validation, "keep_callbacks", "MyLogger", TypeError, "must be a list of names of callback classes"),
        (Validation, "keep_callbacks", [1], TypeError, "must be a list of names of callback classes"),
    ],
)
def test_a_mistake_is_named(group, field, value, error, message):
    with pytest.raises(error, match=message) as caught:
        group(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}, but must be ")


@pytest.mark.parametrize("value", [None, 3])
def test_callbacks_to_keep_that_are_no_list_are_named(value):
    with pytest.raises(TypeError, match="keep_callbacks is .*, but must be a list of names"):
        Validation(keep_callbacks=value)


@pytest.mark.parametrize("group", [Wheel, Tree, Validation])
def test_an_unknown_field_is_refused(group):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        group(temperature=1.0)


@pytest.mark.parametrize(("group", "field"), [(Wheel, "sharpness"), (Tree, "patience"), (Validation, "confirm")])
def test_groups_are_frozen(group, field):
    one = group()
    with pytest.raises(FrozenInstanceError):
        setattr(one, field, 1)
    assert one == group()
    assert hash(one) == hash(group())


def test_a_list_of_callbacks_from_yaml_becomes_a_tuple():
    assert Validation(keep_callbacks=["A", "B"]) == Validation(keep_callbacks=("A", "B"))
    assert Validation(keep_callbacks=["A"]).keep_callbacks == ("A",)


def test_bounds_are_named_in_the_error():
    check_number("x", 1, at_least=1, below=2)
    with pytest.raises(ValueError, match=r"^x is 2, but must be at least 1 and less than 2\.$"):
        check_number("x", 2, at_least=1, below=2)
    with pytest.raises(ValueError, match="^n is 3, but must be at least 4"):
        check_count("n", 3, at_least=4)


def test_a_group_of_another_kind_is_refused():
    check_group("tree", Tree(), Tree)
    with pytest.raises(TypeError, match=r"tree is Wheel\(.*\), but must be a Tree\(\.\.\.\) of lightning_roulette"):
        check_group("tree", Wheel(), Tree)
    with pytest.raises(TypeError, match=r"wheel is {'sharpness': 1}, but must be a Wheel"):
        check_group("wheel", {"sharpness": 1}, Wheel)
