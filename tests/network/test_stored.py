"""What a file holds of a network: names with prefixes, other precision, tensors left out or changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_roulette.network.stored import Stored, holds

TENSORS = {
    "net.0.weight": torch.tensor([[1.0, 0.0], [0.1, -3.0]]),
    "net.0.bias": torch.tensor([0.5, 0.25]),
    "head.weight": torch.tensor([[2.0, float("nan")]]),
}
MATTER = ["net.0.weight", "head.weight"]


def renamed(change):
    return {change(name): value.clone() for name, value in TENSORS.items()}


FAITHFUL = {
    "as it is": renamed(str),
    "more keys": renamed(str) | {"more": torch.ones(3), "net.0._extra_state": 5},
    "some left out": {"head.weight": TENSORS["head.weight"]},
    "a prefix": renamed(lambda name: f"model.module.{name}"),
    "compiled": renamed(lambda name: name.replace("net.", "net._orig_mod.")),
    "half": {name: value.half() for name, value in TENSORS.items()},
    "double": {name: value.double() for name, value in TENSORS.items()},
    "without a prefix": {"0.weight": TENSORS["net.0.weight"], "0.bias": TENSORS["net.0.bias"]},
}
CHANGED = {
    "a revived weight": renamed(str) | {"net.0.weight": TENSORS["net.0.weight"] + 0.1},
    "one bias": renamed(str) | {"net.0.bias": torch.zeros(2)},
    "another shape": renamed(str) | {"head.weight": torch.ones(2)},
    "a packed object": renamed(str) | {"net.0.weight": {"scale": 1.0}},
    "behind a prefix": {f"a.{name}": value + 1 for name, value in TENSORS.items()},
}


@pytest.mark.parametrize("state", FAITHFUL.values(), ids=FAITHFUL)
def test_a_faithful_file(state):
    assert Stored.of(state, TENSORS, MATTER).faithful


@pytest.mark.parametrize("state", CHANGED.values(), ids=CHANGED)
def test_a_file_with_other_weights(state):
    found = Stored.of(state, TENSORS, MATTER)
    assert not found.faithful
    assert found.differing
    assert not found.without


@pytest.mark.parametrize("state", [None, {}, 5, {"net.0.bias": TENSORS["net.0.bias"]}, {"lora": torch.ones(2)}])
def test_a_file_without_the_weights_that_matter(state):
    found = Stored.of(state, TENSORS, MATTER)
    assert (found.without, found.differing, found.faithful) == (True, (), False)


@given(st.sampled_from(sorted(TENSORS)), st.integers(0, 1))
def test_any_changed_entry_is_found_and_named(name, place):
    state = {key: value.clone() for key, value in TENSORS.items()}
    state[name].view(-1)[place] = 7.0
    assert Stored.of(state, TENSORS, MATTER).differing == (name,)


def test_the_same_memory_needs_no_comparison_but_another_view_does():
    value = torch.randn(3, 3)
    assert holds(value, value)
    assert holds(value.detach(), value)
    assert not holds(value.t(), value)
