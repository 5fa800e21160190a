"""Fixtures: a Trainer that leaves nothing behind and prints nothing, and one way to fit with it.

It also decides which cases of parametrized tests are slow.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from functools import partial
from zlib import crc32

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_roulette.search.run import begin
from tests.support import fits
from tests.support.modules import QUIET

torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another

EACH = 3  # one case in so many is quick, in addition to the first one


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark about two thirds of the cases of a parametrized test as slow, unless it is marked `every_case`.

    The first case stays quick. Of the others, a checksum of their names decides: a regular choice might leave out all
    cases with one value of an argument.
    """
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not any(item.iter_markers("every_case")):
            cases[item.path, item.originalname].append(item)
    for some in cases.values():
        quick = [item for item in some if not any(item.iter_markers("slow"))]
        for item in quick[1:]:
            if crc32(item.name.encode()) % EACH:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def any_calibration_fits(monkeypatch):
    """Running statistics are computed even if they worsen the score. Those of untrained networks often do."""
    monkeypatch.setattr(sys.modules[begin.__module__], "misfit", lambda *_: "")


@pytest.fixture
def make_trainer(tmp_path):
    """A function that makes a quiet CPU Trainer in a temporary folder; options override."""

    def make(**options) -> Trainer:
        usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": tmp_path}
        return Trainer(**QUIET | usual | options)

    return make


@pytest.fixture
def fit(make_trainer):
    """A function that trains a module and returns it: `tests.support.fits.fit`."""
    return partial(fits.fit, make_trainer)


@pytest.fixture
def at_hook(fit):
    """A function that does something in a hook of a fit: `tests.support.fits.at_hook`."""
    return partial(fits.at_hook, fit)


@pytest.fixture
def at_end(at_hook):
    """A function that does something at the end of a fit of one epoch: `tests.support.fits.at_end`."""
    return partial(fits.at_end, at_hook)
