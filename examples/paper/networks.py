"""The networks of the tasks: building, training and scoring."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Part, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from on_tensors import NETWORKS, Residual, augmented, small_resnet


@dataclass(frozen=True)
class Recipe:
    """Settings of Adam with weight decay (L2) under a cosine: epochs, batch size, learning rate and decay."""

    epochs: int
    batch: int
    rate: float
    decay: float = 5e-4


# chosen on validation rows
RECIPES = {
    "mnist": Recipe(12, 100, 1e-3),
    "mnist-lenet-5": Recipe(8, 100, 1e-3),
    "cifar10": Recipe(8, 128, 5e-3),
    "cifar10-resnet-20": Recipe(60, 128, 5e-3),
    "tid2013": Recipe(60, 64, 3e-3, 1e-2),
    "kadid10k": Recipe(30, 64, 1e-3, 1e-2),
    "biq2021": Recipe(40, 64, 3e-3, 2e-3),
    "biq2021-photos": Recipe(30, 64, 1e-3, 2e-4),
    "koniqpp": Recipe(20, 64, 1e-3),
}


def resnet_20() -> nn.Module:
    """Return ResNet-20 for CIFAR (He et al. 2016)."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    blocks = [Residual(*shape) for shape in shapes]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def photo_cnn() -> nn.Module:
    """Return a network of three convolutions for 32 x 32 pixels, with one output."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 1))


def mlp(inputs: int) -> nn.Module:
    """Return a perceptron with two hidden layers and one output."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))


def build(task: Task) -> nn.Module:
    """Return the untrained network of a task.

    Its outputs have shape `(n, 10)` for classes, and `(n, 1)` for opinion: standardised scores.
    """
    if task.network == "mlp":
        return mlp(task.shape[0])
    others = {"resnet-8": small_resnet, "resnet-20": resnet_20, "photo-cnn": photo_cnn}
    maker = others.get(task.network) or NETWORKS[task.network][0]
    return maker().to(memory_format=torch.channels_last)


def trained(task: Task, seed: int, folder: Path | None, quick: bool = False) -> nn.Module:
    """Return the trained network of a seed, in evaluation mode on the CPU. Equal seeds give equal networks.

    Args:
        task: The task. Only its training rows are used.
        seed: Seed of the initial weights and of the order of the rows. No global seed is read or set.
        folder: Folder in which trained networks are stored. None: do not store them.
        quick: Train for three epochs only.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build(task)
    name = f"{task.name}{'-held-out' * task.held_out}{'-quick' * quick}-{seed}.pt"
    if folder is not None and (folder / name).exists():
        net.load_state_dict(torch.load(folder / name, weights_only=True))
        return net.eval()
    _train(net, task, RECIPES[task.name], 3 if quick else RECIPES[task.name].epochs, seed)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{name}.{os.getpid()}"
        torch.save(net.state_dict(), unfinished)
        unfinished.replace(folder / name)
    return net.eval()


def _train(net: nn.Module, task: Task, recipe: Recipe, epochs: int, seed: int) -> None:
    """Train in place. Residual networks use a GPU if there is one."""
    device = "cuda" if "resnet" in task.network and torch.cuda.is_available() else "cpu"
    net.to(device).train()
    chance, train = torch.Generator().manual_seed(seed), task.train
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(train) / recipe.batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(train), generator=chance).split(recipe.batch):
            x = as_trained(task, train.x[chosen], chance)
            optimizer.zero_grad()
            losses(net(x.to(device)), task, train.y[chosen].to(device)).mean().backward()
            optimizer.step()
            schedule.step()
    net.to("cpu")


def as_trained(task: Task, x: Tensor, chance: torch.Generator) -> Tensor:
    """Return training inputs as the network sees them: colour images are shifted and mirrored at random.

    Args:
        task: The task of the inputs.
        x: The inputs. Shape `(n, *task.shape)`.
        chance: Draws the shifts. It is on the CPU.
    """
    return augmented(x, chance) if task.shape[0] == 3 else x


@torch.no_grad()
def predict(net: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of the network, computed in blocks of 1,000 rows. `net` and `x` are on one device."""
    return torch.cat([net(block) for block in x.split(1000)])


def losses(outputs: Tensor, task: Task, y: Tensor) -> Tensor:
    """Return the loss of each row.

    It is the cross entropy, or the squared error of the score in units of the standard deviation of the training
    scores.
    """
    if not task.opinion:
        return cross_entropy(outputs, y, reduction="none")
    return (outputs.reshape(-1) - task.standardised(y)).square()


def score(outputs: Tensor, y: Tensor, opinion: bool) -> float:
    """Return the accuracy, or Spearman's correlation. Higher is better."""
    return spearman(outputs, y) if opinion else float((outputs.argmax(1) == y).double().mean())


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the correlation of the ranks, with averaged ties.

    It is zero if all values of one tensor are equal, and NaN if a tensor contains NaN.
    """
    if bool(a.isnan().any() | b.isnan().any()):
        return math.nan
    first, second = (_ranks(values.reshape(-1)) for values in (a, b))
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Return ranks minus their mean. Equal values get the mean of their ranks."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[group]
    return ranks - ranks.mean()


def rmse(outputs: Tensor, task: Task, y: Tensor) -> float:
    """Return the root mean squared error, in the units of the scores."""
    return task.scale * math.sqrt(float(losses(outputs, task, y).double().mean()))


def within_spread(outputs: Tensor, task: Task, part: Part) -> float | None:
    """Return the share of predictions within one standard deviation of the raters from the mean score.

    It is None if the standard deviation is unknown.
    """
    if part.spread is None:
        return None
    error = (outputs.reshape(-1) * task.scale + task.centre - part.y).abs()
    return float((error <= part.spread).double().mean())
