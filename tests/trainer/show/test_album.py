"""Pictures, histograms and text in TensorBoard, read back from its files."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.util.tensor_util import make_ndarray

from lightning_roulette import Candidate, Level, Mask, RouletteWheelPruning, SearchReport, Tree, Wheel
from lightning_roulette.trainer.choices import Choices
from lightning_roulette.trainer.show import album, pictures
from lightning_roulette.trainer.show.show import Show
from tests.support import fits
from tests.support.events import events, plugin_of
from tests.support.isolated import judged_by
from tests.support.missing import without

pruner = partial(fits.pruner, tolerance=0.3)


def entries(folder: str, plugin: str) -> dict[str, dict[int, np.ndarray]]:
    """What is in a tab of TensorBoard, by tag and step."""
    read = events(folder)
    tags = [tag for tag in read.Tags()["tensors"] if plugin_of(read, tag) == plugin]
    return {tag: {one.step: make_ndarray(one.tensor_proto) for one in read.Tensors(tag)} for tag in tags}


def pixels(entry: np.ndarray) -> np.ndarray:
    """A picture as TensorBoard stores it: width, height, PNG."""
    width, height, png = entry
    found = np.asarray(Image.open(io.BytesIO(png)))
    assert found.shape[:2] == (int(height), int(width))
    return found


@pytest.mark.parametrize("at_epoch", [None, [1, 2]])
def test_histograms_are_of_all_weights_before_and_of_the_survivors_after(at_epoch, fit, tmp_path):
    pruning, logger = pruner(at_epoch=at_epoch), TensorBoardLogger(tmp_path)
    module = fit(pruning, logger=logger, max_epochs=3)
    level = pruning.report.winner.level
    found = entries(logger.log_dir, "histograms")
    assert found.keys() == {"roulette-weights/net.0", "roulette-weights/net.2"}
    for name in pruning.mask:
        buckets = found[f"roulette-weights/{name.removesuffix('.weight')}"]
        assert buckets.keys() == {0, level}
        weights, kept = module.get_parameter(name).detach(), pruning.mask[name]
        assert buckets[0][:, 2].sum() == weights.numel()
        assert buckets[level][:, 2].sum() == kept.sum()
        ends = (buckets[level][:, 0].min(), buckets[level][:, 1].max())
        assert ends == pytest.approx((weights[kept].min().item(), weights[kept].max().item()), rel=1e-5)


def test_masks_are_black_where_weights_are_kept(fit, tmp_path):
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    found, level = entries(logger.log_dir, "images"), pruning.report.winner.level
    for name, kept in pruning.mask.items():
        drawn = pixels(found[f"roulette-mask/{name.removesuffix('.weight')}"][level])[..., 0]
        flat = kept if kept.shape[1] >= kept.shape[0] else kept.T
        times = drawn.shape[1] // flat.shape[1]
        assert drawn.shape == (times * flat.shape[0], times * flat.shape[1])
        assert ((drawn[::times, ::times] == 0) == flat.numpy()).all()


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 4, 5), (3, 2, 2, 2, 5)])
def test_kernels_stand_apart(shape):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    (drawn,) = pictures.masks(Mask({"conv.weight": kept})).values()
    height, width = math.prod(shape[2:-1]), shape[-1]
    rows, columns = 3 * (height + 1), 2 * (width + 1)
    small = drawn[0] if columns >= rows else drawn[0].T
    times = small.shape[0] // rows
    small = small[::times, ::times]
    assert small.shape == (rows, columns)
    for i in range(3):
        for j in range(2):
            corner = small[i * (height + 1) :, j * (width + 1) :]
            assert ((corner[:height, :width] == 0) == kept[i, j].reshape(height, width)).all()
            assert set(corner[height, : width + 1].tolist()) == set(corner[: height + 1, width].tolist()) == {160}


def test_only_small_layers_get_a_picture_of_their_mask():
    large = torch.ones(2**9, 2**9 + 1, dtype=torch.bool)
    mask = Mask({"large": large, **{f"small_{i}": torch.ones(2, 2, dtype=torch.bool) for i in range(10)}})
    assert list(pictures.masks(mask)) == [f"small_{i}" for i in range(8)]


def test_the_result_is_drawn_where_matplotlib_is_installed(fit, tmp_path):
    pytest.importorskip("matplotlib")
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    found = entries(logger.log_dir, "images")
    for name in ("scores", "densities"):
        drawn = pixels(found[f"roulette-image/{name}"][pruning.report.winner.level])
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10


def test_the_scores_are_also_drawn_over_multiply_adds_where_whole_units_leave(fit, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("torch_pruning", reason="needs the extra `units`")
    pruning, logger = pruner(wheel=Wheel(unit="neuron")), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    step = pruning.report.winner.level
    found = pixels(entries(logger.log_dir, "images")["roulette-image/scores_over_multiply_adds"][step])
    wanted = pictures.scores(pruning.report, "multiply_adds").permute(1, 2, 0).numpy()
    assert (found[..., :3] == wanted).all()


def test_a_search_of_single_weights_has_no_picture_over_multiply_adds(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(pruner(), logger=logger)
    images = {tag for tag in entries(logger.log_dir, "images") if tag.startswith("roulette-image")}
    assert "roulette-image/scores_over_multiply_adds" not in images


def test_without_matplotlib_a_line_names_the_extra_and_the_rest_is_there(fit, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lightning_roulette")
    without(monkeypatch, "matplotlib")
    pruning, logger = pruner(), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    (said,) = [one for one in caplog.messages if "pictures" in one]
    assert "pip install 'lightning-roulette[plot]'" in said
    assert {tag.split("/")[0] for tag in entries(logger.log_dir, "images")} == {"roulette-mask"}
    assert "roulette/report/text_summary" in entries(logger.log_dir, "text")


def test_matplotlib_keeps_the_users_settings_and_figures(fit, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    with pyplot.rc_context({"lines.linewidth": 7.0}):
        fit(pruner(), logger=TensorBoardLogger(tmp_path))
        assert pyplot.rcParams["lines.linewidth"] == 7.0
    assert pyplot.get_fignums() == before


def test_histograms_of_large_and_of_broken_weights(monkeypatch):
    monkeypatch.setattr(album, "MOST_VALUES", 10)
    weights = torch.arange(25.0).view(5, 5)
    assert album._values(weights, None).tolist() == list(range(0, 25, 3))
    weights[0, 0] = math.nan
    weights[0, 3] = math.inf
    assert album._values(weights, weights != 6).tolist() == [9, 12, 15, 18, 21, 24]


def test_a_network_that_stays_dense_has_no_masks(fit, tmp_path):
    pruning, logger = pruner(tolerance=0.0, tree=Tree(0.99, patience=1)), TensorBoardLogger(tmp_path)
    fit(pruning, logger=logger)
    assert pruning.report.winner is None
    assert not [tag for tag in entries(logger.log_dir, "images") if "mask" in tag]
    assert all(steps.keys() == {0} for steps in entries(logger.log_dir, "histograms").values())


LAYERS = {f"blocks.{i}.weight": (256, 256) for i in range(24)}


class Found:
    """What a search would return after so many levels of twenty candidates."""

    def __init__(self, levels: int, weights: dict[str, torch.Tensor]) -> None:
        self.dense = weights
        self.mask = Mask({name: one.abs() > 0.1 * levels for name, one in weights.items()})
        branch = tuple(Candidate(index, 0.0, 0.9 - index / 100, 0.0) for index in range(20))
        tried = [Level(n, 0.1, n / 40, 1, branch, 0, True, 0.001, 0.9, 0.001, held=True) for n in range(1, levels + 1)]
        self.report = SearchReport("val_acc", "max", 0.9, 0.1, 20, 0, 1, tuple(tried), folds=(8, 8), held_out_dense=0.9)


def test_thirty_levels_of_twenty_candidates_take_less_than_five_megabytes(make_trainer, tmp_path):
    chance = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=chance) for name, shape in LAYERS.items()}
    trainer = make_trainer(logger=TensorBoardLogger(tmp_path))
    with Show(trainer, judged_by("val_acc"), Choices.of(RouletteWheelPruning())) as show:
        show.on_dense(Found(0, weights), 1.0)
        for number in range(1, 31):
            show.on_level(None, found := Found(number, weights))
            show.on_confirmed(found.report.levels[-1], found)
        show.on_weights(30, Found(5, weights).mask, weights)
        show.on_end(replace(found.report, score=0.9, seconds=1.0))
    size = sum(path.stat().st_size for path in Path(tmp_path).rglob("events*"))
    assert 100_000 < size < 5_000_000
