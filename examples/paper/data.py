"""The eight tasks of the paper's table. They have settled labels, or human opinion on the quality of images.

Each task is read from an .npz in the layout of Keras' mnist.npz: `x_train`, `y_train`, `x_test`, `y_test`, and
`sd_train` and `sd_test` if the raters' spread is known. The test part of a file is used for judging only. Validation
rows are taken from the training part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
QUICK = 300  # rows of a part in a quick run


@dataclass(frozen=True)
class Source:
    """The file and the network of a task. `val` is the number of validation rows (at most a fifth of the rows)."""

    title: str
    file: str
    network: str
    opinion: bool
    original: str
    val: int | None = None
    spread: bool = True


MNIST = "MNIST, which OpenML has as mnist_784"
CIFAR10 = "CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html, or keras.datasets.cifar10.load_data()"
TID2013 = "the scores of TID2013 (Ponomarenko et al. 2015), x: indicators of reference image, distortion and level"
KADID10K = "the scores of KADID-10k (Lin, Hosu and Saupe 2019), x: indicators of reference image, distortion and level"
BIQ2021 = "BIQ2021 (Ahmed and Asif 2022), split as its authors do, x: 44 statistics of each photo"
PHOTOS = "BIQ2021 (Ahmed and Asif 2022), split as its authors do, x: each photo averaged down to 32 x 32 x 3 bytes"
KONIQPP = "the scores of KonIQ++ (Su et al. 2021), x: share of voters that name each of five flaws, and their mean"

SOURCES = {
    "mnist": Source("MNIST, LeNet-300-100", "mnist.npz", "lenet-300-100", False, MNIST, val=10_000),
    "mnist-lenet-5": Source("MNIST, LeNet-5", "mnist.npz", "lenet-5", False, MNIST, val=10_000),
    "cifar10": Source("CIFAR-10, ResNet-8", "cifar10.npz", "resnet-8", False, CIFAR10, val=5_000),
    "tid2013": Source("TID2013, MLP", "tid2013.npz", "mlp", True, TID2013, spread=False),
    "kadid10k": Source("KADID-10k, MLP", "kadid10k.npz", "mlp", True, KADID10K),
    "biq2021": Source("BIQ2021 statistics, MLP", "biq2021_features.npz", "mlp", True, BIQ2021),
    "biq2021-photos": Source("BIQ2021 photos, CNN", "biq2021_photos.npz", "photo-cnn", True, PHOTOS),
    "koniqpp": Source("KonIQ++, MLP", "koniqpp.npz", "mlp", True, KONIQPP),
}
TASKS = tuple(SOURCES)
SOURCES["cifar10-resnet-20"] = Source(  # for a GPU
    "CIFAR-10, ResNet-20", "cifar10.npz", "resnet-20", False, CIFAR10, val=5_000
)


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a task.

    Args:
        x: Inputs, normalised; images of shape `(n, channels, height, width)`, tables of shape `(n, columns)`.
        y: Shape `(n,)`: classes, or mean scores in the units of the file.
        spread: Shape `(n,)`: standard deviation of the raters' scores, in the units of the file. None if unknown.
    """

    x: Tensor
    y: Tensor
    spread: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, chosen: Tensor | slice) -> "Part":
        """Return some of the rows."""
        return Part(self.x[chosen], self.y[chosen], None if self.spread is None else self.spread[chosen])


@dataclass(frozen=True, eq=False)
class Task:
    """The data of a task: what a network learns, what choices are made on, and what judges it.

    Args:
        name: One of `TASKS`.
        opinion: Whether mean scores are predicted. Otherwise classes are.
        network: Name of the network, see `networks.build`.
        train: Rows for training.
        val: Rows for choices.
        judge: Rows for judging only.
        centre: Mean of the training scores. Zero for classes.
        scale: Standard deviation of the training scores. One for classes. Networks predict `(score - centre) / scale`.
        held_out: Whether `judge` is a part of the training data. Then the test data is not read.
    """

    name: str
    opinion: bool
    network: str
    train: Part
    val: Part
    judge: Part
    centre: float = 0.0
    scale: float = 1.0
    held_out: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    def standardised(self, y: Tensor) -> Tensor:
        """Return the outputs of a perfect network for these scores."""
        return (y - self.centre) / self.scale


