"""`export(..., format="onnx")`: the file, and what onnxruntime computes with it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_roulette.slim.export.export import export
from tests.network.coupling.networks import NETWORKS, Joined
from tests.support.networks import Layers, known, numbers, state_of

onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


@torch.no_grad()
def half_dead() -> nn.Module:
    model = known(Joined()).float().eval()
    model.d.weight.unflatten(1, (8, 16))[:, ::2] = 0
    return model


IMAGES = numbers(3, 2, 6, 6).float()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model, path = half_dead(), tmp_path_factory.mktemp("onnx") / "net.onnx"
    before, judging = state_of(model), (IMAGES, model(IMAGES).argmax(1))
    exported = export(model, path, "onnx", example_input=IMAGES[:1], validation=judging)
    assert state_of(model) == before
    return model, exported, path


def test_the_file_computes_the_network_for_batches_of_any_size(written):
    model, exported, _ = written
    for inputs in (IMAGES, IMAGES[:1], numbers(7, 2, 6, 6, seed=4).float()):
        assert (exported.run(inputs) - model(inputs)).abs().max() < 1e-5


def test_dead_units_are_not_in_the_file(written):
    _, exported, path = written
    shapes = {tuple(one.dims) for one in onnx.load(path).graph.initializer}
    assert (4, 10, 1, 1) in shapes
    assert (8, 10, 1, 1) not in shapes
    assert {one.name: one.shape for one in exported.layers}["c.weight"] == (4, 10, 1, 1)
    assert exported.flash == path.stat().st_size < exported.dense_flash


def test_the_report_says_what_was_removed_and_both_times(written):
    _, exported, path = written
    text = str(exported)
    assert f"File: {exported.flash:,} bytes; {exported.dense_flash:,} with dead units." in text
    assert "Removed, as nothing reads them or they are constant: 4 of 8 units of c." in text
    assert exported.latency.seconds > 0
    assert f"Time for the example: {exported.latency}; with dead units {exported.dense_latency}." in text
    assert text.endswith(f"Written: {path}")


def test_scores_are_of_the_network_and_of_the_file(written):
    assert (written[1].scores.network, written[1].scores.device) == (1.0, 1.0)


class Two(Layers):
    def forward(self, x, y):
        return self.b(torch.relu(self.a(x)) + y)


def test_networks_with_several_inputs_are_exported_by_name(tmp_path):
    model = known(Two(a=nn.Linear(5, 6), b=nn.Linear(6, 2))).float().eval()
    inputs = {"x": numbers(3, 5).float(), "y": numbers(3, 6).float()}
    exported = export(model, tmp_path / "net.onnx", "onnx", example_input=inputs, removal=False)
    assert (exported.run(*inputs.values()) - model(**inputs)).abs().max() < 1e-5


class Fixed(Layers):
    """Is written for batches of two."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).view(2, 6))


def test_a_network_for_one_size_of_a_batch_is_exported_for_it_and_with_its_dead_units_if_wanted(tmp_path):
    model = known(Fixed(a=nn.Linear(5, 6), b=nn.Linear(6, 2))).float().eval()
    with torch.no_grad():
        model.b.weight[:, 0] = 0
    exported = export(model, tmp_path / "net.onnx", "onnx", example_input=numbers(2, 5).float(), removal=False)
    assert "It takes batches of 2 samples only" in str(exported)
    assert exported.layers[0].shape == (6, 5)
    assert exported.flash == exported.dense_flash


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise RuntimeError("no counterpart")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ValueError, match="makes no ONNX file: RuntimeError: no counterpart"):
        export(half_dead(), tmp_path / "net.onnx", "onnx", example_input=IMAGES)
    with pytest.raises(TypeError, match="values is no option of format='onnx', which has removal"):
        export(half_dead(), tmp_path / "net.onnx", "onnx", example_input=IMAGES, values="int8")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_written(written, tmp_path, monkeypatch):
    from lightning_roulette.slim.export.onnx import writing

    right = written[2].read_bytes()
    monkeypatch.setattr(writing, "to_onnx", lambda network, example: right)
    with pytest.raises(ValueError, match="outputs that differ from those of the network"):
        export(known(Joined()).float(), tmp_path / "net.onnx", "onnx", example_input=IMAGES)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"lightning-roulette\[onnx\]"):
        export(half_dead(), tmp_path / "net.onnx", "onnx", example_input=IMAGES)


@torch.no_grad()
@pytest.mark.parametrize("format", ["c", "tflm"])
def test_the_other_formats_take_networks_without_units_as_they_are(tmp_path, format):
    if format == "tflm":
        pytest.importorskip("tflite_micro", reason="needs the extra `tflm`")
    from lightning_roulette.slim.removal.removal import remove_dead

    build, _, _ = NETWORKS["residual"]
    model, inputs = known(build()).float().eval(), numbers(64, 2, 6, 6).float()
    model[1].b.weight[:, ::2] = 0
    slim = remove_dead(model, inputs)
    assert slim[1].a.weight.shape[0] == 4
    options = {"values": "float32"} if format == "c" else {}
    wide, narrow = (
        export(
            one, tmp_path / f"net{len(one[1].a.weight)}", format, example_input=inputs, calibration=inputs, **options
        )
        for number, one in enumerate((model, slim))
    )
    close = 1e-5 if format == "c" else 0.05 * float(model(inputs).abs().max())
    assert (narrow.run(inputs) - model(inputs)).abs().max() < close
    assert narrow.flash <= wide.flash


class Answers(nn.Module):
    """Returns classes between two tensors of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        scores = self.b(hidden)
        return {"scores": scores, "class": scores.argmax(1), "size": hidden.sum(1)}


def test_whole_numbers_among_the_outputs_are_not_compared_with_others(tmp_path):
    model = known(Answers()).double()
    exported = export(model, tmp_path / "net.onnx", "onnx", example_input=numbers(3, 6).double())
    assert exported.values == "float64"
    given = numbers(4, 6, seed=2).double()
    expected = model(given)
    for one, other in zip(exported.run.outputs((given,)), expected.values(), strict=True):
        assert torch.allclose(one, other)


class Ruling(Answers):
    """Gives minus infinity to a class."""

    def forward(self, x):
        answers = super().forward(x)
        return answers | {"scores": answers["scores"].masked_fill(torch.arange(5) == 1, -torch.inf)}


def test_infinite_outputs_are_compared_and_the_first_of_several_is_scored(tmp_path):
    model, inputs = known(Ruling()).float(), numbers(8, 6).float()
    judging = (inputs, model(inputs)["class"])
    exported = export(model, tmp_path / "net.onnx", "onnx", example_input=inputs[:3], validation=judging, removal=False)
    given = numbers(4, 6, seed=2).float()
    assert torch.allclose(exported.run(given), model(given)["scores"])
    first = (model(inputs)["scores"].argmax(1) == judging[1]).double().mean()
    assert exported.scores.network == exported.scores.device == first
