"""Remove channels of a network for scikit-learn's digits; draw its accuracy over sparsity and over multiply-adds."""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from quickstart import DigitsClassifier, loaders, percent
from torch import nn

from lightning_roulette import RouletteWheelPruning, SearchReport, Tree, Wheel

COLOURS = 96  # of the picture, which keeps its file small


class DigitsChannels(DigitsClassifier):
    """Two convolutions and two linear layers for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("neurons.png"), help="where the picture is written")
    picture = parser.parse_args().picture
    for name in ("lightning.pytorch", "lightning_roulette"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of lightning 2.6 with torch 2.13
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    train, val, test = loaders()
    model = DigitsChannels()
    pruning = RouletteWheelPruning(wheel=Wheel(unit="neuron"), tree=Tree(pruning_rate=0.1), tolerance=0.01)
    trainer = Trainer(
        max_epochs=30,
        callbacks=[pruning],
        logger=TensorBoardLogger("runs", "neurons"),
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, train, val)
    slim = trainer.test(model, test, verbose=False)[0]["test_acc"]
    model.load_state_dict(pruning.weights_at(0), strict=False)  # the network before pruning
    dense = trainer.test(model, test, verbose=False)[0]["test_acc"]
    print(pruning.report)

    print(f"Accuracy on 397 test images, which chose nothing: dense {percent(dense)}, pruned {percent(slim)}.")
    draw(pruning.report, picture)
    print(f"The picture is in {picture}.")


def draw(report: SearchReport, path: Path) -> None:
    """Write a PNG with few colours: the scores over sparsity, and over multiply-adds.

    Args:
        report: The report of the search.
        path: Where to write.
    """
    canvas = FigureCanvasAgg(Figure(figsize=(10.5, 4), dpi=100, layout="constrained"))
    for over, axes in zip(("sparsity", "multiply_adds"), canvas.figure.subplots(1, 2), strict=True):
        report.plot(over, axes=axes)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