def load(name: str, folder: Path, held_out: bool = False, quick: bool = False) -> Task:
    """Return a task. Its split is the same at each call.

    A seeded permutation of the training rows gives the validation rows and, if `held_out`, the same number of rows to
    judge. The validation rows do not depend on `held_out`. Single rows are assigned, as in the files' own splits: in
    TID2013 and KADID-10k each reference image and each distortion is on both sides of the test split. Their test rows
    are gaps in a table, and not unseen images.

    The `sd` of TID2013 is not used. It is the error of the mean score, not the raters' standard deviation: for most
    rows it is smaller than any standard deviation of integer scores with this mean.

    Args:
        name: One of `TASKS`, or `cifar10-resnet-20`.
        folder: Folder of the .npz files. MNIST is fetched from OpenML if it is not there.
        held_out: Judge on training rows, and do not read the test part of the file.
        quick: Keep the first 300 rows of each part.

    Raises:
        FileNotFoundError: If the file is not in the folder.
    """
    check_there(name, folder)
    source = SOURCES[name]
    arrays = _arrays(source, folder, ("train",) if held_out else ("train", "test"))
    rows = _part(arrays, "train", source)
    deal = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    size = min(source.val or len(rows), len(rows) // 5)
    val, rest = rows.rows(deal[:size]), deal[size:]
    judge = rows.rows(rest[:size]) if held_out else _part(arrays, "test", source)
    parts = [rows.rows(rest[size:] if held_out else rest), val, judge]
    if quick:
        parts = [part.rows(slice(QUICK)) for part in parts]
    y = parts[0].y
    centre, scale = (float(y.mean()), float(y.std())) if source.opinion else (0.0, 1.0)
    return Task(name, source.opinion, source.network, *_normalised(parts), centre, scale, held_out)


def check_there(name: str, folder: Path) -> None:
    """Check that the file of a task is in the folder or can be fetched.

    Raises:
        FileNotFoundError: If it is not in the folder and cannot be fetched.
    """
    source = SOURCES[name]
    if source.original != MNIST and not (folder / source.file).exists():
        raise FileNotFoundError(
            f"{source.file} is not in {folder}, but must be there in the layout of Keras' mnist.npz. "
            f"The public original: {source.original}."
        )


def _arrays(source: Source, folder: Path, parts: Sequence[str]) -> Arrays:
    """Return the arrays of these parts. Other parts are not read."""
    path = folder / source.file
    if path.exists():
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays.files if key.rpartition("_")[2] in parts}
    from sklearn.datasets import fetch_openml

    images, digits = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
    images = images.astype(np.uint8).reshape(-1, 28, 28)
    where = {"train": slice(60_000), "test": slice(60_000, None)}
    return {f"x_{part}": images[where[part]] for part in parts} | {f"y_{part}": digits[where[part]] for part in parts}


def _part(arrays: Arrays, part: str, source: Source) -> Part:
    """Return a part with its inputs as in the file, and its targets as tensors."""
    x = torch.from_numpy(arrays[f"x_{part}"])
    y = torch.from_numpy(arrays[f"y_{part}"].reshape(-1).astype(np.float32 if source.opinion else np.int64))
    spread = arrays.get(f"sd_{part}") if source.spread else None
    return Part(x, y, None if spread is None else torch.from_numpy(spread.astype(np.float32)))


def _normalised(parts: Sequence[Part]) -> list[Part]:
    """Return parts with normalised inputs.

    Grey images are in [0, 1]. Colour channels and columns are standardised by the first part. Constant columns are
    zero.
    """
    first = _floats(parts[0].x)
    centre, factor = torch.zeros(1), torch.ones(1)
    if first.ndim == 2 or first.shape[1] == 3:
        over = (0, 2, 3) if first.ndim == 4 else (0,)
        centre, spread = first.mean(over, keepdim=True), first.std(over, keepdim=True)
        factor = torch.where(first.amax(over, keepdim=True) > first.amin(over, keepdim=True), 1 / spread, 0.0)
    return [Part((_floats(part.x) - centre) * factor, part.y, part.spread) for part in parts]


def _floats(x: Tensor) -> Tensor:
    """Return tables as floats, and bytes of shape `(n, height, width[, 3])` as images in [0, 1], channels last."""
    if x.ndim == 2:
        return x.float()
    images = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return images.float() / 255
