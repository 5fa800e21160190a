"""Fixtures: a Trainer that leaves nothing behind and prints nothing."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from lightning.pytorch import Trainer

torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another


@pytest.fixture
def make_trainer(tmp_path):
    """A function that makes a quiet CPU Trainer in a temporary folder; options override."""

    def make(**options) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**quiet | options)

    return make
