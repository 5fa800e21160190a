"""`export(..., format="executorch")`: the file, and what ExecuTorch's runtime computes with it."""

import re
import sys
import zlib

import pytest
import torch

from lightning_roulette.slim.export.export import export
from tests.support import devices


def exported(folder, name, rows=8, **options):
    network, inputs = devices.network(name, 0.3).eval(), devices.inputs(name, rows)
    return export(network, folder / "net.pte", "executorch", example_input=inputs[:1], **options)


def test_a_missing_extra_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-roulette\[executorch\]'"):
        exported(tmp_path, "sequence")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [("int4", "values is 'int4', but must be .*"), ("int8", "calibration is None, but values='int8' needs")],
)
def test_what_is_not_allowed_is_said_before_anything_is_written(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, "sequence", values=values)
    assert list(tmp_path.iterdir()) == []


class TestWithTheRuntime:
    @pytest.fixture(autouse=True)
    def _needs_executorch(self):
        pytest.importorskip("executorch.exir", reason="needs the extra `executorch`; `make test` runs it on its own")

    def test_the_file_computes_what_the_network_computes(self, tmp_path):
        inputs = devices.inputs("depthwise", 6, seed=4)
        network = devices.network("depthwise", 0.3).eval()
        with torch.no_grad():
            wanted = network(inputs)
        found = exported(tmp_path, "depthwise", validation=(inputs, wanted.argmax(1)))
        torch.testing.assert_close(found.run(inputs).log_softmax(1), wanted, rtol=0, atol=1e-5)
        assert found.scores.device == found.scores.network == 1
        file = found.files[0].read_bytes()
        assert len(file) == found.flash
        assert f"the file has {len(zlib.compress(file, 9)):,} bytes" in str(found)
        assert re.search(r"One inference takes [\d.e-]+ ms", str(found))

    def test_integers_take_less_and_compute_nearly_the_same(self, tmp_path):
        inputs = devices.inputs("lenet_300_100", 8)
        network = devices.network("lenet_300_100", 0.3).eval()
        found = exported(tmp_path, "lenet_300_100", calibration=inputs, values="int8")
        assert found.flash < 0.3 * 4 * sum(weight.numel() for weight in network.parameters())
        with torch.no_grad():
            wanted = network(inputs)
        assert (found.run(inputs) - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert all(one.stored == one.shape[0] * one.shape[1] for one in found.layers)
