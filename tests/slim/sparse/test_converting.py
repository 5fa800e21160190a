"""Sparse weights give the outputs of dense ones, keep the state dict, and can be taken back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

from lightning_roulette import to_dense, to_sparse
from lightning_roulette.slim.measuring.timing import Latency
from lightning_roulette.slim.sparse import converting
from lightning_roulette.slim.sparse.layers import Sparse, sparse_layer


def pruned(layer: nn.Module, zeros: float = 0.9) -> nn.Module:
    chance = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=chance)
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape, generator=chance) >= zeros
    return layer


def clocked(monkeypatch: pytest.MonkeyPatch, layers: Iterable[dict[str, float]], networks: Iterable[float]) -> None:
    """Let layers and networks take these times: one entry for each that is timed."""
    of_layers, of_networks = iter(layers), iter(networks)

    def latencies(calls: Mapping[str, Callable[[], object]], *_: float, **__: object) -> dict[str, Latency]:
        if any("network" in name for name in calls):
            return {name: Latency(next(of_networks), 0, 1) for name in calls}
        known = next(of_layers)
        return {name: Latency(known[name], 0, 1) for name in calls}

    monkeypatch.setattr(converting, "latencies", latencies)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse layers take half of the time: first as columns, then as rows, by turns. So does the network afterwards."""
    first, second = ({"dense": 1.0, "columns": 0.5, "rows": 0.75}, {"dense": 1.0, "columns": 0.75, "rows": 0.5})
    clocked(monkeypatch, itertools.cycle([first, second]), itertools.cycle([1.0, 0.5]))


def network() -> nn.Module:
    return pruned(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.Flatten(),
            nn.Linear(6 * 6 * 5, 20), nn.ReLU(), nn.Linear(20, 4),
        )
    )  # fmt: skip


IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(1))
LAYERS = {
    "linear": (nn.Linear(7, 5), (4, 7)),
    "linear without bias": (nn.Linear(7, 5, bias=False), (4, 7)),
    "linear on one vector": (nn.Linear(7, 5), (7,)),
    "linear on sequences": (nn.Linear(7, 5), (2, 3, 7)),
    "no samples": (nn.Linear(7, 5), (0, 7)),
    "1 x 1": (nn.Conv2d(3, 5, 1), (2, 3, 4, 6)),
    "1 x 1 with a stride": (nn.Conv2d(3, 5, 1, stride=(2, 3)), (2, 3, 5, 7)),
    "1 x 1 with padding": (nn.Conv2d(3, 5, 1, padding=1), (2, 3, 4, 6)),
    "3 x 3": (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 4, 6)),
    "3 x 2 with all options": (nn.Conv2d(3, 5, (3, 2), (2, 1), (0, 2), (1, 2), bias=False), (2, 3, 8, 6)),
    "same padding": (nn.Conv2d(3, 5, 3, padding="same", dilation=2), (2, 3, 6, 7)),
    "valid padding": (nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 6, 7)),
    "one image": (nn.Conv2d(3, 5, 3), (3, 6, 7)),
}


