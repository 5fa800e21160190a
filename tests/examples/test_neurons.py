"""examples/neurons.py: its network has units, and its picture is a small file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lightning_roulette import units_of
from tests.support.pages import PROJECT
from tests.support.reports import CONFIRMED

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def neurons(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "examples")
    import neurons

    return neurons


def test_channels_of_both_convolutions_and_neurons_between_the_linear_layers_may_leave(neurons):
    pytest.importorskip("torch_pruning")
    assert units_of(neurons.DigitsChannels().net, torch.rand(2, 64)).count == 16 + 32 + 64


def test_the_picture_has_two_panels_in_few_colours(neurons, tmp_path):
    levels = tuple(replace(one, multiply_adds=one.survivors) for one in CONFIRMED.levels)
    neurons.draw(replace(CONFIRMED, levels=levels, multiply_adds=CONFIRMED.size), tmp_path / "picture.png")
    for path in (tmp_path / "picture.png", PROJECT / "docs/neurons.png"):
        picture = Image.open(path)
        assert (picture.mode, picture.size) == ("P", (1050, 400))
        assert len(picture.getcolors()) <= neurons.COLOURS
        assert path.stat().st_size < 60_000
