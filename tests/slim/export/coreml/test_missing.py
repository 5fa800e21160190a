"""`export(..., format="coreml")` where coremltools is not installed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_roulette.slim.export.export import export


def test_a_missing_package_is_named_with_its_extra_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-roulette\[coreml\]'"):
        export(nn.Linear(3, 2), tmp_path / "new" / "net.mlpackage", "coreml", example_input=torch.ones(1, 3))
    assert not list(tmp_path.iterdir())