@pytest.mark.parametrize("way", ["columns", "rows"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_sparse_layer_gives_the_outputs_of_the_dense_one_and_comes_back(case, way):
    layer, shape = LAYERS[case]
    layer = pruned(copy.deepcopy(layer), 0.6).double()
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sparse, before = sparse_layer(layer, way), copy.deepcopy(layer)
    torch.testing.assert_close(sparse(x), before(x), rtol=1e-12, atol=1e-12)
    assert sparse(x).is_contiguous()
    dense = sparse.dense()
    assert type(dense) is type(before)
    assert torch.equal(dense(x), before(x))
    assert dense.bias is layer.bias


@pytest.mark.usefixtures("faster")
def test_every_layer_is_converted_and_the_state_dict_stays():
    model = network().eval()
    before, outputs = copy.deepcopy(model.state_dict()), model(IMAGES)
    found = to_sparse(model, IMAGES)
    assert found.converted == ("0", "3", "5", "7")
    assert [layer.way for layer in model.modules() if isinstance(layer, Sparse)] == ["columns", "rows"] * 2
    torch.testing.assert_close(model(IMAGES), outputs)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert found.speedup == 2
    assert "4 of 4 layers are sparse now. The network takes 500,000 us instead of 1,000,000 us" in str(found)


@pytest.mark.usefixtures("faster")
def test_a_converted_network_comes_back_with_its_parameters():
    model = network()
    model[0].weight.requires_grad_(False)
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    to_sparse(model, IMAGES)
    assert model.training
    assert to_dense(model) is model
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(torch.equal(after[name], parameters[name]) for name in after)
    assert after["5.bias"] is parameters["5.bias"]
    assert not after["0.weight"].requires_grad
    assert torch.equal(model.eval()(IMAGES), before.eval()(IMAGES))


@pytest.mark.usefixtures("faster")
def test_other_weights_can_be_loaded_into_a_converted_network(tmp_path):
    model, other = network(), pruned(network(), 0.5)
    to_sparse(model, IMAGES)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    model.load_state_dict(torch.load(tmp_path / "other.pt", weights_only=True))
    torch.testing.assert_close(model.eval()(IMAGES), other.eval()(IMAGES), rtol=1e-4, atol=1e-4)
    without = {name: value for name, value in other.state_dict().items() if name != "5.weight"}
    with pytest.raises(RuntimeError, match="Missing key.*5.weight"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match="size mismatch for 5.weight"):
        model.load_state_dict({**without, "5.weight": torch.rand(2, 2)})


@pytest.mark.usefixtures("faster")
def test_a_converted_network_is_copied_and_moved_to_another_type():
    model = network().eval()
    to_sparse(model, IMAGES)
    torch.testing.assert_close(copy.deepcopy(model)(IMAGES), model(IMAGES))
    outputs = model(IMAGES)
    assert model.double()[5].weight.dtype == torch.float64
    torch.testing.assert_close(model(IMAGES.double()).float(), outputs)


class Odd(nn.Module):
    """A layer of each kind that must stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.Conv2d(4, 4, 3, groups=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.uneven = nn.Conv2d(4, 4, (1, 4), padding="same", dilation=(1, 1))
        self.full, self.unused, self.hooked = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.other.weight = self.tied.weight
        self.hooked.register_forward_hook(lambda *_: None)
        self.good = nn.Linear(16, 16)
        self.again = self.good

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        x = self.uneven(self.mirrored(self.groups(x))).flatten(1)
        x = self.other(self.tied(self.hooked(self.full(x))))
        return {"out": self.again(self.good(self.attention(x, x, x)[0]))}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.usefixtures("faster")
def test_layers_that_cannot_have_a_sparse_weight_are_named_with_the_reason():
    model = pruned(Odd()).eval()
    model.full.weight.data.fill_(1)
    model.double()
    x = {"x": torch.rand(2, 4, 4, 4, dtype=torch.float64)}
    before = model(**x)["out"]
    found = to_sparse(model, x)
    torch.testing.assert_close(model(**x)["out"], before)
    assert found.converted == ("good",)
    assert model.again is model.good
    odd = "it has groups, or padding that is not zeros or not equal on both sides"
    assert {layer.name: layer.reason for layer in found.layers if layer.reason} == {
        "groups": odd,
        "mirrored": odd,
        "uneven": odd,
        "full": "few zeros",
        "unused": "not called",
        "hooked": "it has hooks or a parametrisation",
        "tied": "its weight is shared",
        "other": "its weight is shared",
    }


@pytest.mark.parametrize(
    ("columns", "networks", "reason"),
    [(0.95, [1.0], "not 1.1 times as fast"), (0.5, [1.0, 1.0], "the whole network is not faster")],
)
def test_what_is_not_faster_stays_dense(monkeypatch, columns, networks, reason):
    clocked(monkeypatch, itertools.repeat({"dense": 1.0, "columns": columns, "rows": 2.0}), networks)
    model = network()
    before = list(model)
    found = to_sparse(model, IMAGES)
    assert {layer.reason for layer in found.layers} == {reason}
    assert all(one is other for one, other in zip(model, before, strict=True))
    assert found.speedup == 1
    assert "0 of 4 layers are sparse now." in str(found)


def test_wrong_sparse_outputs_are_not_used(monkeypatch):
    monkeypatch.setattr(Sparse, "_product", lambda self, rows: rows @ self.weight.flatten(1).t() + 0.1)
    clocked(monkeypatch, itertools.repeat({"dense": 1.0}), [1.0])
    found = to_sparse(network(), IMAGES)
    assert {layer.reason for layer in found.layers} == {"the outputs differ"}


class Ruled(nn.Module):
    """Gives minus infinity to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = pruned(nn.Linear(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).masked_fill(torch.arange(4) == 1, -torch.inf)


@pytest.mark.usefixtures("faster")
def test_a_network_with_infinite_outputs_is_converted_too():
    model, inputs = Ruled(), torch.rand(3, 20)
    expected = model(inputs)
    to_sparse(model, inputs)
    assert isinstance(model.layer, Sparse)
    assert torch.allclose(model(inputs), expected)


@pytest.mark.usefixtures("faster")
def test_each_module_is_in_its_own_mode_again():
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)))
    model[1].eval()
    assert to_sparse(model, torch.rand(4, 8)).converted == ("0", "2")
    assert [part.training for part in model.modules()] == [True, True, False, True]


def test_half_precision_and_a_single_layer_stay_dense():
    assert to_sparse(pruned(nn.Linear(8, 8)), torch.rand(2, 8)).layers[0].reason == "it is the whole model"
    model = pruned(nn.Sequential(nn.Linear(8, 8))).bfloat16()
    assert to_sparse(model, torch.rand(2, 8).bfloat16()).layers[0].reason == "its type is bfloat16"


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="model is a dict"):
        to_sparse({}, IMAGES)
    with pytest.raises(TypeError, match="example_input is of type int"):
        to_sparse(network(), 3)
    with pytest.raises(ValueError, match="min_speedup is 0.5, but must be at least 1"):
        to_sparse(network(), IMAGES, min_speedup=0.5)


def test_hooks_are_removed_when_the_network_fails():
    model = network()
    with pytest.raises(RuntimeError, match="shapes"):
        to_sparse(model, torch.rand(1, 3, 9, 9))
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())
