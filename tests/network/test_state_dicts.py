"""State dicts in files of many kinds, and how they are loaded under the names of a module."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_roulette.network.state_dicts import WrongStateDict, load_under_its_names, state_dict_in
from tests.support.results import copied, equal

TENSORS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Wrapped(nn.Module):
    """A network under a name, and something that a plain network lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers()
        self.register_buffer("scale", torch.tensor(2.0))


class Twice(nn.Module):
    """Two equal networks."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = layers(), layers()


def load(module, state, strict=True) -> str:
    return load_under_its_names(module, state, lambda one, whole: module.load_state_dict(one, strict=whole), strict)


@pytest.mark.parametrize(
    "contents",
    [
        TENSORS,
        collections.OrderedDict(TENSORS),
        {"state_dict": TENSORS, "epoch": 3},
        {"model_state_dict": TENSORS, "optimizer": {"state": {}}},
        {"model": TENSORS, "ema": None},
        {"net": TENSORS | {"extra": {"version": 1}}},
        {"state_dict": TENSORS, "step": torch.tensor(3), "decay": torch.tensor(0.9)},
    ],
)
def test_a_state_dict_is_found_in_the_usual_places(contents):
    found = state_dict_in(contents)
    assert torch.equal(found["weight"], TENSORS["weight"])
    assert torch.equal(found["bias"], TENSORS["bias"])


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (nn.Linear(3, 2), "an object of the class Linear"),
        ([1, 2], "an object of the class list"),
        ({"epoch": 3, "optimizer": {}}, "Its keys are: 'epoch', 'optimizer'"),
        ({}, "Its keys are: none"),
        ({1: torch.ones(1)}, "Its keys are: 1"),
    ],
)
def test_contents_without_a_state_dict_are_refused_with_what_is_there(contents, reason):
    with pytest.raises(WrongStateDict, match=reason):
        state_dict_in(contents)


def prefixed(prefix: str, net: nn.Module | None = None) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": one for name, one in (layers() if net is None else net).state_dict().items()}


@pytest.mark.parametrize(
    ("prefix", "target", "said"),
    [
        ("", layers, ""),
        ("module.", layers, "without 'module.'"),
        ("_orig_mod.", layers, "without '_orig_mod.'"),
        ("a.b.", layers, "without 'a.b.'"),
        ("", Wrapped, "with 'net.' before them. It does not hold scale"),
        ("module.", Wrapped, "with 'net.' instead of 'module.'"),
    ],
)
def test_every_value_is_loaded_under_other_prefixes(prefix, target, said):
    net, module = layers(), target()
    expected = copied(net)
    assert said in load(module, prefixed(prefix, net))
    assert equal(copied(module.net if target is Wrapped else module), expected)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"0.weight": torch.ones(4, 3)}, r"8 of the module's names are missing \(\*.bias, .* and others"),
        (layers().state_dict() | {"head.weight": torch.ones(1)}, r"1 names are unknown to the module \(head.weight\)"),
        (layers().state_dict() | {"2.weight": torch.ones(2, 5)}, r"2.weight \(file \(2, 5\), module \(2, 4\)\)"),
        (
            {f"net.{n}": o for n, o in layers().state_dict().items()} | {"net.2.bias": torch.ones(3)},
            "names are missing",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(state, reason):
    module = layers()
    before = copied(module)
    with pytest.raises(WrongStateDict, match=reason):
        load(module, state)
    assert equal(copied(module), before)


def test_a_state_dict_that_fits_two_parts_is_refused():
    module = Twice()
    before = copied(module)
    with pytest.raises(WrongStateDict, match=r"fit several parts.*'student.'.*'teacher.'"):
        load(module, layers().state_dict(), strict=False)
    assert equal(copied(module), before)


def test_a_module_that_is_not_strict_says_what_it_did_not_get():
    net, module = layers(), layers()
    head = {name: one for name, one in net.state_dict().items() if name.startswith("2.")}
    said = load(module, head | {"other": torch.ones(1)}, strict=False)
    assert said.startswith("It does not hold *.bias, *.weight and others (7 parameters), which the module keeps")
    assert said.endswith("The module has no other.")
    assert torch.equal(module[2].weight, net[2].weight)


def test_a_module_that_is_not_strict_must_get_something():
    module = layers()
    before = copied(module)
    with pytest.raises(WrongStateDict, match="names are missing"):
        load(module, {"other.weight": torch.ones(4, 3)}, strict=False)
    assert equal(copied(module), before)


def test_lazy_layers_take_their_shapes_from_the_file():
    net, module = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.LazyLinear(4))
    load(module, net.state_dict())
    assert equal(copied(module), copied(net))


@given(
    removed=st.lists(st.sampled_from(["module", "model", "a"]), max_size=3),
    added=st.lists(st.sampled_from(["net", "model", "b"]), max_size=3),
)
def test_any_prefix_is_replaced_by_any_other(removed, added):
    net = layers()
    module: nn.Module = layers()
    for name in reversed(added):
        outer = nn.Module()
        outer.add_module(name, module)
        module = outer
    inner = "".join(f"{name}." for name in added)
    load(module, {"".join(f"{name}." for name in removed) + name: one for name, one in net.state_dict().items()})
    assert equal({name.removeprefix(inner): one for name, one in copied(module).items()}, copied(net))
