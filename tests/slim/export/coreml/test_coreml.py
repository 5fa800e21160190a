"""`export(..., format="coreml")`: what is in the package, and what its operations compute by their definitions."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from lightning_roulette.slim.export.coreml import writing
from lightning_roulette.slim.export.coreml.extra import imported
from lightning_roulette.slim.export.coreml.reading import bytes_of, weights_of
from lightning_roulette.slim.export.export import export
from tests.network.coupling.networks import Joined
from tests.support.networks import Layers, known, numbers, state_of

MISSING = "the package for Core ML was not written: it needs the extra `coreml`"


@pytest.fixture(scope="module", autouse=True)
def installed():
    try:
        imported("coremltools")
    except ImportError:
        pytest.skip(MISSING)


@torch.no_grad()
def pruned(model: nn.Module) -> nn.Module:
    """The network with nine of ten weights zero."""
    chance = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight *= torch.rand(weight.shape, generator=chance) < 0.1
    return model.float().eval()


class Pictures(Layers):
    """Has a batch normalisation, a residual addition and a pooling, which coremltools knows from traces alone."""

    def __init__(self) -> None:
        super().__init__(
            first=nn.Conv2d(2, 12, 3, padding=1),
            norm=nn.BatchNorm2d(12),
            inner=nn.Conv2d(12, 12, 3, padding=1),
            head=nn.Linear(108, 40),
        )

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = nn.functional.max_pool2d(x + torch.relu(self.inner(x)), 2)
        return self.head(x.flatten(1))


IMAGES = numbers(1, 2, 6, 6).float()
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 12)), numbers(3, 20).float()),
    "pictures": (Pictures, IMAGES),
}


@pytest.fixture(scope="module", params=NETWORKS)
def written(request, tmp_path_factory):
    build, inputs = NETWORKS[request.param]
    model, path = pruned(known(build())), tmp_path_factory.mktemp("coreml") / "net.mlpackage"
    before = state_of(model)
    exported = export(model, path, "coreml", example_input=inputs, removal=False)
    assert state_of(model) == before
    return model, inputs, exported, path


def test_by_the_definitions_of_its_operations_the_package_computes_the_network(written):
    from tests.slim.export.coreml.running import computed

    model, inputs, _, path = written
    (name,) = [one.name for one in imported("coremltools").utils.load_spec(str(path)).description.input]
    for given in (inputs, numbers(*inputs.shape, seed=4).float()):
        (output,) = computed(path, **{name: given})
        assert (output - model(given)).abs().max() < 1e-5


def test_weights_are_stored_as_bit_masks_and_read_back_bit_for_bit(written):
    model, _, exported, path = written
    weights = dict(model.named_parameters())
    found = [one for one in exported.layers if one.name in weights]
    assert len(found) >= 2
    for one in found:
        weight = weights[one.name]
        assert (one.shape, one.survivors) == (tuple(weight.shape), int(weight.count_nonzero()))
        assert any(np.array_equal(weight.detach().numpy(), stored.values) for stored in weights_of(path).values())
        assert one.form == "bitmap"
        assert one.stored == -(-weight.numel() // 8) + 4 * one.survivors < one.dense == 4 * weight.numel()


def test_the_report_says_the_bytes_of_the_package_and_of_the_dense_one(written):
    _, _, exported, path = written
    assert exported.flash == bytes_of(path) < exported.dense_flash
    assert f"File: {exported.flash:,} bytes; {exported.dense_flash:,} with dead units and all zeros." in str(exported)
    assert "It was not run: Core ML is on Apple's systems only." in str(exported)
    with pytest.raises(RuntimeError, match="is not run here"):
        exported.run(IMAGES)


def test_a_weight_merged_with_a_batch_normalisation_is_named_as_in_the_package_and_the_report_says_so(written):
    model, _, exported, _ = written
    merged = [one for one in exported.layers if one.name not in dict(model.named_parameters())]
    if isinstance(model, Pictures):
        (weight,) = merged
        assert (weight.shape, weight.survivors) == ((12, 2, 3, 3), int(model.first.weight.count_nonzero()))
        assert "are no weights of the network" in str(exported)
    else:
        assert not merged
        assert "are no weights of the network" not in str(exported)


def test_dead_units_are_not_in_the_package(tmp_path):
    pytest.importorskip("torch_pruning", reason="needs the extra `units`")
    model = known(Joined()).float().eval()
    with torch.no_grad():
        model.d.weight.unflatten(1, (8, 16))[:, ::2] = 0
    exported = export(model, tmp_path / "net.mlpackage", "coreml", example_input=IMAGES)
    assert {one.name: one.shape for one in exported.layers}["c.weight"] == (4, 10, 1, 1)
    assert "Removed, as nothing reads them or they are constant: 4 of 8 units of c." in str(exported)
    assert exported.flash < exported.dense_flash


def test_halves_are_those_of_the_network_rounded(tmp_path):
    build, inputs = NETWORKS["linear"]
    model, path = pruned(known(build())), tmp_path / "net.mlpackage"
    exported = export(model, path, "coreml", example_input=inputs, removal=False, values="float16")
    assert exported.values == "float16"
    for one in exported.layers:
        weight = model.get_parameter(one.name).detach().half()
        assert any(np.array_equal(weight.numpy(), stored.values) for stored in weights_of(path).values())
        assert one.dense == 2 * weight.numel()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_networks_of_other_types_are_written_in_float32(tmp_path, kind):
    build, inputs = NETWORKS["linear"]
    model, path = pruned(known(build())).to(kind), tmp_path / "net.mlpackage"
    exported = export(model, path, "coreml", example_input=inputs.to(kind), removal=False)
    assert exported.values == "float32"
    for one in exported.layers:
        weight = model.get_parameter(one.name).detach().float()
        assert any(np.array_equal(weight.numpy(), stored.values) for stored in weights_of(path).values())
        assert one.dense == 4 * weight.numel()


class Two(Layers):
    def forward(self, x, y):
        return self.b(torch.relu(self.a(x)) + y)


def test_inputs_of_the_package_have_the_names_of_the_networks(tmp_path):
    model = pruned(known(Two(a=nn.Linear(5, 60), b=nn.Linear(60, 20))))
    inputs = {"x": numbers(3, 5).float(), "y": numbers(3, 60).float()}
    export(model, path := tmp_path / "net.mlpackage", "coreml", example_input=inputs, removal=False)
    spec = imported("coremltools").utils.load_spec(str(path))
    assert [one.name for one in spec.description.input] == ["x", "y"]


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_expressed_is_refused_and_what_is_there_stays(tmp_path):
    path = tmp_path / "net.mlpackage"
    with pytest.raises(ValueError, match="Branching of which PyTorch's exporter makes no graph"):
        export(Branching(), path, "coreml", example_input=IMAGES, removal=False)
    with pytest.raises(TypeError, match="quantise is no option of format='coreml', which has removal, values"):
        export(Branching(), path, "coreml", example_input=IMAGES, quantise=True)
    with pytest.raises(ValueError, match="validation was given, but files of format='coreml' are not run here"):
        export(Branching(), path, "coreml", example_input=IMAGES, validation=(IMAGES, IMAGES))
    with pytest.raises(ValueError, match=r"must end in \.mlpackage"):
        export(Branching(), tmp_path / "net.onnx", "coreml", example_input=IMAGES)
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="which exists and is no package"):
        export(Branching(), path, "coreml", example_input=IMAGES)
    assert [one.name for one in tmp_path.rglob("*")] == ["net.mlpackage", "mine.txt"]


@pytest.mark.parametrize(("kind", "values", "most"), [("float32", "float16", 1e5), ("float64", "float32", 1e39)])
def test_numbers_that_the_type_of_the_package_does_not_hold_are_refused(tmp_path, kind, values, most):
    model = nn.Linear(3, 2).to(getattr(torch, kind))
    with torch.no_grad():
        model.weight[0, 1] = most
    with pytest.raises(ValueError, match=rf"weight has numbers above .*, the limit of {values}"):
        export(model, tmp_path / "net.mlpackage", "coreml", example_input=torch.zeros(1, 3), values=values)
    assert not list(tmp_path.iterdir())


def test_sparse_weights_that_are_not_the_dense_ones_are_refused_and_a_former_package_stays(tmp_path, monkeypatch):
    build, inputs = NETWORKS["linear"]
    model, path = pruned(known(build())), tmp_path / "net.mlpackage"
    export(model, path, "coreml", example_input=inputs, removal=False)
    before = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    other = writing.to_model(known(build()).float().eval(), inputs, "float32")
    monkeypatch.setattr(writing, "with_sparse_weights", lambda *_: other)
    with pytest.raises(ValueError, match="of the package are not the dense ones. Nothing was written"):
        export(model, path, "coreml", example_input=inputs, removal=False)
    assert {one: one.read_bytes() for one in path.rglob("*") if one.is_file()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_coremltools_prints_nothing_and_its_logger_is_left_as_it_was(tmp_path, capfd):
    build, inputs = NETWORKS["linear"]
    export(pruned(known(build())), tmp_path / "net.mlpackage", "coreml", example_input=inputs, removal=False)
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("coremltools").disabled
