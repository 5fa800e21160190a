"""`export(..., format="tflm")`: what is written, what it takes, and what the runtime computes."""

import re
import sys

import numpy as np
import pytest
import torch

from lightning_roulette.slim.export.export import export
from lightning_roulette.slim.export.integer_reference import run_as_floats
from lightning_roulette.slim.export.quantised import quantise
from lightning_roulette.slim.export.tflm.extra import runtime
from lightning_roulette.slim.export.trace import trace
from tests.slim.export.tflm.running import loads
from tests.support import devices

PARAMETERS = ("scales", "zero_points")


def load_file(path):
    return runtime().Interpreter.from_bytes(path.read_bytes(), arena_size=1 << 20)


def test_a_missing_extra_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    with pytest.raises(ImportError, match=r"pip install --pre 'lightning-roulette\[tflm\]'"):
        exported(tmp_path)
    assert list(tmp_path.iterdir()) == []


def network(name, kept):
    """A network in which each unit of LeNet-300-100 keeps a weight to the next layer, so that none is idle."""
    module = devices.network(name, kept)
    if name == "lenet_300_100":
        for layer in (module[3], module[5]):
            layer.weight.data[torch.arange(layer.in_features) % layer.out_features, range(layer.in_features)] = 0.1
    return module


def exported(folder, name="lenet_300_100", kept=0.038, **options):
    inputs = devices.inputs(name, 40)
    return export(
        network(name, kept),
        folder / "net.tflite",
        "tflm",
        example_input=inputs[:1],
        **{"calibration": inputs} | options,
    )


class TestWithTheRuntime:
    @pytest.fixture(autouse=True)
    def _needs_the_runtime(self):
        pytest.importorskip("tflite_micro", reason="needs the extra `tflm`")

    def test_a_network_without_96_percent_of_its_weights_takes_at_most_52_kilobytes(self, tmp_path):
        found = exported(tmp_path)
        assert sum(one.survivors for one in found.layers) < 0.04 * 266_200
        assert found.files[0].stat().st_size == found.flash <= 52_000
        assert 266_200 < found.dense_flash < 275_000
        assert [one.form for one in found.layers] == ["bitmap", "bitmap", "bitmap"]
        assert [one.shape for one in found.layers] == [(300, 784), (100, 300), (10, 100)]
        first = found.layers[0]
        assert first.stored == 300 * 784 // 8 + first.survivors + 16
        assert found.flash - sum(one.stored for one in found.layers) < 410 * 8 + 2_500

    def test_the_file_has_a_scale_for_each_output_and_aligned_data(self, tmp_path):
        path = exported(tmp_path).files[0]
        schema = runtime().schema_fb
        model = schema.Model.GetRootAsModel(path.read_bytes(), 0)
        graph = schema.ModelT.InitFromObj(model).subgraphs[0]
        weight = next(one for one in graph.tensors if one.name == b"1.weight:decoded")
        assert len(weight.quantization.scale) == 300
        assert len(set(weight.quantization.scale.tolist())) > 250
        file = np.frombuffer(path.read_bytes(), np.uint8)
        starts = [model.Buffers(one).DataAsNumpy() for one in range(1, model.BuffersLength())]
        base = np.frombuffer(model._tab.Bytes, np.uint8).ctypes.data
        assert len(file) == len(model._tab.Bytes)
        assert {(one.ctypes.data - base) % 16 for one in starts} == {0}

    @pytest.mark.parametrize("name", ["lenet_300_100", "residual", "sequence"])
    def test_what_runs_is_the_file_and_gives_the_outputs_of_the_reference(self, tmp_path, name):
        found = exported(tmp_path, name, kept=0.3)
        inputs = devices.inputs(name, 20, seed=3)
        integers = quantise(trace(network(name, 0.3), inputs[:1]), devices.inputs(name, 40))
        assert torch.equal(found.run(inputs), run_as_floats(integers, inputs))
        assert loads(found.files[0], found.ram)

    def test_the_score_on_validation_data_is_that_of_the_runtime(self, tmp_path):
        inputs = devices.inputs("residual", 60, seed=5)
        with torch.no_grad():
            targets = network("residual", 0.5).eval()(inputs).argmax(1)
        found = exported(tmp_path, "residual", 0.5, validation=(inputs, targets))
        assert found.scores.network == 1
        assert found.scores.device == pytest.approx(float((found.run(inputs).argmax(1) == targets).double().mean()))
        assert found.scores.device > 0.8

    def test_a_limit_of_memory_is_kept_and_what_stays_plain_is_said(self, tmp_path):
        free = exported(tmp_path)
        assert free.ram > 235_200
        assert re.search(r"the arena has [\d,]+ bytes, and an inference takes .* ms .*\d\.\d times as long", str(free))
        tight = exported(tmp_path, max_ram=60_000)
        assert tight.ram <= 60_000
        assert tight.layers[0].form == "bitmap in 5 parts"
        assert torch.equal(free.run(devices.inputs("lenet_300_100")), tight.run(devices.inputs("lenet_300_100")))
        tighter = exported(tmp_path, max_ram=20_000)
        assert tighter.layers[0].form == "dense"
        assert "Plain because of max_ram: 1.weight. format='c' decodes no weights" in str(tighter)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"calibration": None}, "calibration is None, but format='tflm' needs some hundred inputs"),
            ({"max_ram": 0}, "max_ram is 0, but must be a number of bytes"),
            ({"max_ram": 1.5}, "max_ram is 1.5, but must be a number of bytes"),
            ({"max_ram": 3000}, "max_ram=3000 is too little: TensorFlow Lite Micro takes"),
        ],
    )
    def test_what_is_not_allowed_is_said_before_anything_is_written(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            exported(tmp_path, **options)
        assert list(tmp_path.iterdir()) == []

    def test_the_scales_of_input_and_output_are_said(self, tmp_path):
        found = exported(tmp_path)
        details = load_file(found.files[0])
        (scale,), (zero,) = (details.get_input_details(0)["quantization_parameters"][key] for key in PARAMETERS)
        assert zero > 0
        assert f"The input is int8: round(x / {scale:.9g}) + {zero}, images with channels last." in str(found)
        (scale,), (zero,) = (details.get_output_details(0)["quantization_parameters"][key] for key in PARAMETERS)
        assert f"The output is {scale:.9g} * (y {'-' if zero > 0 else '+'} {abs(zero)})." in str(found)

    def test_a_network_that_is_not_pruned_is_not_encoded(self, tmp_path):
        found = exported(tmp_path, "residual", kept=1.0)
        assert found.flash == found.dense_flash
        assert {one.form for one in found.layers} == {"dense"}
