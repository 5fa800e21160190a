"""Settings are frozen, have the documented defaults, and check every field."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from lightning_roulette import (
    Block,
    Codebook,
    Head,
    LeastSquares,
    Neuron,
    NofM,
    Reduction,
    Tree,
    Validation,
    Weight,
    Wheel,
)
from lightning_roulette.refit_settings import Refit, refit_of

DEFAULTS = {
    Wheel: {"sharpness": 16.0, "importance": None, "scope": "global", "allocation": None, "unit": Weight()},
    Tree: {
        "pruning_rate": 0.1,
        "coarse_rate": 0.2,
        "max_levels": None,
        "patience": 3,
        "smallest_rate": 0.01,
        "max_time": None,
        "target": None,
    },
    Validation: {"rank_by": None, "confirm": 0.5, "race": True, "cache_bytes": 2**31, "keep_callbacks": ()},
    Refit: {"batches": 100, "each_level": True, "finalists": 1, "cache_bytes": 2**31},
    LeastSquares: {
        "batches": 100,
        "each_level": True,
        "finalists": 1,
        "cache_bytes": 2**31,
        "damping": 1e-3,
        "choose": False,
        "values": "float32",
        "distill": 0,
    },
}
groups = pytest.mark.parametrize("group", DEFAULTS)


@groups
def test_a_group_is_frozen_and_has_the_documented_defaults(group):
    one = group()
    assert vars(one) == DEFAULTS[group]
    with pytest.raises(FrozenInstanceError):
        setattr(one, next(iter(DEFAULTS[group])), 1)
    assert one == group()
    assert hash(one) == hash(group())
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        group(temperature=1.0)


@pytest.mark.parametrize(
    ("group", "fields"),
    [
        (Wheel, {"sharpness": 0}),
        (Wheel, {"sharpness": math.inf}),
        (Wheel, {"sharpness": np.float32(2.5), "allocation": 0}),
        (Wheel, {"importance": "lamp", "scope": "layer"}),
        (Wheel, {"importance": lambda weights: weights}),
        (Tree, {"pruning_rate": 1e-9}),
        (Tree, {"pruning_rate": 0.999}),
        (Wheel, {"unit": Block(1, 8), "importance": "obs"}),
        (Wheel, {"unit": NofM(1, 4)}),
        (Tree, {"coarse_rate": None}),
        (Tree, {"target": Reduction(latency=0.25)}),
        (Tree, {"coarse_rate": 0.01}),
        (Tree, {"max_levels": 1, "patience": 1}),
        (Tree, {"patience": np.int64(5), "smallest_rate": 2.0}),
        (Validation, {"rank_by": "val_loss", "confirm": 0}),
        (Validation, {"confirm": np.float32(0.999)}),
        (Validation, {"race": False, "cache_bytes": 0}),
        (Validation, {"cache_bytes": np.int64(2**40), "keep_callbacks": ("MyLogger",)}),
        (
            LeastSquares,
            {"damping": 0, "batches": 1, "each_level": False, "finalists": 4, "cache_bytes": 0, "choose": True},
        ),
        (LeastSquares, {"values": "int8"}),
        (LeastSquares, {"values": Codebook(3), "each_level": True}),
        (LeastSquares, {"distill": np.int64(300), "choose": True}),
    ],
)
def test_a_value_in_range_is_kept(group, fields):
    taken = group(**fields)
    assert {name: getattr(taken, name) for name in fields} == fields


SHARE = "must be at least 0 and less than 1. It is the share of the data"
RATE = "must be more than 0 and less than 1. It is the share"
KINDS = "must be one of 'magnitude', 'lamp', 'sensitivity', 'activation', 'obs'. Or pass a function"


@pytest.mark.parametrize(
    ("group", "field", "value", "error", "message"),
    [
        (Wheel, "sharpness", -0.1, ValueError, r"must be at least 0\. Infinity \(\.inf\) is magnitude pruning"),
        (Wheel, "sharpness", None, TypeError, "must be a number"),
        (Wheel, "importance", "magnitud", ValueError, KINDS),
        (Wheel, "importance", 1, ValueError, KINDS),
        (Wheel, "scope", "local", ValueError, "must be one of 'global', 'layer'"),
        (Wheel, "allocation", -1, ValueError, "must be at least 0"),
        (Tree, "pruning_rate", 0.0, ValueError, RATE),
        (Tree, "pruning_rate", 1.0, ValueError, RATE),
        (Tree, "coarse_rate", 0.0, ValueError, "must be more than 0 and less than 1. None stands for no coarse levels"),
        (Tree, "coarse_rate", "all", TypeError, "must be a number"),
        (Tree, "max_levels", 0, ValueError, "must be at least 1"),
        (Tree, "max_levels", 3.0, TypeError, "must be a whole number"),
        (Tree, "patience", 0, ValueError, "must be at least 1"),
        (Tree, "smallest_rate", 0, ValueError, "must be more than 0"),
        (Validation, "rank_by", ["val_loss"], TypeError, "must be the name of a logged metric"),
        (Validation, "confirm", 1, ValueError, SHARE),
        (Validation, "confirm", -0.1, ValueError, SHARE),
        (Validation, "race", 1, TypeError, "must be True or False"),
        (Validation, "cache_bytes", -1, ValueError, "must be at least 0"),
        (Validation, "cache_bytes", 2.0**31, TypeError, "must be a whole number"),
        (Validation, "keep_callbacks", "MyLogger", TypeError, "must be a list of names of callback classes"),
        (Refit, "batches", 0, ValueError, "must be at least 1"),
        (Refit, "each_level", 1, TypeError, "must be True or False"),
        (LeastSquares, "finalists", 0, ValueError, "must be at least 1"),
        (Refit, "cache_bytes", -1, ValueError, "must be at least 0"),
        (LeastSquares, "damping", -1, ValueError, "must be at least 0"),
        (LeastSquares, "choose", 1, TypeError, "must be True or False"),
        (LeastSquares, "distill", -1, ValueError, "must be at least 0"),
        (LeastSquares, "distill", True, TypeError, "must be a whole number"),
        (LeastSquares, "values", "int4", ValueError, "must be one of 'float32', 'float16', 'int8'. Or pass a Codebook"),
        (LeastSquares, "values", 8, TypeError, "must be one of float32, float16, int8, or a Codebook"),
    ],
)
def test_a_value_out_of_range_is_named(group, field, value, error, message):
    with pytest.raises(error, match=message) as caught:
        group(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}, but must be ")


def test_a_list_of_callbacks_from_yaml_becomes_a_tuple():
    assert Validation(keep_callbacks=["A", "B"]).keep_callbacks == ("A", "B")


def test_a_refit_is_named_by_a_word_or_given():
    assert refit_of(None) is None
    assert type(refit_of("batch_norm")) is Refit
    assert refit_of("least_squares") == LeastSquares()
    assert refit_of(given := LeastSquares(damping=0.1)) is given
    with pytest.raises(ValueError, match="refit is 'ols', but must be one of 'batch_norm', 'least_squares'. Or pass a"):
        refit_of("ols")
    with pytest.raises(TypeError, match="refit is 3, but must be None, one of batch_norm, least_squares, or a Least"):
        refit_of(3)


def test_rounded_values_may_be_a_mapping_and_need_a_refit_of_each_level():
    assert LeastSquares(values={"bits": 5}) == LeastSquares(values=Codebook(5))
    with pytest.raises(ValueError, match="each_level is False and values 'int8', but a level must be rounded before"):
        LeastSquares(values="int8", each_level=False)


def test_gradient_steps_do_not_move_rounded_weights():
    with pytest.raises(
        ValueError, match="distill is 5 and values 'int8', but gradient steps move rounded weights. Pass"
    ):
        LeastSquares(values="int8", distill=5)


def test_positional_arguments_keep_their_places():
    assert Tree(0.5, 3, 2, 0.05) == Tree(pruning_rate=0.5, max_levels=3, patience=2, smallest_rate=0.05)
    assert LeastSquares(7, False, 4, 0.5) == LeastSquares(batches=7, each_level=False, finalists=4, damping=0.5)


@pytest.mark.parametrize(
    ("given", "unit"),
    [
        ("weight", Weight()),
        ("neuron", Neuron()),
        ("head", Head()),
        ({"multiple_of": 8}, Neuron(multiple_of=8)),
        ({"kept": 1, "of": 3}, NofM(1, 3)),
        ({"rows": 2, "columns": 8}, Block(2, 8)),
    ],
)
def test_a_unit_may_be_a_word_or_a_mapping(given, unit):
    assert Wheel(unit=given).unit == unit
    assert Wheel(unit=unit).unit is unit


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Wheel(unit="channel"), ValueError, "unit is 'channel', but must be one of 'weight', 'neuron', 'head'"),
        (lambda: Wheel(unit=3), TypeError, "unit is 3, but must be one of weight, neuron, head, or a NofM"),
        (lambda: Wheel(unit={}), TypeError, "unit is {}, but a NofM needs kept and of, too"),
        (lambda: Wheel(unit={"rows": 2, "of": 2}), TypeError, "but a Block needs columns, too"),
        (lambda: Wheel(unit={"kept": 2, "of": 4, "off": 1}), TypeError, "unit has the field 'off', but a NofM has"),
        (lambda: Neuron(0), ValueError, "multiple_of is 0"),
        (lambda: Wheel(unit={"multiple_of": 8, "of": 2}), TypeError, "unit has the field 'of', but a Neuron has"),
        (lambda: NofM(4, 4), ValueError, "of is 4 and kept 4, but a group must have more weights than it keeps"),
        (lambda: NofM(0, 4), ValueError, "kept is 0"),
        (lambda: Block(0, 4), ValueError, "rows is 0"),
        (lambda: Wheel(unit="neuron", scope="layer"), ValueError, "scope is 'layer' and unit Neuron.*scope='global'"),
        (lambda: Reduction(), ValueError, "was given nothing, but needs exactly one of multiply_adds, parameters"),
        (lambda: Reduction(0.5, 0.5), ValueError, "was given multiply_adds, parameters, but needs exactly one"),
        (lambda: Reduction(parameters=1), ValueError, "parameters is 1, but must be more than 0 and less than 1"),
        (lambda: Tree(target=0.5), TypeError, "target is 0.5, but must be a Reduction"),
    ],
)
def test_units_and_reductions_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_reduction_says_what_it_counts():
    one = Tree(target={"multiply_adds": 0.25}).target
    assert (one, one.counted, one.share) == (Reduction(multiply_adds=0.25), "multiply_adds", 0.25)
