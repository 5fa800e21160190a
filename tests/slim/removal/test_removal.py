"""Dead units leave a network, and its outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_roulette.network.coupling.coupling import coupling_of
from lightning_roulette.slim.removal.removal import dead_units, remove_dead
from tests.network.coupling.networks import IMAGES, NETWORKS, ROWS, Block, Joined
from tests.support.networks import Layers, known, numbers, state_of


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, inputs, _ = NETWORKS[name]
    return known(build()).eval(), inputs


@torch.no_grad()
def unread(model: nn.Module, inputs: torch.Tensor) -> dict[str, list[int]]:
    """Set what reads every second unit to zero. Return these units by group."""
    chosen = {}
    for group in coupling_of(model, inputs).groups:
        chosen[group.name] = list(range(1, group.size, 2))
        for member in group.consumers:
            places = torch.isin(member.units, torch.tensor(chosen[group.name])).nonzero().flatten()
            model.get_parameter(member.name).index_fill_(member.dim, places, 0)
    return chosen


def others(inputs: torch.Tensor) -> torch.Tensor:
    return numbers(*inputs.shape, seed=7) if inputs.is_floating_point() else inputs.flip(0)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_units_that_nothing_reads_are_gone_and_the_outputs_stay(name):
    model, inputs = made(name)
    chosen = unread(model, inputs)
    before = state_of(model)
    slim = remove_dead(model, inputs)
    assert state_of(model) == before
    assert (slim(others(inputs)) - model(others(inputs))).abs().max() < 1e-12
    assert list(slim.state_dict()) == list(model.state_dict())
    for group in coupling_of(model, inputs).groups:
        for one in (*group.producers, *(one for one in group.consumers if int(one.units.min()) >= 0)):
            left = slim.state_dict()[one.name].shape[one.dim]
            assert left == len(one.units) - int(torch.isin(one.units, torch.tensor(chosen[group.name])).sum())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_without_units_is_the_network_with_zeros_in_training_too(name):
    model, inputs = made(name)
    unread(model, inputs)
    slim = remove_dead(model, inputs)
    for one in (model, slim):
        one.train()
        for part in one.modules():
            if isinstance(part, nn.Dropout | nn.MultiheadAttention):
                part.eval()
    assert (slim(inputs) - model(inputs)).abs().max() < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_whose_units_all_live_stays(name):
    model, inputs = made(name)
    slim = remove_dead(model, inputs)
    assert slim is not model
    assert all(torch.equal(one, slim.state_dict()[key]) for key, one in model.state_dict().items())
    assert dead_units(model, inputs).dead == 0


def chain() -> nn.Module:
    return known(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)))


@torch.no_grad()
def test_units_without_weights_are_folded_into_the_next_bias():
    model = chain()
    model[0].weight[1:3] = 0  # constant, not zero
    slim = remove_dead(model, ROWS)
    assert slim[0].weight.shape == (4, 5)
    assert not torch.equal(slim[2].bias, model[2].bias)
    assert (slim(others(ROWS)) - model(others(ROWS))).abs().max() < 1e-12


@torch.no_grad()
def test_death_spreads_forwards_and_backwards():
    model = chain()
    model[0].weight[:3] = 0  # constants
    model[2].weight[0, 3:] = 0  # reads constants alone
    model[2].weight[1:, 4] = 0  # read by the unit 1 alone
    model[2].weight[0, 4] = 0
    model[2].weight[1, 4] = 1.0
    model[4].weight[:, 1] = 0  # the unit 1 is read by none
    slim = remove_dead(model, ROWS)
    assert [tuple(one.shape) for one in slim.parameters()] == [(2, 5), (2,), (5, 2), (5,), (2, 5), (2,)]
    assert (slim(others(ROWS)) - model(others(ROWS))).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("second", "left", "staying"),
    [
        (nn.Conv2d(6, 4, 3), 4, 0),
        (nn.Conv2d(6, 4, 3, stride=2, dilation=2), 4, 0),
        (nn.Conv2d(6, 4, 3, padding=1), 6, 2),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"), 4, 0),
        (nn.Conv2d(6, 4, 3, padding="same"), 6, 2),
        (nn.Conv2d(6, 4, 1, padding="same"), 4, 0),
        (nn.Conv2d(6, 4, 3, bias=False), 6, 2),
        (nn.Conv2d(6, 4, 3, groups=2), 4, 0),
        (nn.ConvTranspose2d(6, 4, 3), 6, 2),
    ],
)
@torch.no_grad()
def test_constants_are_folded_only_where_that_is_exact(second, left, staying):
    model = known(nn.Sequential(nn.Conv2d(2, 6, 1), nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)))
    model[0].weight[[1, 4]] = 0
    slim = remove_dead(model, IMAGES)
    assert len(slim[0].weight) == left
    (count,) = [one for one in dead_units(model, IMAGES).groups if one.name == "0"]
    each = 6 // count.units  # channels of a unit
    assert (6 - count.dead * each, count.constant * each) == (left, staying)
    assert (slim(others(IMAGES)) - model(others(IMAGES))).abs().max() < 1e-12


@torch.no_grad()
def test_a_constant_of_zero_leaves_before_a_padded_convolution():
    model = known(nn.Sequential(nn.Conv2d(2, 8, 3), Block(8), nn.Flatten(), nn.Linear(128, 3))).eval()
    model[1].a.weight[[2, 5]] = 0
    model[1].n.bias[[2, 5]] = -1.0  # the next is a ReLU
    model[1].n.running_mean[[2, 5]] = 0
    slim = remove_dead(model, IMAGES)
    assert slim[1].a.weight.shape == (6, 8, 3, 3)
    assert slim[1].b.weight.shape == (8, 6, 3, 3)
    assert (slim(others(IMAGES)) - model(others(IMAGES))).abs().max() < 1e-12


class Wired(Layers):
    """Writes the number of its units into its code."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).view(-1, 16 * 6))


