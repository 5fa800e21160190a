"""Pictures, histograms and text of a search, in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_roulette.large.shards import any_sharded
from lightning_roulette.mask.mask import Mask
from lightning_roulette.report.plot import has_multiply_adds
from lightning_roulette.report.report import SearchReport
from lightning_roulette.trainer.show import pictures
from lightning_roulette.trainer.show.board import boards_of
from lightning_roulette.trainer.show.display import Display
from lightning_roulette.trainer.show.log import log
from lightning_roulette.trainer.show.points import largest

MOST_VALUES = 2**20  # of a layer in its histogram

_SCORES = (
    "Every candidate is a dot. Lines join the winners, and their scores on the held-out half. Floors are dashed, the "
    "dense network is a diamond, and a dotted line marks the result."
)
_SCORES_OVER_WORK = f"{_SCORES} The x-axis is the percentage of the dense network's multiply-adds that is left."
_DENSITIES = "Share of the weights of each layer that is kept: the twenty largest layers."
_MASK = "Kept weights are black, pruned ones white. Kernels of a convolution are apart from each other."
_WEIGHTS = "Weights of the layer: all of them at step 0, and the survivors at the step of the result."


class Album(Display):
    """Puts pictures, histograms and the report into TensorBoard, in the first process.

    | tag | what it is |
    |---|---|
    | `roulette-image/scores`, `/densities` | pictures of the result; they need matplotlib |
    | `roulette-image/scores_over_multiply_adds` | the same scores, where whole units leave; it needs matplotlib, too |
    | `roulette-mask/<layer>` | pictures of the masks of the first small layers |
    | `roulette-weights/<layer>` | histograms of the weights of the twenty largest layers, before and after |
    | `roulette/report` | the lines of the report, and a table of all levels |

    Args:
        trainer: The Trainer whose loggers are used.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._boards = boards_of(trainer)
        self._mask: Mask | None = None

    def on_weights(self, level: int, mask: Mask, weights: Mapping[str, Tensor]) -> None:
        """Draw histograms, and the masks of a pruned network. Weights that are sharded are left out."""
        self._mask = mask
        if not self._boards or any_sharded(weights.values()):
            return
        for name, short in largest(mask).items():
            self._histogram(short, _values(weights[name], mask[name] if level else None), level)
        if level:
            for short, pixels in pictures.masks(mask).items():
                self._image(f"roulette-mask/{short}", pixels, level, _MASK)
        self._save()

    def on_end(self, report: SearchReport) -> None:
        """Draw the pictures of the result, and write the report."""
        if not self._boards:
            return
        level = 0 if report.winner is None else report.winner.level
        try:
            self._image("roulette-image/scores", pictures.scores(report, "sparsity"), level, _SCORES)
            if has_multiply_adds(report):
                over_work = pictures.scores(report, "multiply_adds")
                self._image("roulette-image/scores_over_multiply_adds", over_work, level, _SCORES_OVER_WORK)
            if self._mask is not None:
                self._image("roulette-image/densities", pictures.densities(self._mask), level, _DENSITIES)
        except Exception as error:  # the search has ended well, whatever the drawing library does
            log.info(f"RouletteWheelPruning: no pictures for TensorBoard: {error}")
        for board in self._boards:
            board.text("roulette/report", report.markdown(brief=True), len(report.accepted))
        self._save()

    def _histogram(self, short: str, values: Tensor, step: int) -> None:
        for board in self._boards:
            board.histogram(f"roulette-weights/{short}", values, step, _WEIGHTS)

    def _image(self, tag: str, pixels: Tensor, step: int, description: str) -> None:
        for board in self._boards:
            board.image(tag, pixels, step, description)

    def _save(self) -> None:
        for board in self._boards:
            board.save()


def _values(weights: Tensor, kept: Tensor | None) -> Tensor:
    """Return finite weights on the CPU, evenly spaced ones of a large tensor; only those that are kept."""
    flat = weights.detach().flatten()
    stride = -(-flat.numel() // MOST_VALUES) if flat.numel() else 1
    some = flat[::stride].cpu()
    if kept is not None:
        some = some[kept.flatten()[::stride].cpu()]
    return some[some.isfinite()]
