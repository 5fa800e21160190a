"""Muted callbacks: they can be sent to the worker processes that a strategy such as ddp_spawn starts."""

from __future__ import annotations

import pickle

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichModelSummary

from lightning_roulette.trainer.validation.muting import muted_callbacks


class Counted(Callback):
    """Counts fits, and cannot send one of its attributes."""

    def __init__(self) -> None:
        self.fits, self.unsent = 0, lambda: None

    def on_fit_start(self, trainer, pl_module):
        self.fits += 1

    def __getstate__(self):
        return {"fits": self.fits}


CALLBACKS = {
    "of Lightning": (EarlyStopping("val_loss", patience=7), "patience"),
    "with a path": (ModelCheckpoint("files", monitor="val_acc", mode="max"), "dirpath"),
    "by default": (RichModelSummary(), "_max_depth"),
    "with a state of its own": (Counted(), "fits"),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_muted_callback_is_muted_in_a_worker_process(kind):
    callback, attribute = CALLBACKS[kind]
    (found,) = pickle.loads(pickle.dumps(muted_callbacks([callback])))
    assert isinstance(found, type(callback))
    assert getattr(found, attribute) == getattr(callback, attribute)
    assert found.on_fit_start(None, None) is found.setup(None, None, "fit") is None
    assert getattr(found, attribute) == getattr(callback, attribute)