@torch.no_grad()
def test_a_network_that_computes_with_the_number_of_its_units_keeps_them_and_says_so():
    model = known(Wired(a=nn.Conv2d(2, 6, 3), b=nn.Linear(96, 3)))
    model.a.weight[1] = 0
    slim = remove_dead(model, IMAGES)
    assert slim.a.weight.shape == model.a.weight.shape
    assert slim.a.out_channels == 6
    assert (slim(others(IMAGES)) - model(others(IMAGES))).abs().max() < 1e-12
    assert dead_units(model, IMAGES).left["a"] == "the network cannot be called with another number of its units"


class Shown(Layers):
    """Returns its hidden units as truth values, or the number of the largest one, beside its outputs."""

    what = "mask"

    def forward(self, x):
        hidden = self.a(x)
        shown = {"mask": hidden > 0, "largest": hidden.argmax(1)}[self.what]
        return {"outputs": self.b(hidden), "shown": shown}


@pytest.mark.parametrize("what", ["mask", "largest"])
@torch.no_grad()
def test_units_that_are_seen_in_whole_numbers_stay(what):
    model = known(Shown(a=nn.Linear(5, 8), b=nn.Linear(8, 3))).eval()
    model.what = what
    model.b.weight[:, ::2] = 0
    slim = remove_dead(model, ROWS)
    assert torch.equal(slim(others(ROWS))["shown"], model(others(ROWS))["shown"])
    assert slim.a.weight.shape == (8, 5)
    assert "depends on its units" in dead_units(model, ROWS).left["a"]


class Encoded(Layers):
    """Attention under a mask of numbers, and a layer behind it."""

    def forward(self, x, mask):
        return self.b(torch.relu(self.a(self.look(x, x, x, attn_mask=mask, need_weights=False)[0])))


class Lengths(Layers):
    """Reads sequences of falling lengths."""

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.b(torch.relu(self.a(self.gru(packed)[1][0])))


def with_a_mask():
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    return Encoded(look=nn.MultiheadAttention(6, 2, batch_first=True), a=nn.Linear(6, 8), b=nn.Linear(8, 3)), mask


def with_lengths():
    return Lengths(gru=nn.GRU(6, 6, batch_first=True), a=nn.Linear(6, 8), b=nn.Linear(8, 3)), torch.tensor([5, 4, 2])


@pytest.mark.parametrize("made", [with_a_mask, with_lengths])
@torch.no_grad()
def test_examples_whose_numbers_cannot_be_drawn_at_random_are_enough(made):
    model, second = made()
    model = known(model).eval()
    model.b.weight[:, ::2] = 0
    slim, x = remove_dead(model, (numbers(3, 5, 6), second)), numbers(3, 5, 6, seed=7)
    assert slim.a.weight.shape == (4, 6)
    assert (slim(x, second) - model(x, second)).abs().max() < 1e-12


def on_meta():
    return nn.Linear(5, 8, device="meta"), "is on the device meta"


def with_prune():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    prune.random_unstructured(model[1], "weight", 0.5)
    return model, "cannot be copied: .* Call torch.nn.utils.prune.remove"


