"""The networks of `units.py`: what is pruned, what it learns from, and what chooses and judges.

- ResNet-20 from a published checkpoint, and LeNets and a small residual network, trained by `examples/paper`.
- A Vision Transformer on CIFAR-10 and a GPT-2 on the bytes of a text. They are built from small configurations of
  transformers and trained here, for a few minutes.
"""

import math
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parent.parent / "paper"))
from checkpoints import NETWORKS
from data import load
from networks import as_trained, trained

from lightning_roulette.network.modes import evaluating

Split = tuple[Tensor, Tensor]
BATCH, CALIBRATION, HELD = 128, 5000, 5000  # images
EVERY = 100  # steps of training between two states that are stored
WIDTH, CONTEXT, ROWS, HELD_TEXT = 96, 128, 12_000, 1000  # of the transformers


@dataclass(frozen=True)
class Options:
    """Where things are.

    Attributes:
        data: Folder of the data sets of `examples/paper`.
        networks: Folder of trained networks. What is missing is trained and stored.
        checkpoint: State dict of ResNet-20.
        text: What GPT-2 learns. None: the sources of Python's standard library.
    """

    data: Path
    networks: Path
    checkpoint: Path | None = None
    text: Path | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A trained network and its data.

    Attributes:
        network: The network, in evaluation mode.
        head: Name of the module whose outputs are those of the network.
        learning: What it learns from.
        choosing: The part of the training data on which choices are made.
        judging: Test data.
        augmented: Gives learning inputs as in training.
        words: Whether the outputs are those of a language model.
    """

    network: nn.Module
    head: str
    learning: Split
    choosing: Split
    judging: Split
    augmented: Callable[[Tensor, torch.Generator], Tensor]
    words: bool = False

    @property
    def example(self) -> Tensor:
        """A batch of 64 inputs."""
        return self.judging[0][:64]

    def calibration(self, seed: int) -> Split:
        """Return learning inputs and their targets, drawn and augmented from a seed."""
        chance = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(self.learning[0]), generator=chance)[: CALIBRATION // (5 if self.words else 1)]
        return self.augmented(self.learning[0][some], chance), self.learning[1][some]

    @torch.no_grad()
    def score(self, network: nn.Module, split: Split) -> float:
        """Return the accuracy in percent, or minus 100 times the loss: a point is about a percent of perplexity."""
        with evaluating(network):
            found = [(network(x), y) for x, y in zip(split[0].split(500), split[1].split(500), strict=True)]
        if self.words:
            return -100 * float(loss(torch.cat([one for one, _ in found]), split[1]))
        return 100 * sum(int((one.argmax(1) == y).sum()) for one, y in found) / len(split[1])


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy. The last dimension of the outputs is that of the classes."""
    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Logits(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def vit() -> nn.Module:
    """Return a Vision Transformer for 32 x 32 pixels, with patches of 8 x 8."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 6}
    return Logits(ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10)))


def gpt2() -> nn.Module:
    """Return a GPT-2 that reads and writes bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": 4, "n_head": 6, "n_positions": CONTEXT, "vocab_size": 256}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return Logits(GPT2LMHeadModel(GPT2Config(**sizes, **ends, tie_word_embeddings=False, use_cache=False)))


@torch.no_grad()
def recalibrate(network: nn.Module, inputs: Tensor) -> None:
    """Compute the running statistics of batch normalisations again. The network is in evaluation mode afterwards."""
    layers = [one for one in network.modules() if isinstance(one, nn.BatchNorm2d)]
    momenta = [one.momentum for one in layers]
    for one in layers:
        one.reset_running_stats()
        one.momentum = None  # the mean over all batches
    network.eval()
    for one in layers:
        one.train()
    for batch in inputs.split(500):
        network(batch)
    for one, momentum in zip(layers, momenta, strict=True):
        one.momentum = momentum
    network.eval()


def learn(network: nn.Module, case: Case, optimizer: torch.optim.Optimizer, epochs: int, stored: Path) -> None:
    """Train in place under a cosine. The network is in evaluation mode afterwards.

    Args:
        network: The network.
        case: Its data.
        optimizer: Of its parameters.
        epochs: Number of epochs.
        stored: File of the state after some steps, from which an interrupted training goes on. It is removed at the
            end.
    """
    size = BATCH // 4 if case.words else BATCH
    steps = math.ceil(len(case.learning[0]) / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    parts, first = (network, optimizer, schedule), 0
    if stored.exists():
        first, states = torch.load(stored, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    network.train()
    for step in range(first, epochs * steps):
        order = torch.randperm(len(case.learning[0]), generator=torch.Generator().manual_seed(step // steps))
        some, chance = order.split(size)[step % steps], torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss(network(case.augmented(case.learning[0][some], chance)), case.learning[1][some]).backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == EVERY - 1:
            torch.save((step + 1, [part.state_dict() for part in parts]), stored)
    stored.unlink(missing_ok=True)
    network.eval()


def resnet_20(options: Options) -> Case:
    """Return ResNet-20 of a checkpoint. Its batch normalisation is first estimated anew. It learns from bytes."""
    published = NETWORKS["resnet20"]
    with np.load(options.data / "cifar10.npz") as arrays:
        x, y, x_test, y_test = (torch.from_numpy(arrays[one]) for one in ("x_train", "y_train", "x_test", "y_test"))
    rest, held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(len(x) - HELD)
    classes, test_classes = (one.flatten().long() for one in (y, y_test))
    parts = [(x[rest], classes[rest]), (published.images(x[held]), classes[held])]
    parts.append((published.images(x_test), test_classes))
    case = Case(_ready(published.build()), "fc", *parts, published.images)
    if (path := options.networks / "units-resnet20.pt").exists():
        case.network.load_state_dict(torch.load(path, weights_only=True))
    else:
        case.network.load_state_dict(torch.load(options.checkpoint, weights_only=True))
        recalibrate(case.network, case.calibration(0)[0])
        torch.save(case.network.state_dict(), path)
    return case


def of_paper(name: str, options: Options) -> Case:
    """Return a network of the paper's table."""
    task = load(name, options.data)
    network = trained(task, 0, options.networks)
    head = [one for one, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
    parts = [(one.x, one.y) for one in (task.train, task.val, task.judge)]
    return Case(_ready(network), head, *parts, partial(as_trained, task))


def vit_case(options: Options) -> Case:
    """Return a Vision Transformer on CIFAR-10."""
    task = load("cifar10", options.data)
    parts = [(one.x, one.y) for one in (task.train, task.val, task.judge)]
    case = Case(_built(vit), "model.classifier", *parts, partial(as_trained, task))
    return _trained(case, options.networks / "units-vit.pt", epochs=10)


def gpt2_case(options: Options) -> Case:
    """Return a GPT-2 on the bytes of a text: by default the sources of Python's standard library."""
    whole = torch.frombuffer(bytearray(text(options.text)), dtype=torch.uint8).long()
    rows = whole[: len(whole) // CONTEXT * CONTEXT + 1][: ROWS * CONTEXT + 1]
    x, y = rows[:-1].view(-1, CONTEXT), rows[1:].view(-1, CONTEXT)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [(x[some], y[some]) for some in order.split([len(x) - 2 * HELD_TEXT, HELD_TEXT, HELD_TEXT])]
    case = Case(_built(gpt2), "model.lm_head", *parts, lambda x, _: x, words=True)
    return _trained(case, options.networks / "units-gpt2.pt", epochs=1)


def text(path: Path | None) -> bytes:
    """Return the bytes of a file, or of the sources of Python's standard library in the order of their names."""
    if path is not None:
        return path.read_bytes()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(one.read_bytes() for one in files)


def _ready(network: nn.Module) -> nn.Module:
    return network.eval().to(memory_format=torch.channels_last)


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def _trained(case: Case, path: Path, epochs: int) -> Case:
    """Train the network of a case, or read it from a file."""
    if path.exists():
        case.network.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(case.network.parameters(), lr=2e-3, weight_decay=0.05)
        learn(case.network, case, optimizer, epochs, path.with_suffix(".state"))
        torch.save(case.network.state_dict(), path)
    return replace(case, network=_ready(case.network))


CASES: dict[str, Callable[[Options], Case]] = {
    "ResNet-20": resnet_20,
    "LeNet-5": lambda options: of_paper("mnist-lenet-5", options),
    "LeNet-300-100": lambda options: of_paper("mnist", options),
    "ResNet-8": lambda options: of_paper("cifar10", options),
    "ViT": vit_case,
    "GPT-2": gpt2_case,
}
