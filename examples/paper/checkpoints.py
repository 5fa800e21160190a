"""Networks of published checkpoints, and numbers that their authors report.

The checkpoints are those of Benbaki et al., "Fast as CHITA: neural network pruning with combinatorial optimization"
(ICML 2023, arXiv:2302.14623), and so are the numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Block(nn.Module):
    """Two convolutions around which their input is led."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class ResNet20(nn.Module):
    """ResNet-20 for images of 32 x 32 pixels (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1), Block(outputs, outputs, 1))
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class MLPNet(nn.Module):
    """A perceptron of 784, 40, 20 and 10 units without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*one, bias=False) for one in ((784, 40), (40, 20), (20, 10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(relu(self.fc2(relu(self.fc1(x.flatten(1))))))


@dataclass(frozen=True)
class Published:
    """A network, its inputs, and published numbers.

    Attributes:
        title: Name for tables.
        build: Makes the untrained network.
        mean: Mean of each channel by which images are normalised.
        deviation: Standard deviation, likewise.
        augmented: Whether the network was trained on shifted and mirrored images.
        sparsities: Sparsities of the table.
        exclude: Patterns of names of weights that the published tables do not prune.
        accuracy: Published accuracy of the dense network, in percent.
        reported: Published accuracy of CHITA++ by sparsity, in percent. It prunes in several stages.
    """

    title: str
    build: Callable[[], nn.Module]
    mean: Sequence[float]
    deviation: Sequence[float]
    augmented: bool
    sparsities: Sequence[float]
    accuracy: float
    exclude: Sequence[str] = ()
    reported: dict[float, float] = field(default_factory=dict)

    @property
    def normalised(self) -> bool:
        """Whether the network has batch normalisations."""
        return any(isinstance(part, nn.BatchNorm2d) for part in self.build().modules())

    def images(self, x: Tensor, chance: torch.Generator | None = None) -> Tensor:
        """Return bytes of shape `(n, height, width[, 3])` as normalised images, channels first.

        Args:
            x: The bytes.
            chance: Source of shifts and mirroring. None: images stay as they are.
        """
        images = (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)).float() / 255
        images = images if chance is None or not self.augmented else shifted(images, chance)
        mean, deviation = (torch.tensor(one).view(-1, 1, 1) for one in (self.mean, self.deviation))
        return (images - mean) / deviation


def shifted(images: Tensor, chance: torch.Generator) -> Tensor:
    """Return images that are each shifted by up to four pixels. The border is black. Half of them are mirrored."""
    count, _, height, width = images.shape
    windows = pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(9, (2, count), generator=chance)
    found = windows[torch.arange(count), :, down, right]
    mirrored = torch.rand(count, generator=chance) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), found.flip(3), found)


NETWORKS = {
    "resnet20": Published(
        "ResNet-20, CIFAR-10",
        ResNet20,
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        True,
        (0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        91.36,
        ("*downsample*",),
        {0.7: 90.38, 0.8: 88.72, 0.9: 79.32},
    ),
    "mlpnet": Published(
        "MLPNet, MNIST",
        MLPNet,
        (0.1307,),
        (0.3081,),
        False,
        (0.8, 0.9, 0.95, 0.98),
        93.97,
        reported={0.98: 90.73},
    ),
}
