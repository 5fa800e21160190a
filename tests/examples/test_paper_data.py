"""The data and the networks of the paper's evaluation: reading, splitting, training and scoring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.paper import data, networks, write


@pytest.fixture
def folder(tmp_path):
    """A folder with one file of each kind."""
    shapes = {
        "mnist": (28, 28),
        "cifar10": (32, 32, 3),
        "biq2021_photos": (32, 32, 3),
        "koniqpp": (6,),
        "tid2013": (54,),
    }
    for name, shape in shapes.items():
        write(tmp_path, f"{name}.npz", *shape)
    return tmp_path


IMAGES = {"mnist": (1, 28, 28), "mnist-lenet-5": (1, 28, 28)} | dict.fromkeys(
    ("cifar10", "cifar10-resnet-20", "biq2021-photos"), (3, 32, 32)
)
INPUTS = IMAGES | {"koniqpp": (6,), "tid2013": (54,)}


@pytest.mark.parametrize("name", INPUTS)
def test_a_fifth_of_the_training_rows_is_validation_data_and_the_test_rows_judge(folder, name):
    task = data.load(name, folder)
    assert task.shape == INPUTS[name]
    assert [len(part) for part in (task.train, task.val, task.judge)] == [48, 12, 20]
    assert all(len(part.x) == len(part.y) for part in (task.train, task.val, task.judge))
    with torch.no_grad():
        outputs = networks.build(task).eval()(task.val.x)
    assert outputs.shape == (12, 1 if task.opinion else 10)
    assert networks.losses(outputs, task, task.val.y).shape == (12,)


def test_every_row_is_in_one_part_and_keeps_its_target(folder):
    with np.load(folder / "koniqpp.npz") as arrays:
        y = torch.from_numpy(arrays["y_train"])
    usual, held_out = (data.load("koniqpp", folder, choice) for choice in (False, True))
    assert held_out.held_out
    assert torch.equal(usual.val.y, held_out.val.y)
    assert [len(part) for part in (held_out.train, held_out.val, held_out.judge)] == [36, 12, 12]
    for task in (usual, held_out):
        dealt = torch.cat([part.y for part in (task.train, task.val, *[task.judge] * task.held_out)])
        assert torch.equal(dealt.sort().values, y.sort().values)
        assert not torch.equal(dealt, y)
        for part in (task.train, task.val, task.judge):
            line = torch.corrcoef(torch.stack([part.x[:, 0], part.y]))
            assert line[0, 1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["mnist", "koniqpp"])
def test_held_out_does_not_read_the_test_arrays(tmp_path, name):
    file = data.SOURCES[name].file
    arrays = write(tmp_path, file, *((28, 28) if name == "mnist" else (6,)))
    unreadable = np.array([None], dtype=object)  # np.load refuses it only when it is read
    np.savez(tmp_path / file, **{key: unreadable if key.endswith("_test") else arrays[key] for key in arrays})
    assert len(data.load(name, tmp_path, held_out=True).judge) == 12
    with pytest.raises(ValueError, match="allow_pickle"):
        data.load(name, tmp_path)


def test_inputs_are_normalised_by_the_training_rows(folder):
    table = data.load("koniqpp", folder)
    assert torch.allclose(table.train.x.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(table.train.x.std(0), torch.tensor([1.0] * 5 + [0.0]), atol=1e-5)
    assert not torch.allclose(table.val.x.mean(0)[:5], torch.zeros(5), atol=1e-2)
    colours = data.load("cifar10", folder).train.x
    assert torch.allclose(colours.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(colours.std((0, 2, 3)), torch.ones(3), atol=1e-5)
    assert colours.is_contiguous(memory_format=torch.channels_last)
    digits = data.load("mnist", folder).train.x
    assert 0 <= digits.min() < digits.max() <= 1


def test_scores_stay_in_their_units(folder):
    task = data.load("koniqpp", folder)
    assert task.standardised(task.train.y).mean() == pytest.approx(0, abs=1e-5)
    assert task.standardised(task.train.y).std() == pytest.approx(1, abs=1e-5)
    off = task.standardised(task.val.y + 0.4)[:, None]
    assert networks.rmse(off, task, task.val.y) == pytest.approx(0.4, abs=1e-5)
    assert networks.within_spread(off, task, task.val) == 1
    assert networks.within_spread(off + 0.2 / task.scale, task, task.val) == 0
    assert networks.losses(off, task, task.val.y).tolist() == pytest.approx([(0.4 / task.scale) ** 2] * 12, rel=1e-4)
    task = data.load("tid2013", folder)  # its file has the error of the mean score, which is no spread
    assert task.val.spread is None
    assert networks.within_spread(task.val.y, task, task.val) is None


def test_quick_keeps_the_first_rows(folder, monkeypatch):
    monkeypatch.setattr(data, "QUICK", 7)
    task, whole = data.load("koniqpp", folder, quick=True), data.load("koniqpp", folder)
    assert [len(part) for part in (task.train, task.val, task.judge)] == [7, 7, 7]
    assert torch.equal(task.val.y, whole.val.y[:7])


def test_the_error_about_a_missing_file_names_its_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kadid10k.npz is not in .*Keras.*KADID-10k"):
        data.load("kadid10k", tmp_path)


def test_a_seed_determines_the_network_which_is_trained_once(folder, tmp_path, monkeypatch):
    task, held_out = (data.load("koniqpp", folder, choice, quick=True) for choice in (False, True))
    before, kept = torch.get_rng_state(), tmp_path / "kept"
    first = networks.trained(task, 0, None, quick=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (networks.trained(task, seed, kept, quick=True) for seed in (0, 1))
    networks.trained(held_out, 0, kept, quick=True)
    names = {"koniqpp-held-out-quick-0.pt", "koniqpp-quick-0.pt", "koniqpp-quick-1.pt"}
    assert {path.name for path in kept.iterdir()} == names
    monkeypatch.setattr(networks, "_train", None)
    stored = networks.trained(task, 0, kept, quick=True)
    outputs = [networks.predict(net, task.val.x) for net in (first, again, stored, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])
    assert not any(net.training for net in (first, stored))


def test_training_reduces_the_loss(folder):
    task = data.load("koniqpp", folder)
    torch.manual_seed(0)
    raw = networks.predict(networks.build(task).eval(), task.train.x)
    learnt = networks.predict(networks.trained(task, 0, None), task.train.x)
    assert networks.losses(learnt, task, task.train.y).mean() < 0.5 * networks.losses(raw, task, task.train.y).mean()


def test_every_task_has_a_recipe():
    assert networks.RECIPES.keys() == data.SOURCES.keys()


def test_prediction_in_blocks_equals_one_block():
    net, x = nn.Linear(3, 1), torch.arange(6900.0).view(2300, 3) / 6900
    with torch.no_grad():
        assert torch.allclose(networks.predict(net, x), net(x))


def averaged_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1. Equal values share the mean of their ranks."""
    less, equal = ((values[:, None] > values).sum(1), (values[:, None] == values).sum(1))
    return (less + (equal + 1) / 2).double()


def test_spearman_with_ties_is_the_correlation_of_averaged_ranks():
    chance = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(5, (2, 12), generator=chance).float()
        expected = torch.corrcoef(torch.stack([averaged_ranks(a), averaged_ranks(b)]))[0, 1]
        assert networks.spearman(a[:, None], b) == pytest.approx(float(expected), abs=1e-12)


def test_spearman_of_reversed_constant_and_nan_values():
    a = torch.arange(4.0)
    assert networks.spearman(a, -a) == pytest.approx(-1)
    assert networks.spearman(torch.ones(4), a) == 0
    assert math.isnan(networks.spearman(torch.tensor([0.0, math.nan, 1, 2]), a))


def test_the_score_is_accuracy_for_classes_and_correlation_for_opinion():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert networks.score(outputs, torch.tensor([1, 0, 0]), opinion=False) == pytest.approx(2 / 3)
    assert networks.score(outputs[:, 0], torch.tensor([5.0, 6.0, 4.0]), opinion=True) == pytest.approx(1)
