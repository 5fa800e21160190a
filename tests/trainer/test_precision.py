"""A whole run with each precision: trained, searched, refitted, loaded, trained on, saved and read back."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_roulette import Mask, RouletteWheelPruning, Tree, prunable_parameters
from tests.support.modules import Blobs, train_loader, val_loader


class Steady(Blobs):
    """Half precision has no number as small as Adam's `eps`."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


PRECISIONS = {  # options of the Trainer, and the type of the weights
    "32-true": (lambda: {"precision": "32-true"}, torch.float32),
    "bf16-mixed": (lambda: {"precision": "bf16-mixed"}, torch.float32),
    "bf16-true": (lambda: {"precision": "bf16-true"}, torch.bfloat16),
    "64-true": (lambda: {"precision": "64-true"}, torch.float64),
    "16-true": (lambda: {"precision": "16-true"}, torch.float16),
    "16-mixed": (lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}, torch.float32),
}


@pytest.mark.parametrize("at_epoch", [None, 1])
@pytest.mark.parametrize(("options", "dtype"), PRECISIONS.values(), ids=PRECISIONS)
def test_a_whole_run(make_trainer, tmp_path, options, dtype, at_epoch):
    pruning = RouletteWheelPruning(3, tolerance=0.1, tree=Tree(0.3, max_levels=2), at_epoch=at_epoch, dirpath=tmp_path)
    module = Steady()
    make_trainer(callbacks=[pruning], max_epochs=3, **options()).fit(module, train_loader(), val_loader())
    report, weights = pruning.report, module.state_dict()
    assert len(report.accepted) == 2
    assert report.folds == (8, 8)  # as with single precision: data was kept for confirmation
    assert (report.score if at_epoch is None else report.trained_score) > 0.9
    assert {one.dtype for one in module.parameters()} == {dtype}
    assert Mask.of_nonzeros(prunable_parameters(module)) == pruning.mask
    assert pruning.mask.sparsity == pytest.approx(0.51, abs=0.01)

    stored = torch.load(pruning.best_model_path, weights_only=True)["state_dict"]
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], one) and stored[name].dtype == one.dtype for name, one in weights.items())
    loaded = Steady.load_from_checkpoint(pruning.best_model_path, weights_only=True)
    assert Mask.of_nonzeros(prunable_parameters(loaded)) == pruning.mask
    (logged,) = make_trainer(**options()).validate(loaded, val_loader(), verbose=False)
    assert logged["val_acc"] == pytest.approx(report.score if at_epoch is None else report.trained_score, abs=1e-7)
