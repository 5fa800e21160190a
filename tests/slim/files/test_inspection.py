"""`inspect` and `save_weights`: files of every kind, and what they hold."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_roulette import Codebook, inspect, load_compressed, save_compressed, save_weights


def network() -> nn.Module:
    """A small network with pruned weights."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 10))
    with torch.no_grad():
        net[3].weight.view(-1)[::2] = 0
    return net


def test_a_compressed_file_is_described_to_the_byte(tmp_path):
    path = tmp_path / "weights.lrw"
    for values in ("float32", "int8", Codebook(3)):
        size = save_compressed(network(), path, values)
        found = inspect(path)
        assert (found.bytes, found.path) == (size, str(path))
        layer = next(one for one in found.tensors if one.name == "3.weight")
        assert (layer.shape, layer.dtype, layer.weights, layer.survivors) == ((10, 128), "float32", 1280, 640)
        header = int.from_bytes(path.read_bytes()[8:12], "little")
        assert 0 <= size - header - 20 - sum(one.bytes for one in found.tensors) <= 12
    assert "compressed file, values Codebook(bits=3)" in str(found)


def test_numbers_of_types_that_torch_does_not_count_are_counted(tmp_path):
    numbers = torch.tensor([0.0, 1.0, -0.0, torch.nan])
    state = {"w": numbers.to(torch.float8_e4m3fn), "indices": torch.arange(3).to(torch.uint16)}
    save_weights(state, tmp_path / "weights.pt")
    eight, sixteen = inspect(tmp_path / "weights.pt").tensors
    assert (eight.dtype, eight.weights, eight.survivors, eight.bytes) == ("float8_e4m3fn", 4, 2, 4)
    assert (sixteen.dtype, sixteen.weights, sixteen.survivors, sixteen.bytes) == ("uint16", 3, 2, 6)


def test_tensors_that_are_not_dense_are_refused_by_name(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="w has the layout torch.sparse_coo, but must be a dense tensor"):
        inspect(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.ckpt", "weights.safetensors"])
def test_weights_alone_are_read_and_described(tmp_path, name):
    net, path = network(), tmp_path / name
    size = save_weights(net, path)
    found = {one.name: one for one in inspect(path).tensors}
    assert size == path.stat().st_size > sum(one.bytes for one in found.values())
    assert set(found) == set(net.state_dict())
    assert (found["3.weight"].survivors, found["3.weight"].bytes) == (640, 5120)
    assert (found["1.num_batches_tracked"].dtype, found["1.num_batches_tracked"].shape) == ("int64", ())


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_tied_weights_are_complete(tmp_path, name):
    weight = torch.ones(4, 4)
    save_weights({"one": weight, "other": weight, "turned": weight.T}, tmp_path / name)
    for _ in range(5):  # safetensors returns names in another order each time
        assert [one.name for one in inspect(tmp_path / name).tensors] == ["one", "other", "turned"]


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_part_of_a_larger_tensor_is_written_alone(tmp_path, name):
    whole = torch.arange(100_000.0).view(1000, 100)
    assert save_weights({"part": whole[10:20].T}, tmp_path / name) < 10_000
    (found,) = inspect(tmp_path / name).tensors
    assert (found.shape, found.survivors) == ((100, 10), 1000)


def test_a_checkpoint_is_described_by_its_state_dict(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": network().state_dict(), "epoch": 3, "optimizer_states": [{"lr": 0.1}]}, path)
    assert inspect(path).tensors[-1].name == "3.bias"


def test_the_table_has_a_line_for_each_layer(tmp_path):
    save_compressed(network(), tmp_path / "weights.lrw")
    lines = str(inspect(tmp_path / "weights.lrw")).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "tensor", "0.weight", "3.weight", "7 vectors and numbers", "header and all else", "file",
    ]  # fmt: skip
    assert lines[4].split()[1:5] == ["10x128", "1,280", "640", "50.00%"]
    assert lines[-1].split()[-1] == f"{(tmp_path / 'weights.lrw').stat().st_size:,}"


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path is .*weights.onnx', but must end with .safetensors, .pt"):
        save_weights(network(), tmp_path / "weights.onnx")


def test_without_safetensors_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (save_weights, lambda _, path: inspect(path)):
        (tmp_path / "other.safetensors").write_bytes(b"")
        with pytest.raises(ImportError, match="needs the package safetensors. Run: pip install safetensors"):
            call(network(), tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights.lrw"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"path is .*, but "):
        inspect(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "missing")


def test_files_with_objects_are_refused_and_run_nothing(tmp_path):
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="one that torch.load reads with weights_only=True"):
        inspect(tmp_path / "whole.pt")


def test_the_command_prints_the_table_or_the_error(tmp_path, capsys):
    from lightning_roulette.trainer.command.main import main

    save_compressed(network(), tmp_path / "weights.lrw")
    main(["inspect", str(tmp_path / "weights.lrw")])
    assert capsys.readouterr().out.strip() == str(inspect(tmp_path / "weights.lrw"))
    with pytest.raises(SystemExit, match="error: .*No such file"):
        main(["inspect", str(tmp_path / "missing")])
    assert load_compressed(tmp_path / "weights.lrw")
