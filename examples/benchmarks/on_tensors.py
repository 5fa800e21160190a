"""Shared code of the benchmarks: data and networks in memory, and an evaluator for `search` without a Trainer."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, pad

sys.path.append(str(Path(__file__).parent.parent))
from mnist import NETWORKS, Classifier, Split, accuracy, batches, mnist

from lightning_roulette import PrunedWeights, Scores, Singles, apply_mask, prunable_parameters

__all__ = [
    "NETWORKS",
    "Classifier",
    "OnTensors",
    "Split",
    "accuracy",
    "accuracy_with",
    "augmented",
    "batches",
    "cifar10",
    "dense_weights",
    "digits",
    "magnitude_curve",
    "mnist",
    "small_resnet",
    "trained",
]


class OnTensors:
    """An evaluator on images in memory. It ranks by loss or by accuracy, and judges by accuracy.

    Args:
        net: The network, in evaluation mode.
        split: Images and classes. Single images are divided between the folds.
        batch: Largest number of images in a forward pass.
        folds: Number of folds.
        by_accuracy: Whether to rank by accuracy instead of loss.
        seed: Seed of the division into folds.
    """

    def __init__(
        self, net: nn.Module, split: Split, batch: int, folds: int = 16, by_accuracy: bool = False, seed: int = 0
    ) -> None:
        order = torch.randperm(len(split[1]), generator=torch.Generator().manual_seed(seed))
        self.net, self.images, self.classes = net, split[0][order], split[1][order]
        self.batch, self.folds, self.by_accuracy = batch, folds, by_accuracy

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the scores of the network with the candidate's weights."""
        return self._scores(*self._judged(candidate, folds))

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Singles]:
        """Return the scores, and for each image whether it was classified correctly."""
        hits, losses = self._judged(candidate, folds)
        return self._scores(hits, losses), Singles(hits, 0.0, 1.0)

    def _scores(self, hits: Tensor, losses: Tensor) -> Scores:
        right, loss = float(hits.mean()), float(losses.mean())
        return Scores(rank=right, score=right) if self.by_accuracy else Scores(rank=-loss, score=right, tiebreak=right)

    @torch.no_grad()
    def _judged(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
        weights, size = candidate.weights, len(self.classes)
        begin, end = size * min(folds) // self.folds, size * (max(folds) + 1) // self.folds
        hits, losses = [], []
        for start in range(begin, end, self.batch):
            part = slice(start, min(end, start + self.batch))
            outputs = functional_call(self.net, weights, (self.images[part],))
            hits.append((outputs.argmax(1) == self.classes[part]).double())
            losses.append(cross_entropy(outputs, self.classes[part], reduction="none").double())
        return torch.cat(hits), torch.cat(losses)


def digits(seed: int, validation: int) -> dict[str, Split]:
    """Return scikit-learn's digits: 1,000 training, 397 test and up to 400 validation images, split by the seed."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    parts = {"train": slice(0, 1000), "val": slice(1000, 1000 + validation), "test": slice(1400, 1797)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def cifar10(path: Path, val: int) -> dict[str, Split]:
    """Return 45,000 training, up to 5,000 validation and 10,000 test images, normalised, in channels-last memory.

    Args:
        path: An .npz in the layout of Keras.
        val: Number of validation images.
    """
    with np.load(path) as arrays:
        images = np.concatenate([arrays["x_train"], arrays["x_test"]])
        classes = np.concatenate([arrays["y_train"], arrays["y_test"]]).reshape(-1)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    x = (x - x[:45_000].mean((0, 2, 3), keepdim=True)) / x[:45_000].std((0, 2, 3), keepdim=True)
    y = torch.from_numpy(classes.astype(np.int64))
    parts = {"train": slice(0, 45_000), "val": slice(45_000, 45_000 + val), "test": slice(50_000, 60_000)}
    return {part: (x[where].contiguous(memory_format=torch.channels_last), y[where]) for part, where in parts.items()}


def digits_mlp() -> nn.Module:
    """Return the perceptron of the quickstart, with 50,200 weights."""
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


class Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.around(x))


def small_resnet() -> nn.Module:
    """Return a ResNet with eight layers for images of CIFAR."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(name: str, seed: int, split: Split, epochs: int, batch: int = 100) -> nn.Module:
    """Return the network of a seed, trained by Adam with a learning rate of 0.001."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = digits_mlp() if name == "digits" else NETWORKS[name][0]()
    net.to(memory_format=torch.channels_last)
    chance, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(split[1]), generator=chance).split(batch):
            optimizer.zero_grad()
            cross_entropy(net(split[0][chosen]), split[1][chosen]).backward()
            optimizer.step()
    return net.eval()


def augmented(images: Tensor, chance: torch.Generator) -> Tensor:
    """Return images of 32 x 32 pixels, all shifted by the same up to four pixels, and half of them mirrored."""
    down, right = torch.randint(9, (2,), generator=chance).tolist()
    shifted = pad(images, (4, 4, 4, 4))[..., down : down + 32, right : right + 32]
    mirrored = torch.rand(len(images), generator=chance) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), shifted.flip(3), shifted)


def dense_weights(net: nn.Module) -> dict[str, Tensor]:
    """Return copies of the prunable weights."""
    return {name: weight.detach().clone() for name, weight in prunable_parameters(net).items()}


def pruned_accuracy(net: nn.Module, weights: dict[str, Tensor], mask: dict[str, Tensor], split: Split) -> float:
    """Return the accuracy with a mask. The network is dense afterwards."""
    apply_mask(net, mask)
    score = accuracy(net, split)
    with torch.no_grad():
        for name, parameter in prunable_parameters(net).items():
            parameter.copy_(weights[name])
    return score


@torch.no_grad()
def accuracy_with(net: nn.Module, values: Mapping[str, Tensor], split: Split) -> float:
    """Return the share of images classified correctly with other values in the network."""
    parts = zip(split[0].split(1000), split[1].split(1000), strict=True)
    return sum(int((functional_call(net, dict(values), (x,)).argmax(1) == y).sum()) for x, y in parts) / len(split[1])


def magnitude_curve(net: nn.Module, sparsities: Sequence[float], split: Split) -> list[float]:
    """Return the accuracy after one-shot magnitude pruning over all layers, for each sparsity."""
    weights = dense_weights(net)
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    ascending = magnitudes.sort().values
    found = []
    for sparsity in sparsities:
        gone = math.floor(sparsity * len(ascending) + 0.5)
        threshold = ascending[gone - 1] if gone else -1.0
        mask = {name: weight.abs() > threshold for name, weight in weights.items()}
        found.append(pruned_accuracy(net, weights, mask, split))
    return found
