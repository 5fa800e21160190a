"""A transformer that tells the topic of a sequence of words."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from roulette_examples.data import MadeUp

WORDS, LENGTH, TOPICS = 64, 16, 4


class Sequences(MadeUp):
    """Sequences of words. A third of the words belong to the topic of the sequence."""

    def make(self, count: int, chance: torch.Generator) -> tuple[Tensor, ...]:
        topics = torch.randint(TOPICS, (count, 1), generator=chance)
        words = torch.randint(WORDS, (count, LENGTH), generator=chance)
        of_topic = words % (WORDS // TOPICS) + topics * (WORDS // TOPICS)
        words = torch.where(torch.rand(count, LENGTH, generator=chance) < 1 / 3, of_topic, words)
        return words, topics[:, 0]


class TextClassifier(LightningModule):
    """Embeddings of words and places, two encoder layers, and a linear layer on their mean.

    Args:
        width: Width of the embeddings.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.topic = nn.Linear(width, TOPICS)
        self.val_acc = MulticlassAccuracy(TOPICS, average="micro")

    def forward(self, words: Tensor) -> Tensor:
        return self.topic(self.encoder(self.words(words) + self.places).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, topics = batch
        return cross_entropy(self(words), topics)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        words, topics = batch
        logits = self(words)
        self.val_acc(logits, topics)
        self.log_dict({"val_loss": cross_entropy(logits, topics), "val_acc": self.val_acc})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)
