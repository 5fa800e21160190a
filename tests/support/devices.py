"""Networks such as those that run on small devices."""

from itertools import cycle

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions around which their input is led."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


class Residual(nn.Module):
    """A small residual network for images of 3 x 12 x 12."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 12, 2))
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def lenet_300_100() -> nn.Module:
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def lenet_5() -> nn.Module:
    """For images of 1 x 28 x 28."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def depthwise() -> nn.Module:
    """For images of 2 x 13 x 10, with every kind of window: uneven strides, padding, dilation, means, ReLU6."""
    return nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 6, 3, (2, 1), 1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, padding=(1, 2), dilation=(1, 2), groups=3, bias=False),
        nn.Dropout(0.5),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.ZeroPad2d((1, 0, 2, 1)),
        nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1),
        nn.Conv2d(12, 8, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.LogSoftmax(1),
    )


def sequence() -> nn.Module:
    """For sequences of 3 x 20."""
    convolutions = [nn.Conv1d(3, 6, 5, 2, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 3)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3), nn.Sigmoid())


def perceptron() -> nn.Module:
    """For vectors of 30."""
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 25), nn.ReLU6(), nn.Linear(25, 1))


NETWORKS = {
    "perceptron": (perceptron, (30,)),
    "lenet_300_100": (lenet_300_100, (1, 28, 28)),
    "lenet_5": (lenet_5, (1, 28, 28)),
    "residual": (Residual, (3, 12, 12)),
    "depthwise": (depthwise, (2, 13, 10)),
    "sequence": (sequence, (3, 20)),
}


def network(name: str, kept: float | tuple[float, ...] = 1.0, seed: int = 0) -> nn.Module:
    """Return a network with running statistics unlike those of a new one, and a share of its weights kept.

    Several shares are those of its layers by turns.
    """
    shares = cycle(kept if isinstance(kept, tuple) else (kept,))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = NETWORKS[name][0]()
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.3)
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.data[torch.rand_like(weight) >= next(shares)] = 0
    return module


def inputs(name: str, rows: int = 4, seed: int = 1) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *NETWORKS[name][1], generator=chance)
