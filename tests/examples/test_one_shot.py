"""The published one-shot tables: networks of checkpoints, sparsities that are met exactly, the table."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from lightning_roulette import sparsity
from tests.support.paper import checkpoints, one_shot, write
from tests.support.results import equal

FEW = (0.2, 0.4)


@pytest.fixture
def mlpnet(tmp_path, monkeypatch):
    """A small file of images, and an untrained checkpoint of MLPNet; the table has two sparsities."""
    write(tmp_path, "mnist.npz", 28, 28)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(checkpoints.MLPNet().state_dict(), tmp_path / "mlpnet.pt")
    few = replace(checkpoints.NETWORKS["mlpnet"], sparsities=FEW, reported={0.4: 12.25})
    monkeypatch.setitem(checkpoints.NETWORKS, "mlpnet", few)
    return tmp_path


def case_of(folder, seed=0):
    few = checkpoints.NETWORKS["mlpnet"]
    return one_shot.Case(few, folder / "mlpnet.pt", folder / "mnist.npz", seed, inputs=20)


@pytest.mark.parametrize("way", one_shot.WAYS)
def test_every_way_meets_the_sparsities_exactly(mlpnet, way):
    case = case_of(mlpnet)
    found = dict(one_shot.WAYS[way](case))
    assert tuple(found) == FEW
    for wanted, values in found.items():
        kept = {name: values[name] for name in case.weights}
        assert sparsity(kept) == pytest.approx(wanted, abs=0.5 / 32360)
        assert 0 <= case.accuracy(values) <= 100


def test_the_table_has_means_spreads_and_published_numbers_and_no_run_is_repeated(mlpnet, monkeypatch, capsys):
    files = ["--checkpoint", "mlpnet.pt", "--network", "mlpnet", "--data", "mnist.npz", "--results", "runs.jsonl"]
    monkeypatch.chdir(mlpnet)
    monkeypatch.setattr(sys, "argv", ["", *files, "--inputs", "20", "--seeds", "2", "--ways", "magnitude", "chosen"])
    one_shot.main()
    before = (mlpnet / "runs.jsonl").read_text()
    assert len(before.splitlines()) == 4
    one_shot.main()
    assert (mlpnet / "runs.jsonl").read_text() == before
    table = (mlpnet / "runs.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "| | 20 % | 40 % | seeds | seconds |" in table
    assert table.count("±") == 4
    assert "| CHITA++ (several stages), reported |  | 12.25 | | |" in table


def test_a_seed_chooses_the_calibration_images_and_equal_seeds_give_equal_networks(mlpnet):
    first, again, other = (dict(one_shot.WAYS["chosen"](case_of(mlpnet, seed)))[0.4] for seed in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, other)


def test_images_of_resnet_20_are_shifted_over_a_black_border_and_mirrored():
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).float().add(1).expand(2, 3, 32, 32).repeat(50, 1, 1, 1)
    found = checkpoints.shifted(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    places = [
        (down, right, mirrored)
        for one, whole in zip(found, padded, strict=True)
        for down in range(9)
        for right in range(9)
        for mirrored in (False, True)
        if torch.equal(one.flip(2) if mirrored else one, whole[:, down : down + 32, right : right + 32])
    ]
    assert len(places) == 100
    assert {down for down, _, _ in places} == {right for _, right, _ in places} == set(range(9))
    assert 30 < sum(mirrored for *_, mirrored in places) < 70


def test_resnet_20_has_the_weights_that_the_published_tables_prune():
    published = checkpoints.NETWORKS["resnet20"]
    net = published.build().eval()
    pruned = one_shot.prunable_parameters(net, exclude=published.exclude)
    assert sum(weight.numel() for weight in pruned.values()) == 268_336
    bytes_ = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert net(published.images(bytes_)).shape == (2, 10)
    assert torch.allclose(
        published.images(bytes_)[0, :, 0, 0], -torch.tensor([0.4914 / 0.2023, 0.4822 / 0.1994, 0.4465 / 0.2010])
    )
