"""What a user sees of a search in TensorBoard: a real server, and every tab in headless Chromium."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_roulette import Tree
from tests.support import fits
from tests.support.browser import Page, chromium, tensorboard
from tests.support.modules import QUIET, Blobs, train_loader, val_loader

LAYERS = ("net.0", "net.2")


@pytest.fixture(scope="module")
def driver():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pruning(driver, tmp_path_factory):
    """A search of a real fit."""
    folder = tmp_path_factory.mktemp("runs")
    found = fits.pruner(branches=3, tolerance=0.3, tree=Tree(0.3, max_levels=3))
    torch.manual_seed(0)
    options = {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 2, "logger": TensorBoardLogger(folder)}
    Trainer(**QUIET | options, callbacks=[found]).fit(Blobs(), train_loader(), val_loader())
    found.folder = folder
    return found


@pytest.fixture(scope="module")
def address(pruning):
    with tensorboard(pruning.folder) as found:
        yield found


@pytest.fixture
def page(driver, address):
    """A function that opens a tab."""
    return lambda tab: Page(driver, address, tab)


def shown_in_order(text: str, *parts: str) -> bool:
    places = [text.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def test_time_series_has_the_scores_in_the_first_group(page):
    text = page("timeseries").text("/held_out_floor", "/score", "roulette-branch", "val_acc")
    assert shown_in_order(text, "\nroulette5 cards", "/floor", "/held_out", "/score", "\nroulette-branch5 cards")


def test_scalars_stand_in_groups_and_say_what_they_show(page):
    text = page("scalars").text("roulette-density", "val_acc of the best candidate")
    assert shown_in_order(text, "\nroulette\n", "\nroulette-branch\n", "\nroulette-density\n", "\nroulette-result\n")
    assert "x-axis (step): level of the search. Level 0 is the dense network." in text


@pytest.mark.slow
def test_custom_scalars_draw_curves_together(page):
    titles = ("held-out score and floor", "sparsity", "density of each layer", "score and floor")
    opened = page("custom_scalars")
    text = opened.text(*titles, "Matches (2)", "Matches (1)")
    assert text.count("Matches (2)") == 3  # score and floor, held-out score and floor, two densities
    assert "Missing Tags" not in text


def test_images_show_the_result_and_the_masks(page):
    opened = page("images")
    opened.text(*(f"roulette-mask/{one}" for one in LAYERS), "Kept weights are black")
    assert all(width > 0 for width in opened.values("img", "one.naturalWidth", least=2))


@pytest.mark.slow
def test_images_show_the_scores_where_matplotlib_is_installed(page):
    pytest.importorskip("matplotlib")
    opened = page("images")
    opened.text("roulette-image/scores", "roulette-image/densities", "Every candidate is a dot")
    assert 616 in opened.values("img", "one.naturalWidth", least=4)


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["histograms", "distributions"])
def test_weights_have_histograms(page, tab):
    opened = page(tab)
    text = opened.text(*(f"roulette-weights/{one}" for one in LAYERS))
    assert text.count("the survivors at the step of the result") == 2


@pytest.mark.slow
def test_text_has_the_lines_and_a_table_whose_headings_do_not_break(page, pruning):
    opened = page("text")
    opened.text(*pruning.report.summary())
    heads = opened.values("th", "[one.innerText, one.clientHeight]", least=9)
    assert [name for name, _ in heads][:3] == ["level", "sparsity", "weights left"]
    assert len({height for _, height in heads}) == 1
    rows = opened.values("tr", "[one.children.length, one.clientHeight]", least=len(pruning.report.levels) + 1)
    heights = [height for columns, height in rows if columns == len(heads)]
    assert len(heights) == len(pruning.report.levels) + 1
    assert heights[0] <= max(heights[1:])


@pytest.mark.slow
def test_hparams_have_a_row_of_the_search(page, pruning):
    text = page("hparams").text("Trial ID", "roulette/branches", "roulette-result/sparsity", "version_0")
    assert f"{pruning.report.sparsity:.5g}" in text
    assert "roulette/tolerance" in text
