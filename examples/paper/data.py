"""The eight tasks of the paper's table: settled labels, and human opinion on the quality of images.

Each is read from an .npz in the layout of Keras' mnist.npz (`x_train`, `y_train`, `x_test`, `y_test`; `sd_train` and
`sd_test` where the raters' spread is known). The test part of a file only judges; what chooses is carved from the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
QUICK = 300  # rows of a part, in miniature


@dataclass(frozen=True)
class Source:
    """Where a task comes from, and what is made of it; `val` is how many rows choose (at most a fifth)."""

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
        spread: Shape `(n,)`: standard deviation of the raters' scores, in the units of the file, where known.
    """

    x: Tensor
    y: Tensor
    spread: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, chosen: Tensor | slice) -> "Part":
        """Some of the rows."""
        return Part(self.x[chosen], self.y[chosen], None if self.spread is None else self.spread[chosen])


@dataclass(frozen=True, eq=False)
class Task:
    """What to learn, to choose by and to be judged by.

    Args:
        name: One of `TASKS`.
        opinion: Whether mean scores are predicted; else classes.
        network: What `networks.build` makes of it.
        train: Trains.
        val: Chooses.
        judge: Judges, and nothing else.
        centre: Mean of the training scores; zero for classes.
        scale: Their standard deviation; one for classes. Networks predict `(score - centre) / scale`.
        held_out: Whether the judge is a piece of the training data, the test data unread.
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
        """Of one input."""
        return tuple(self.train.x.shape[1:])

    def standardised(self, y: Tensor) -> Tensor:
        """What the network ought to put out for these scores."""
        return (y - self.centre) / self.scale


def load(name: str, folder: Path, held_out: bool = False, quick: bool = False) -> Task:
    """A task, split the same way at each call.

    A seeded permutation of the training rows deals validation rows, and, if `held_out`, as many to judge; so validation
    rows are the same either way. Rows are dealt one by one, as the files' own splits do: in TID2013 and KADID-10k each
    reference image and each distortion is on both sides of the test split, so their judges ask for the gaps in a table,
    not for unseen images.

    The `sd` of TID2013 is left out: it is the error of the mean score, not the raters' standard deviation (for most
    rows it is below the least that whole-numbered scores of that mean can have).

    Args:
        name: One of `TASKS`, or `cifar10-resnet-20`.
        folder: Where the .npz files are; MNIST is fetched from OpenML if it is not there.
        held_out: Leave the test part of the file unread, and judge by training rows.
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
    """See that the file of a task is in the folder, or can be fetched.

    Raises:
        FileNotFoundError: If not.
    """
    source = SOURCES[name]
    if source.original != MNIST and not (folder / source.file).exists():
        raise FileNotFoundError(
            f"{source.file} is not in {folder}, but must be there in the layout of Keras' mnist.npz. "
            f"The public original: {source.original}."
        )


def _arrays(source: Source, folder: Path, parts: Sequence[str]) -> Arrays:
    """The arrays of the parts named; others are not read."""
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
    """Inputs as they are in the file, targets as tensors."""
    x = torch.from_numpy(arrays[f"x_{part}"])
    y = torch.from_numpy(arrays[f"y_{part}"].reshape(-1).astype(np.float32 if source.opinion else np.int64))
    spread = arrays.get(f"sd_{part}") if source.spread else None
    return Part(x, y, None if spread is None else torch.from_numpy(spread.astype(np.float32)))


def _normalised(parts: Sequence[Part]) -> list[Part]:
    """Grey images in [0, 1]; colour channels and columns standardised by the first part, constant columns zero."""
    first = _floats(parts[0].x)
    centre, factor = torch.zeros(1), torch.ones(1)
    if first.ndim == 2 or first.shape[1] == 3:
        over = (0, 2, 3) if first.ndim == 4 else (0,)
        centre, spread = first.mean(over, keepdim=True), first.std(over, keepdim=True)
        factor = torch.where(first.amax(over, keepdim=True) > first.amin(over, keepdim=True), 1 / spread, 0.0)
    return [Part((_floats(part.x) - centre) * factor, part.y, part.spread) for part in parts]


def _floats(x: Tensor) -> Tensor:
    """Bytes of shape `(n, height, width[, 3])` as images in [0, 1], channels last in memory; tables as they are."""
    if x.ndim == 2:
        return x.float()
    images = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return images.float() / 255
