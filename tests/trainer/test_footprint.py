"""What the report says about bytes and multiply-adds, and that measuring them changes nothing."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from lightning_roulette import RouletteWheelPruning, Tree, prune, save_compressed
from lightning_roulette.report.records import Footprint
from tests.support.fits import pruner
from tests.support.modules import Blobs, train_loader, trained, val_loader


def zeros_of(module) -> int:
    return sum(int((one == 0).sum()) for one in module.parameters() if one.dim() > 1)


def expected(module, tmp_path) -> Footprint:
    """The footprint of a chain of linear layers: one multiply-add of a sample for each weight."""
    weights = sum(one.numel() for one in module.parameters() if one.dim() > 1)
    dense = sum(one.nbytes for one in module.state_dict().values())
    size = save_compressed(module, tmp_path / "small.roulette")
    return Footprint(dense, size, weights, weights - zeros_of(module))


class WithExample(Blobs):
    """Has an example input of three samples, which validation does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(3, 16)


class Refuses(WithExample):
    """Its forward fails on the example input."""

    def forward(self, x):
        if len(x) == 3:
            raise ValueError("three samples")
        return super().forward(x)


class Twice(Blobs):
    """Runs its network twice in a validation step."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Blobs, WithExample])
@pytest.mark.parametrize("options", [{}, {"at_epoch": 1}, {"at_epoch": [1, 2]}], ids=str)
def test_the_footprint_is_that_of_the_network_after_the_fit(fit, tmp_path, kind, options):
    pruning = pruner(**options)
    module = fit(pruning, module=kind(), max_epochs=3)
    found = pruning.report.footprint
    assert zeros_of(module) > 0
    assert found == expected(module, tmp_path)
    assert found.effective_multiply_adds < found.dense_multiply_adds
    assert f"Bytes: {found.dense_bytes:,} dense, " in pruning.report.summary()[1]


def test_prune_reports_the_footprint(make_trainer, tmp_path):
    module = Blobs()
    trained(module, tmp_path)
    pruning = prune(make_trainer(), module, train_loader(), val_loader(), branches=2, tree=Tree(0.2, max_levels=1))
    assert pruning.report.footprint == expected(module, tmp_path)


def test_a_step_counts_every_run_of_the_network(fit):
    pruning = pruner()
    module = fit(pruning, module=Twice())
    weights = sum(one.numel() for one in module.parameters() if one.dim() > 1)
    assert pruning.report.footprint.dense_multiply_adds == 2 * weights


def test_what_fails_is_unknown_and_the_fit_goes_on(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    pruning = pruner()
    module = fit(pruning, module=Refuses())
    dense = sum(one.nbytes for one in module.state_dict().values())
    assert pruning.report.footprint == Footprint(dense)
    assert pruning.report.summary()[1] == f"Bytes: {dense:,} dense."


def test_a_state_dict_that_cannot_be_counted_gives_no_footprint(fit):
    class Extra(Blobs):
        def get_extra_state(self):
            return "no tensor"

        def set_extra_state(self, state):
            pass

    pruning = pruner()
    fit(pruning, module=Extra())
    assert pruning.report.footprint is None
    assert not any(line.startswith("Bytes") for line in pruning.report.summary())


def test_measuring_changes_nothing(fit, monkeypatch):
    def found(measures: bool) -> list:
        seen = []

        class Noted(WithExample):
            def on_train_end(self) -> None:
                metrics = {name: float(one) for name, one in self.trainer.callback_metrics.items()}
                modes = [part.training for part in self.modules()]
                seen.extend([metrics, modes, self.val_acc.tp.clone().tolist(), torch.rand(2).tolist()])
                seen.extend([random.random(), np.random.rand()])  # noqa: NPY002

        with monkeypatch.context() as patch:
            if not measures:
                patch.setattr("lightning_roulette.trainer.searching.footprint_of", lambda *_: None)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            pruning = pruner()
            module = fit(pruning, module=Noted())
        assert (pruning.report.footprint is not None) == measures
        return [*seen, [one.tolist() for one in module.state_dict().values()]]

    assert found(True) == found(False)


def test_training_after_the_search_measures_the_bytes_anew(fit, tmp_path):
    pruning = RouletteWheelPruning(at_epoch=1, tolerance=0.2, refit=None, tree=Tree(0.2, max_levels=1))
    module = fit(pruning, max_epochs=3)
    assert pruning.report.trained_score is not None
    assert pruning.report.footprint == expected(module, tmp_path)
