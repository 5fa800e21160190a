"""Units: what leaves with a unit leaves nothing behind, and the network is as it was."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from lightning_roulette.network.coupling.check import are_same
from lightning_roulette.network.coupling.coupling import coupling_of
from lightning_roulette.network.coupling.groups import Member
from tests.network.coupling.networks import (
    IMAGES,
    NETWORKS,
    ROWS,
    WORDS,
    Hidden,
    Joined,
    Own,
    Placed,
    Shuffled,
    sequences,
)
from tests.support.networks import Layers, known, numbers, state_of


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, inputs, _ = NETWORKS[name]
    return known(build()).eval(), inputs


def entries(member: Member, unit: int) -> torch.Tensor:
    return (member.units == unit).nonzero().flatten()


def attributes_of(model: nn.Module) -> dict[str, tuple[type, dict[str, object]]]:
    """The class of each module, and its attributes: the values of those that are numbers, words or lists."""
    return {
        name: (type(part), {key: one if isinstance(one, int | str | list) else None for key, one in vars(part).items()})
        for name, part in model.named_modules()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_of_units_are_those_of_the_network(name):
    model, inputs = made(name)
    assert {one.name: one.size for one in coupling_of(model, inputs).groups} == NETWORKS[name][2]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_what_computes_a_unit_is_without_effect_once_nothing_reads_it(name):
    model, inputs = made(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {key: one.clone() for key, one in tensors.items()}
    for group in coupling_of(model, inputs).groups:
        for unit in {0, group.size // 2, group.size - 1}:
            for member in group.consumers:
                tensors[member.name].index_fill_(member.dim, entries(member, unit), 0)
            before = model(inputs)
            for member in group.producers:
                there = entries(member, unit)
                part = tensors[member.name].index_select(member.dim, there)
                tensors[member.name].index_copy_(member.dim, there, part * 1e3 + 1)
            for member in group.consumers:  # a layer may compute and read units of one group
                tensors[member.name].index_fill_(member.dim, entries(member, unit), 0)
            assert (model(inputs) - before).abs().max() <= 1e-9 * before.abs().max(), (group.name, unit)
            for key, value in state.items():
                tensors[key].copy_(value)


def layout(model: nn.Module, inputs: torch.Tensor):
    """Which entries belong to each unit."""
    return {
        (group.name, group.kind): [
            (one.name, one.dim, one.units.tolist()) for one in (*group.producers, *group.consumers)
        ]
        for group in coupling_of(model, inputs).groups
    }


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_units_of_a_pruned_network_are_those_of_the_dense_one(name, kept):
    model, inputs = made(name)
    expected = layout(model, inputs)
    for group in coupling_of(model, inputs).groups:
        for member in group.consumers:  # of each group a single unit has an effect
            places = ((member.units >= 0) & (member.units != kept % group.size)).nonzero().flatten()
            model.get_parameter(member.name).index_fill_(member.dim, places, 0)
    before = state_of(model)
    assert layout(model, inputs) == expected
    assert state_of(model) == before


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_unit_has_something_that_computes_it_and_something_that_reads_it(name):
    model, inputs = made(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in coupling_of(model, inputs).groups:
        for members in (group.producers, group.consumers):
            assert {unit for one in members for unit in one.units.tolist()} - {-1} == set(range(group.size))
        for one in (*group.producers, *group.consumers):
            assert tensors[one.name].shape[one.dim] == len(one.units)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_bit_for_bit_as_it_was(name):
    model, inputs = made(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    list(model.parameters())[-1].grad = numbers(*list(model.parameters())[-1].shape)
    before = state_of(model), attributes_of(model)
    coupling_of(model, inputs)
    assert (state_of(model), attributes_of(model)) == before


def test_frozen_layers_are_followed_too():
    model = known(Joined()).requires_grad_(False)
    assert {one.name for one in coupling_of(model, IMAGES).groups} == {"a", "b", "c"}
    assert not any(one.requires_grad for one in model.parameters())


def test_the_index_maps_of_a_concatenation_and_of_a_flattening_are_written_out():
    groups = {one.name: one for one in coupling_of(known(Joined()), IMAGES).groups}
    assert groups["b"].consumers[0].units.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, 4, 5]
    assert groups["c"].consumers[0].units.tolist() == [unit for unit in range(8) for _ in range(16)]


def test_query_heads_that_share_keys_are_one_unit():
    (head,) = [one for one in coupling_of(known(sequences(Own(4, 2))), WORDS).groups if one.kind == "head"]
    units = {one.name: one.units.tolist() for one in (*head.producers, *head.consumers)}
    assert units["1.q_proj.weight"] == units["1.o_proj.weight"] == [0] * 8 + [1] * 8
    assert units["1.k_proj.weight"] == units["1.v_proj.bias"] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("model", "inputs", "layer", "reason"),
    [
        (Shuffled(), IMAGES, "a", "the output still depends on its units when nothing reads them"),
        (Hidden(), ROWS, "a", "the output still depends on its units when nothing reads them"),
        (Joined(), IMAGES, "d", "its units are outputs of the network, or no layer reads them"),
        (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)), ROWS, "0", "its units pass 1, which mixes"),
        (nn.Sequential(nn.Linear(5, 6), nn.Softmax(1), nn.Linear(6, 2)), ROWS, "0", "the output still depends"),
        (nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 2)), ROWS, "0", "it has a single unit"),
        (nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Flatten(), nn.Linear(6, 2)), ROWS, "3", "its units are out"),
        (
            sequences(Placed(6, 3, slopes=True)),
            WORDS,
            "1",
            "the network cannot be called with another number of its heads",
        ),
        (nn.Sequential(nn.Linear(5, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))), ROWS, "0", "1.weight"),
    ],
)
def test_what_must_stay_is_named_with_the_reason(model, inputs, layer, reason):
    assert coupling_of(known(model), inputs).left[layer].startswith(reason)


class Between(Layers):
    """Computes something between two layers."""

    def __init__(self, what, reads: int = 12) -> None:
        super().__init__(a=nn.Linear(5, 12), b=nn.Linear(reads, 2))
        self.what = what

    def forward(self, x):
        return self.b(self.what(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Between(lambda y: y * torch.ones(12).to(y)), "the network cannot be called"),
        (Between(lambda y: y.unflatten(-1, (6, 2)).flatten(1)), "the network cannot be called"),
        (Between(lambda y: y.unflatten(-1, (-1, 2)).flatten(1)), "the network cannot be called"),
        (Between(lambda y: y.unflatten(-1, (-1, 4)).flatten(1)), "the network cannot be called"),
        (Between(lambda y: y[:, :6] * 2 + y[:, 6:], reads=6), "the network cannot be called"),
        (Between(lambda y: torch.cat(y.split([3, 5, 4], 1), 1)), "its units cannot be followed"),
        (Between(lambda y: y / y.shape[1]), "the outputs of the network differ"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_units_whose_number_the_code_needs_are_left_whole(model, reason, dtype):
    model = known(copy.deepcopy(model)).to(dtype)
    found = coupling_of(model, ROWS.to(dtype))
    assert found.left["a"].startswith(reason)
    assert not found.groups


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_leaves_no_units_whole(dtype):
    model = known(Between(torch.tanh)).to(dtype)
    assert [one.name for one in coupling_of(model, ROWS.to(dtype)).groups] == ["a"]


class Ruled(Layers):
    """Reads units in the reverse order, and rules out some of its classes."""

    def __init__(self, value: float, classes: int = 1) -> None:
        super().__init__(a=nn.Linear(5, 6), b=nn.Linear(6, 7))
        self.value, self.classes = value, classes

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)).flip(-1))
        return torch.where(torch.arange(7) < self.classes, torch.full_like(y, self.value), y)


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float64).min, torch.inf])
@pytest.mark.parametrize("classes", [1, 6])
def test_a_dependence_shows_beside_outputs_that_are_far_larger(value, classes):
    found = coupling_of(known(Ruled(value, classes)), ROWS)
    assert "a" in found.left
    assert not found.groups


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1.0, -1e9], [1.0 + 1e-8, -1e9], True),
        ([1.0, -1e9], [1.01, -1e9], False),
        ([1.0, 2.0, -1e9], [1.0, 2.0, -1e9 - 1], True),
        ([1e-4, 3.0, 5.0], [1e-4 + 1e-6, 3.0, 5.0], True),
        ([0.0, 0.0], [1e-9, 0.0], False),
        ([0.0, 2.0], [1e-9, 2.0], True),
        ([torch.inf, 1.0], [3.0, 1.0], False),
        ([3.0, 1.0], [torch.inf, 1.0], False),
        ([torch.nan], [torch.nan], False),
    ],
)
def test_outputs_are_the_same_to_six_digits_of_the_largest_of_their_kind(one, other, same):
    assert are_same([torch.tensor(one, dtype=torch.float64)], [torch.tensor(other, dtype=torch.float64)]) == same


class Graph(Layers):
    """Takes the nodes of a graph and which are adjacent. Neither can be cut alone."""

    def forward(self, x, adjacent):
        return adjacent @ self.b(torch.relu(adjacent @ self.a(x)))


def test_a_network_that_does_not_take_two_samples_is_called_with_the_whole_example():
    found = coupling_of(known(Graph(a=nn.Linear(5, 6), b=nn.Linear(6, 2))), (numbers(4, 5), numbers(4, 4)))
    assert {one.name: one.size for one in found.groups} == {"a": 6}


class Spectrum(Layers):
    """Returns complex numbers."""

    def forward(self, x):
        return torch.fft.rfft(self.b(torch.relu(self.a(x))))


def test_outputs_may_be_complex():
    found = coupling_of(known(Spectrum(a=nn.Linear(5, 6), b=nn.Linear(6, 4))), ROWS)
    assert {one.name: one.size for one in found.groups} == {"a": 6}
    assert found.left["b"].startswith("its units are outputs of the network")


def test_tied_layers_stay():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].weight = model[0].weight
    found = coupling_of(known(model), ROWS)
    assert not found.groups
    assert found.left["0"].endswith("is tied to another parameter")


class Noisy(Layers):
    def forward(self, x):
        return self.b(nn.functional.dropout(self.a(x)))


def test_a_network_that_is_no_function_is_left_alone_with_its_random_numbers():
    model = known(Noisy(a=nn.Linear(5, 40), b=nn.Linear(40, 3)))
    before = torch.get_rng_state()
    found = coupling_of(model, ROWS)
    assert not found.groups
    assert found.left["a"].startswith("two calls of the network with equal inputs differ")
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_inputs_are_refused_before_anything_runs():
    with pytest.raises(TypeError, match="example_input is of type int"):
        coupling_of(Joined(), 3)
    with pytest.raises(ValueError, match=r"cannot be called with example_input \(RuntimeError"):
        coupling_of(Joined(), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="returns no tensor of floating-point or complex numbers"):
        coupling_of(nn.Sequential(nn.Embedding(3, 2), Numbered()), torch.zeros(2, 2, dtype=torch.int64))


class Numbered(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"lightning-roulette\[units\]"):
        coupling_of(Joined().double(), IMAGES)
