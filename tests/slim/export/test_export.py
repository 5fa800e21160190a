"""`export` writes files and says what they take, or refuses before it writes."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette import export
from lightning_roulette.slim.export.c.arm import COMPILER, compiled
from lightning_roulette.slim.export.reference import run
from lightning_roulette.slim.export.trace import trace
from tests.support.devices import inputs, network


def exported(folder, name="residual", kept=0.1, **given):
    given = {"example_input": inputs(name), "calibration": inputs(name, 64, 3), **given}
    return export(network(name, kept), folder / "network.c", "c", **given)


def test_files_sizes_and_layers_are_reported(tmp_path):
    found = exported(tmp_path)
    assert found.files == (tmp_path / "network.c", tmp_path / "network.h")
    assert sorted(tmp_path.iterdir()) == sorted(found.files)
    assert found.flash < found.dense_flash
    assert found.dense_flash - found.flash == sum(one.dense - one.stored for one in found.layers)
    weights = dict(network("residual", 0.1).named_parameters())
    for one in found.layers:
        assert one.shape == tuple(weights[one.name].shape)
        assert one.survivors <= int((weights[one.name] != 0).sum())
        assert one.dense == weights[one.name].numel()
    text = str(found)
    assert "blocks.1.shortcut.0.weight" in text
    assert f"Flash: {found.flash:,} bytes of constants" in text
    assert f"Memory: {found.ram:,} bytes" in text


def test_memory_counts_values_sums_input_and_output(tmp_path):
    found = exported(tmp_path, "lenet_5", 0.4)
    arena = 20 * 24 * 24 + 20 * 12 * 12
    assert found.ram == arena + 4 * 24 * 24 + 784 + 10
    assert exported(tmp_path, "lenet_5", 0.4, values="float32").ram == 4 * (arena + 784 + 10)


def test_constants_are_those_of_the_tables(tmp_path):
    found = exported(tmp_path, "perceptron", kept=1.0)
    weights, outputs = 30 * 40 + 40 * 25 + 25, 40 + 25 + 1
    assert found.flash == found.dense_flash == weights + outputs * (4 + 4 + 1) + 3 * 4 * 13


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} compiles for Cortex-M, and is not installed")
def test_what_a_cortex_takes_is_the_constants_and_little_code(tmp_path):
    found = exported(tmp_path, "lenet_300_100", 1 / 72)
    taken = compiled(found.files[0])
    assert 0 < taken.flash - found.flash < 1500
    assert taken.memory == found.ram - 784 - 10
    assert any("Cortex-M4" in one for one in found.notes)


def test_validation_scores_the_network_and_the_device(tmp_path):
    x = inputs("residual", 40, 5)
    y = network("residual", 0.1).eval()(x).argmax(1)
    batches = DataLoader(TensorDataset(x, y), batch_size=16)
    for validation in ((x, y), batches):
        found = exported(tmp_path, validation=validation)
        assert found.scores.network == 1
        assert 0.8 < found.scores.device <= 1
        assert "network 1, device" in str(found)
    assert exported(tmp_path, validation=batches, score=lambda outputs, _: float(len(outputs))).scores.device == 40
    with pytest.raises(ValueError, match="accuracy does not compare"):
        exported(tmp_path, validation=(x, y.float()))


def test_calibration_may_be_a_tensor_or_a_loader(tmp_path):
    x = inputs("residual", 40, 5)
    texts = []
    for calibration in (x, DataLoader(TensorDataset(x, torch.zeros(40)), 16), [x[:30], x[30:]]):
        texts.append(exported(tmp_path, calibration=calibration).files[0].read_text())
    assert len(set(texts)) == 1


def test_what_the_device_computes_can_be_run(tmp_path):
    found = exported(tmp_path, values="float32", calibration=None)
    x = inputs("residual", 7, 9)
    program = trace(network("residual", 0.1), x)
    assert torch.equal(found.run(x), run(program, x))


def test_outputs_that_pruning_left_idle_are_removed(tmp_path):
    module = network("perceptron")
    module[0].weight.data[:15] = 0
    module[2].weight.data[:, 10:22] = 0
    given = {"example_input": inputs("perceptron"), "calibration": inputs("perceptron", 64, 3)}
    found = export(module, tmp_path / "network.c", "c", **given)
    assert [one.shape for one in found.layers] == [(18, 30), (25, 18), (1, 25)]
    assert "Removed, as pruning left them constant or unused: 22 of 40 outputs of 0.weight." in str(found)
    x = inputs("perceptron", 50, 4)
    assert (found.run(x) - module(x)).abs().max() < 0.1


def test_batches_of_validation_are_read_once(tmp_path):
    x = inputs("residual", 40, 5)
    with torch.no_grad():
        y = network("residual", 0.1).eval()(x).argmax(1)
    found = exported(tmp_path, validation=zip(x.split(16), y.split(16), strict=True))
    assert found.scores.network == 1


def test_a_score_is_given_outputs_of_the_network(tmp_path):
    x = inputs("sequence", 20, 5)
    with torch.no_grad():
        y = network("sequence", 0.1).eval()(x)
    given = {"validation": (x, y), "score": lambda outputs, targets: float((outputs - targets).abs().max())}
    found = exported(tmp_path, "sequence", **given)
    assert found.scores.network < 1e-5
    assert found.scores.device < 0.1


@pytest.mark.parametrize(
    ("validation", "error"),
    [
        ([], "validation has no batches"),
        ([torch.ones(2, 3, 12, 12)], "pairs of tensors: inputs and targets"),
        ([{"x": 1}], "batch of type dict"),
        ((torch.ones(2, 3, 12, 13), torch.ones(2)), "must be float32 of the shape"),
        ((torch.ones(2, 3, 12, 12).double(), torch.ones(2)), "must be float32 of the shape"),
        ((torch.ones(2, 3, 12, 12), torch.ones(3)), "with as many targets"),
    ],
)
def test_wrong_validation_data_is_named(tmp_path, validation, error):
    with pytest.raises((TypeError, ValueError), match=error):
        exported(tmp_path, validation=validation)


def test_a_final_function_is_named(tmp_path):
    found = exported(tmp_path, "sequence")
    assert found.final == "sigmoid"
    assert "The sigmoid at the end of the network is left out" in str(found)
    assert "sigmoid at the end of the network is not computed" in found.files[1].read_text()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"calibration": None}, "calibration is None, but values='int8' needs"),
        ({"calibration": torch.ones(3, 3, 12, 13)}, r"calibration has .* but must be float32 of the shape"),
        ({"calibration": []}, "at least one row"),
        ({"calibration": [{"x": 1}]}, "batch of type dict"),
        ({"calibration": [torch.ones(2, 3, 12, 12), torch.ones(2, 3, 12, 13)]}, "but must be float32 of the shape"),
        ({"calibration": [torch.tensor(1.0)]}, "but must be float32 of the shape"),
        ({"values": "int4"}, "values is 'int4', but must be one of 'int8', 'float32'"),
        ({"max_ram": 3}, "max_ram is no option of format='c', which has values"),
        ({"example_input": torch.ones(2, 4)}, "cannot make a graph"),
    ],
)
def test_nothing_is_written_where_an_argument_is_wrong(given, error, tmp_path):
    with pytest.raises((TypeError, ValueError), match=error):
        exported(tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["my-network.c", "2nets", "switch.c", "über.c"])
def test_the_name_of_the_file_is_a_name_in_c(name, tmp_path):
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must be a name in C"):
        export(module, tmp_path / name, "c", example_input=torch.ones(1, 2), calibration=torch.ones(1, 2))


@pytest.mark.parametrize("name", ["clamp.c", "int8_t.c", "finished.c", "values_0.c", "sums.c", "stdint.c"])
def test_a_name_that_the_source_needs_is_refused(name, tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    x = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="path is "):
        export(module, tmp_path / name, "c", example_input=x, calibration=x)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    found = exported(tmp_path, "perceptron")
    before = [one.read_text() for one in found.files]
    write = Path.write_text

    def full(path, text):
        if ".h" in path.name:
            raise OSError("no space left")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        exported(tmp_path, "perceptron", kept=1.0)
    assert [one.read_text() for one in found.files] == before
    assert sorted(tmp_path.iterdir()) == sorted(found.files)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format is 'keras', but must be one of"):
        export(nn.Linear(2, 2), tmp_path / "net", "keras", example_input=torch.ones(1, 2))