@pytest.mark.parametrize("made", [on_meta, with_prune])
def test_networks_that_cannot_be_copied_are_refused(made):
    model, reason = made()
    with pytest.raises(ValueError, match=reason):
        remove_dead(model, ROWS.float())


def test_units_are_removed_in_inference_mode_and_the_network_trains_afterwards():
    model = chain()
    with torch.no_grad():
        model[2].weight[:, 0] = 0
    with torch.inference_mode():
        slim = remove_dead(model, ROWS)
    slim(ROWS).sum().backward()
    assert slim[0].weight.grad is not None


@torch.no_grad()
def test_one_unit_of_each_group_stays():
    model = known(Joined())
    model.c.weight.zero_()
    slim = remove_dead(model, IMAGES)
    assert [len(part.weight) for part in (slim.a, slim.b, slim.c)] == [1, 1, 1]
    assert (slim(others(IMAGES)) - model(others(IMAGES))).abs().max() < 1e-12


@torch.no_grad()
def test_the_new_network_keeps_modes_and_frozen_weights_and_trains():
    model = chain().train()
    model[2].weight[:, 0] = 0
    model[0].weight.requires_grad_(False)
    slim = remove_dead(model, ROWS)
    assert slim.training
    assert [one.requires_grad for one in slim.parameters()] == [one.requires_grad for one in model.parameters()]
    with torch.enable_grad():
        slim(ROWS).sum().backward()
    assert slim[2].weight.grad.shape == slim[2].weight.shape == (7, 5)


@torch.no_grad()
def test_the_count_is_a_table():
    model = chain()
    model[2].weight[:, 0] = 0
    found = dead_units(model, ROWS)
    assert (found.units, found.dead) == (13, 1)
    assert str(found).splitlines() == [
        "units  kind    all  dead  constant",
        "0      neuron    6     1         0",
        "2      neuron    7     0         0",
        "1 of 13 units are dead.",
        "4: its units are outputs of the network, or no layer reads them",
    ]


def test_outputs_that_would_change_are_refused(monkeypatch):
    from lightning_roulette.slim.removal import removal

    monkeypatch.setattr(removal.DeadUnits, "__init__", spoiled(removal.DeadUnits.__init__))
    with pytest.raises(ValueError, match="differ from those of the network by more than 1e-5"):
        remove_dead(chain(), ROWS)


def spoiled(init):
    def wrong(self, network, groups, runs):
        init(self, network, groups, runs)
        network[4].bias.detach().add_(1e-3)

    return wrong


def test_a_copy_can_be_made_slimmer_again():
    model, inputs = made("torch's attention")
    with torch.no_grad():
        model.self_attn.out_proj.weight[:, :4] = 0
    once = remove_dead(model, inputs)
    again = remove_dead(copy.deepcopy(once), inputs)
    assert again.self_attn.num_heads == once.self_attn.num_heads == 1
    assert (again(inputs) - model(inputs)).abs().max() < 1e-12


class Added(Layers):
    """Adds the mean of its inputs, times a factor, to each unit."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 8), b=nn.Linear(8, 5))

    def forward(self, x):
        return self.b(torch.relu(self.a(x) + x.mean(-1, keepdim=True)))


@pytest.mark.parametrize("example", [torch.zeros(1, 6), torch.ones(2, 6), numbers(4, 6)])
@torch.no_grad()
def test_a_unit_to_which_an_input_is_added_stays_where_a_relu_hides_it(example):
    model = known(Added()).double()
    model.a.weight[2], model.a.bias[2] = 0, -3
    slim = remove_dead(model, example.double())
    inputs = 100 * numbers(4, 6).double()
    assert torch.equal(slim(inputs), model(inputs))
    assert slim.a.out_features == 8


class Ruled(Wired):
    """Rules out a class, and tells how many units it has."""

    def forward(self, x):
        y = torch.relu(self.a(x))
        return (self.b(y) * y.shape[1]).masked_fill(torch.tensor([True, False, False]), -1e9)


@torch.no_grad()
def test_a_change_shows_beside_outputs_that_are_far_larger():
    model = known(Ruled(a=nn.Linear(6, 8), b=nn.Linear(8, 3)))
    model.b.weight[:, :3] = 0
    inputs = numbers(4, 6)
    slim = remove_dead(model, inputs)
    assert torch.equal(slim(inputs), model(inputs))
    assert dead_units(model, inputs).left["a"] == "the outputs of the network differ with another number of its units"
