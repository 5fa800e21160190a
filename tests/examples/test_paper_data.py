"""The data and the networks of the paper's table: what is read, how it is split, and how it is scored."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
import data
import networks

LENGTHS = {"train": 60, "test": 20}


def write(folder: Path, file: str, *shape: int, spread: bool = False) -> dict[str, np.ndarray]:
    """A small file: scores tell the first input, and the last column of a table is constant."""
    chance, arrays = np.random.default_rng(0), {}
    for part, length in LENGTHS.items():
        if len(shape) == 1:
            x = chance.normal(3, 2, (length, *shape)).astype(np.float32)
            x[:, -1] = 0.1
        else:
            x = chance.integers(256, size=(length, *shape), dtype=np.uint8)
        scores = (1 + x.reshape(length, -1)[:, 0] / 9).astype(np.float32)
        classes = (np.arange(length) % 10).astype(np.uint8)
        arrays |= {f"x_{part}": x, f"y_{part}": classes if file in ("mnist.npz", "cifar10.npz") else scores}
        if spread:
            arrays[f"sd_{part}"] = np.full(length, 0.5, np.float32)
    np.savez(folder / file, **arrays)
    return arrays


@pytest.fixture
def folder(tmp_path):
    """One file of each kind."""
    write(tmp_path, "mnist.npz", 28, 28)
    write(tmp_path, "cifar10.npz", 32, 32, 3)
    write(tmp_path, "biq2021_photos.npz", 32, 32, 3)
    write(tmp_path, "koniqpp.npz", 6, spread=True)
    write(tmp_path, "tid2013.npz", 54, spread=True)
    return tmp_path


INPUTS = {
    "mnist": (1, 28, 28),
    "mnist-lenet-5": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar10-resnet-20": (3, 32, 32),
    "biq2021-photos": (3, 32, 32),
    "koniqpp": (6,),
    "tid2013": (54,),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_fifth_of_the_training_rows_chooses_and_the_test_rows_judge(folder, name):
    task = data.load(name, folder)
    assert task.shape == INPUTS[name]
    assert [len(part) for part in (task.train, task.val, task.judge)] == [48, 12, 20]
    assert all(len(part.x) == len(part.y) for part in (task.train, task.val, task.judge))
    with torch.no_grad():
        outputs = networks.build(task).eval()(task.val.x)
    assert outputs.shape == (12, 1 if task.opinion else 10)
    assert networks.losses(outputs, task, task.val.y).shape == (12,)


def test_parts_share_no_row_and_miss_none(folder):
    with np.load(folder / "koniqpp.npz") as arrays:
        y = torch.from_numpy(arrays["y_train"])
    for held_out in (False, True):
        task = data.load("koniqpp", folder, held_out)
        dealt = torch.cat([part.y for part in (task.train, task.val, *[task.judge] * held_out)])
        assert torch.equal(dealt.sort().values, y.sort().values)
        assert not torch.equal(dealt, y)


def test_a_target_stays_with_its_input(folder):
    task = data.load("koniqpp", folder)
    for part in (task.train, task.val, task.judge):
        line = torch.corrcoef(torch.stack([part.x[:, 0], part.y]))
        assert line[0, 1] == pytest.approx(1, abs=1e-5)


def test_the_same_rows_choose_whoever_judges(folder):
    usual, held_out = (data.load("koniqpp", folder, choice) for choice in (False, True))
    assert torch.equal(usual.val.y, held_out.val.y)
    assert [len(part) for part in (held_out.train, held_out.val, held_out.judge)] == [36, 12, 12]
    assert held_out.held_out


@pytest.mark.parametrize("name", ["mnist", "koniqpp"])
def test_held_out_leaves_the_test_arrays_unread(tmp_path, name):
    file = data.SOURCES[name].file
    arrays = write(tmp_path, file, *((28, 28) if name == "mnist" else (6,)), spread=name != "mnist")
    unreadable = np.array([None], dtype=object)  # np.load refuses it when asked for it, not before
    np.savez(tmp_path / file, **{key: unreadable if key.endswith("_test") else arrays[key] for key in arrays})
    assert len(data.load(name, tmp_path, held_out=True).judge) == 12
    with pytest.raises(ValueError, match="allow_pickle"):
        data.load(name, tmp_path)


def test_inputs_are_normalised_by_training_rows(folder):
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


def test_the_error_of_a_mean_is_no_spread(folder):
    task = data.load("tid2013", folder)
    assert task.val.spread is None
    assert networks.within_spread(task.val.y, task, task.val) is None


def test_quick_keeps_the_first_rows(folder, monkeypatch):
    monkeypatch.setattr(data, "QUICK", 7)
    task, whole = data.load("koniqpp", folder, quick=True), data.load("koniqpp", folder)
    assert [len(part) for part in (task.train, task.val, task.judge)] == [7, 7, 7]
    assert torch.equal(task.val.y, whole.val.y[:7])


def test_a_missing_file_is_named_with_its_origin(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kadid10k.npz is not in .*Keras.*KADID-10k"):
        data.load("kadid10k", tmp_path)


def test_a_seed_gives_a_network_and_the_global_seed_is_left_alone(folder, tmp_path):
    task = data.load("koniqpp", folder, quick=True)
    before = torch.get_rng_state()
    first = networks.trained(task, 0, None, quick=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (networks.trained(task, seed, tmp_path / "kept", quick=True) for seed in (0, 1))
    outputs = [networks.predict(net, task.val.x) for net in (first, again, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not first.training


def test_a_network_is_trained_once(folder, tmp_path, monkeypatch):
    task, held_out = (data.load("koniqpp", folder, choice, quick=True) for choice in (False, True))
    first = networks.trained(task, 0, tmp_path / "kept", quick=True)
    networks.trained(held_out, 0, tmp_path / "kept", quick=True)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "koniqpp-held-out-quick-0.pt",
        "koniqpp-quick-0.pt",
    ]
    monkeypatch.setattr(networks, "_train", None)
    kept = networks.trained(task, 0, tmp_path / "kept", quick=True)
    assert torch.equal(networks.predict(kept, task.val.x), networks.predict(first, task.val.x))
    assert not kept.training


def test_training_learns(folder):
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


def brute_ranks(values: list[float]) -> list[float]:
    """One plus how many are less, plus half of the others that are equal."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def test_spearman_with_ties_is_pearson_of_averaged_ranks():
    chance = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(5, (2, 12), generator=chance).float()
        ranks = torch.tensor([brute_ranks(a.tolist()), brute_ranks(b.tolist())], dtype=torch.float64)
        assert networks.spearman(a[:, None], b) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-12)


def test_spearman_of_what_has_no_order():
    a = torch.arange(4.0)
    assert networks.spearman(a, -a) == pytest.approx(-1)
    assert networks.spearman(torch.ones(4), a) == 0
    assert math.isnan(networks.spearman(torch.tensor([0.0, math.nan, 1, 2]), a))


def test_score_of_classes_is_accuracy():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert networks.score(outputs, torch.tensor([1, 0, 0]), opinion=False) == pytest.approx(2 / 3)
    assert networks.score(outputs[:, 0], torch.tensor([5.0, 6.0, 4.0]), opinion=True) == pytest.approx(1)
