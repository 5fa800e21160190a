"""Parameters over one storage are tied; parts of one buffer are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_roulette import prunable_parameters, skipped_parameters
from lightning_roulette.network.refittable import layers_of
from lightning_roulette.network.ties import Tie, shared_with_buffers, ties_of


def pair(first: torch.Tensor, second: torch.Tensor) -> nn.Module:
    """Two linear layers over these tensors."""
    net = nn.Module()
    for name, values in (("a", first), ("b", second)):
        layer = nn.Linear(*values.shape[::-1])
        layer.weight.data = values
        net.add_module(name, layer)
    return net


BUFFER = torch.arange(64.0)
ARRAY = np.arange(16, dtype=np.float32)
BOTH = ("a.weight", "b.weight")
TIED = {
    "the same": (BUFFER.view(8, 8), BUFFER.view(8, 8), "a.weight"),
    "a transpose": (BUFFER.view(4, 16), BUFFER.view(4, 16).t(), "a.weight"),
    "another shape": (BUFFER.view(4, 16), BUFFER.view(8, 8), "a.weight"),
    "a part": (BUFFER.view(8, 8), BUFFER.view(8, 8)[2:4], "a.weight"),
    "a part first": (BUFFER.view(8, 8)[:, 3:5], BUFFER.view(8, 8), "b.weight"),
    "an overlap": (BUFFER[:40].view(5, 8), BUFFER[32:].view(4, 8), None),
    "crossing": (BUFFER.view(8, 8)[:2], BUFFER.view(8, 8)[:, :2], None),
    "NumPy": (torch.from_numpy(ARRAY).view(4, 4), torch.from_numpy(ARRAY[4:8]).view(2, 2), "a.weight"),
}
FREE = {
    "halves": (BUFFER[:32].view(4, 8), BUFFER[32:].view(4, 8)),
    "columns": (BUFFER.view(8, 8)[:, :4], BUFFER.view(8, 8)[:, 4:]),
    "every other": (BUFFER.view(8, 8)[::2], BUFFER.view(8, 8)[1::2]),
    "copies": (BUFFER.view(8, 8), BUFFER.clone().view(8, 8)),
}


@pytest.mark.parametrize(("first", "second", "whole"), TIED.values(), ids=TIED)
def test_views_of_one_memory_are_tied(first, second, whole):
    net = pair(first, second)
    assert ties_of(net) == [Tie(BOTH, whole)]
    assert list(prunable_parameters(net)) == ([whole] if whole else [])
    skipped = skipped_parameters(net)
    if whole is None:
        assert skipped["a.weight"] == "shares a part of its memory with b.weight"
        assert prunable_parameters(net, include=["*.weight"]) == {}
    else:
        (other,) = {*BOTH} - {whole}
        assert skipped[other] == f"tied to {whole}"
        assert list(prunable_parameters(net, include=[other])) == [whole]
        assert skipped_parameters(net, exclude=[other])[whole] == "excluded"
    assert layers_of(net, [whole or "a.weight"]) == ([], {whole or "a.weight": "not supported for tied weights"})


@pytest.mark.parametrize(("first", "second"), FREE.values(), ids=FREE)
def test_different_parts_of_one_buffer_are_free(first, second):
    net = pair(first, second)
    assert ties_of(net) == []
    assert list(prunable_parameters(net)) == [*BOTH]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (nn.Embedding(8, 8), "weight of Embedding"),
        (nn.LayerNorm((8, 8)), "weight of LayerNorm"),
        (nn.Linear(8, 8).requires_grad_(False), "frozen"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_tie_to_what_is_never_pruned_is_not_prunable(other, why, first):
    layer = nn.Linear(8, 8, bias=False)
    other.weight.data = layer.weight.data.t()
    net = nn.Sequential(*((other, layer) if first else (layer, other)))
    assert prunable_parameters(net) == {}
    assert skipped_parameters(net)["0.weight"] == why
    assert skipped_parameters(net)["1.weight"] == "tied to 0.weight"


def test_a_bias_over_the_memory_of_another_must_not_change():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].bias.data = net[0].bias.data
    assert [layer.bias for layer in layers_of(net, ["0.weight", "1.weight"])[0]] == [None, None]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_memory_are_free():
    net = nn.ModuleList([nn.Linear(3, 3, device="meta"), nn.LazyLinear(3), nn.Linear(0, 3)])
    assert ties_of(net) == []


@given(st.data())
def test_overlaps_are_found_as_by_counting(data):
    def view():
        rows, columns = (data.draw(st.integers(1, 4)) for _ in range(2))
        across, down = (data.draw(st.integers(1, 6)) for _ in range(2))
        return buffer.as_strided((rows, columns), (across, down), data.draw(st.integers(0, 20)))

    buffer = torch.arange(60.0)
    one, other = view(), view()
    entries = [set(values.flatten().tolist()) for values in (one, other)]
    net = nn.Module()
    net.one, net.other = nn.Parameter(one), nn.Parameter(other)
    assert net.one.data_ptr() == one.data_ptr()
    found = ties_of(net)
    if entries[0] & entries[1]:
        whole = "one" if entries[0] >= entries[1] else "other" if entries[1] >= entries[0] else None
        assert found == [Tie(("one", "other"), whole)]
    else:
        assert found == []


def test_a_parameter_in_a_buffer_is_not_prunable():
    net = nn.Module()
    net.register_buffer("flat", torch.arange(20.0))
    net.one, net.other = nn.Linear(2, 3), nn.Linear(2, 3)
    net.one.weight = nn.Parameter(net.flat[:6].view(3, 2))
    assert shared_with_buffers(net) == {"one.weight": "flat"}
    assert list(prunable_parameters(net)) == ["other.weight"]
    assert skipped_parameters(net)["one.weight"] == "shares memory with the buffer flat"
