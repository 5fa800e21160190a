"""The pages of the project: their blocks of code, their links, and the names that their readers have."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_roulette import Mask, RouletteWheelPruning, Tree, apply_mask
from tests.support.modules import QUIET, Blobs, tiny_net, train_loader, val_loader

PROJECT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(one.relative_to(PROJECT)) for one in PROJECT.glob("docs/*.md"))]
NOT_RUN = "# not run in the tests: "  # the first line of a block that is not run, followed by the reason


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def text_of(page: str) -> str:
    return (PROJECT / page).read_text()


def blocks(page: str, language: str) -> list[Block]:
    """The fenced blocks of a language, in the order of the page."""
    text = text_of(page)
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    every = [Block(one[1], one[2], text.count("\n", 0, one.start()) + 2) for one in found]
    return [one for one in every if one.language == language]


def run(page: str, block: Block, names: dict) -> None:
    """Run a block; errors show its line of the page."""
    exec(compile("\n" * (block.line - 1) + block.text, str(PROJECT / page), "exec"), names)


class QuickTrainer(Trainer):
    """A quiet Trainer on the CPU, which trains on one batch of an epoch."""

    def __init__(self, **options) -> None:
        quiet = QUIET | {"accelerator": "cpu", "devices": 1, "limit_train_batches": 1, "enable_checkpointing": True}
        super().__init__(**quiet | options)


class TokenNet(nn.Module):
    """Stands for a model of transformers: called with the parts of a batch, it returns logits and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_net()

    def forward(self, input_ids, labels):
        logits = self.inner(input_ids)
        return SimpleNamespace(logits=logits, loss=cross_entropy(logits, labels))

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir()
        torch.save(self.state_dict(), Path(folder) / "weights.pt")


class Wrapped(LightningModule):
    """Logs the loss of a network that is called with the parts of a batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.network(**batch).loss)


def tokens(loader: DataLoader) -> DataLoader:
    """The same data in batches as a tokenizer would give them."""
    return DataLoader([{"input_ids": x, "labels": y} for x, y in loader.dataset], 100)


def fitted(folder: Path) -> RouletteWheelPruning:
    """A callback that has pruned a small network, with its files in `folder`."""
    torch.manual_seed(0)
    pruning = RouletteWheelPruning(tolerance=0.1, tree=Tree(0.2, max_levels=2))
    trainer = QuickTrainer(max_epochs=8, callbacks=[pruning], limit_train_batches=8, default_root_dir=folder)
    trainer.fit(Blobs(), train_loader(), val_loader())
    return pruning


def reader(pruning: RouletteWheelPruning) -> dict:
    """The names that a reader of the pages has: a module, its data, imports, and `my.ckpt` in the current folder."""
    model, net, trained = Blobs(), tiny_net(), pruning.weights_at(0)
    model.load_state_dict(trained, strict=False)
    net.load_state_dict({name.removeprefix("net."): one for name, one in trained.items()})
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}, "my.ckpt")
    inputs, classes = val_loader().dataset.tensors

    def accuracy(net: nn.Module) -> float:
        return float((net(inputs).argmax(1) == classes).float().mean())

    def score(mask: Mask) -> float:  # as in docs/plain_pytorch.md
        pruned = copy.deepcopy(net)
        apply_mask(pruned, mask)
        return accuracy(pruned)

    return {
        "torch": torch,
        "nn": nn,
        "Trainer": QuickTrainer,
        "RouletteWheelPruning": RouletteWheelPruning,
        "MyModel": Blobs,
        "model": model,
        "train": train_loader(),
        "val": val_loader(100),
        "pruning": pruning,
        "net": net,
        "accuracy": accuracy,
        "score": score,
        "train_inputs": train_loader().dataset.tensors[0],
        "val_inputs": inputs,
        "val_classes": classes,
        "Wrapped": Wrapped,
        "network": TokenNet(),
        "train_tokens": tokens(train_loader()),
        "val_tokens": tokens(val_loader()),
    }
