"""Roulette-wheel weight pruning for PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_roulette.judge.evaluator import Evaluator
from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.mask.mask import Mask, apply_mask, sparsity
from lightning_roulette.mask.pruned import PrunedWeights
from lightning_roulette.network.kinds import register_layer
from lightning_roulette.network.parameters import prunable_parameters, skipped_parameters
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.refit_settings import LeastSquares, Refit
from lightning_roulette.report.records import Candidate, Level, Method, Scores, StopReason
from lightning_roulette.report.report import SearchReport
from lightning_roulette.search.observer import LevelTime, Observer
from lightning_roulette.search.search import search
from lightning_roulette.search.winner import Winner
from lightning_roulette.settings import Tree, Validation, Wheel
from lightning_roulette.slim.export.export import export
from lightning_roulette.slim.export.exported import Exported
from lightning_roulette.slim.files.compressed import load_compressed, load_mask, save_compressed
from lightning_roulette.slim.files.inspection import FileContents, StoredTensor, inspect
from lightning_roulette.slim.files.weights import save_weights
from lightning_roulette.slim.measuring.measure import Measured, measure
from lightning_roulette.slim.removal.removal import DeadCount, UnitCount, dead_units, remove_dead
from lightning_roulette.slim.removal.shrunk import load_shrunk, save_shrunk
from lightning_roulette.slim.sparse.converting import to_dense, to_sparse
from lightning_roulette.slim.sparse.table import SparseLayer, SparseNetwork
from lightning_roulette.unit import Block, Head, Neuron, NofM, Reduction, Weight
from lightning_roulette.values import Codebook
from lightning_roulette.wheel.level import spin
from lightning_roulette.wheel.units.grouping import units_of
from lightning_roulette.wheel.units.units import Units

if TYPE_CHECKING:
    from lightning_roulette.trainer.callback import RouletteWheelPruning
    from lightning_roulette.trainer.hold_zeros import HoldZeros
    from lightning_roulette.trainer.sparsity import Sparsity
    from lightning_roulette.trainer.without_training import prune

__version__ = "0.2.0"

__all__ = [
    "Batches",
    "Block",
    "Calibration",
    "Candidate",
    "Codebook",
    "DeadCount",
    "Evaluator",
    "Exported",
    "FileContents",
    "Head",
    "HoldZeros",
    "LeastSquares",
    "Level",
    "LevelTime",
    "Mask",
    "Measured",
    "Method",
    "Neuron",
    "NofM",
    "Observer",
    "PrunedWeights",
    "Reduction",
    "Refit",
    "Refitted",
    "Resamples",
    "RouletteWheelPruning",
    "Scores",
    "SearchReport",
    "Singles",
    "SparseLayer",
    "SparseNetwork",
    "Sparsity",
    "StopReason",
    "StoredTensor",
    "Tree",
    "UnitCount",
    "Units",
    "Validation",
    "Weight",
    "Wheel",
    "Winner",
    "apply_mask",
    "dead_units",
    "export",
    "inspect",
    "load_compressed",
    "load_mask",
    "load_shrunk",
    "measure",
    "prunable_parameters",
    "prune",
    "register_layer",
    "remove_dead",
    "save_compressed",
    "save_shrunk",
    "save_weights",
    "search",
    "skipped_parameters",
    "sparsity",
    "spin",
    "to_dense",
    "to_sparse",
    "units_of",
]


def __getattr__(name: str) -> Any:
    # what needs lightning or torchmetrics is imported when asked for, so that `search` works without loading them
    if name == "RouletteWheelPruning":
        from lightning_roulette.trainer.callback import RouletteWheelPruning

        return RouletteWheelPruning
    if name == "HoldZeros":
        from lightning_roulette.trainer.hold_zeros import HoldZeros

        return HoldZeros
    if name == "Sparsity":
        from lightning_roulette.trainer.sparsity import Sparsity

        return Sparsity
    if name == "prune":
        from lightning_roulette.trainer.without_training import prune

        return prune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
