"""Prune models of transformers, and save them so that `from_pretrained` loads them with their zeros.

The two models are small and made from configurations, so that nothing is downloaded. For a model of your own, write
`from_pretrained("name or folder")` instead of `from_config(...)`.
"""

import logging
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config
from transformers import PreTrainedModel as Model

from lightning_roulette import LeastSquares, RouletteWheelPruning, Tree, prunable_parameters, prune, sparsity

WORDS, LENGTH, CLASSES = 64, 16, 4

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Classifier(LightningModule):
    """A sequence classifier of transformers. A batch is a dict, as tokenizers and data collators return it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.val_acc = MulticlassAccuracy(model.config.num_labels, average="micro")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self.model(**batch)
        self.val_acc(output.logits, batch["labels"])
        self.log_dict({"val_loss": output.loss, "val_acc": self.val_acc}, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class LanguageModel(LightningModule):
    """A causal language model of transformers. Its validation metric is the loss."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def topics(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return sequences of words. Half of the words belong to the topic of the sequence, which is its label."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count, 1), generator=chance)
    words = torch.randint(WORDS, (count, LENGTH), generator=chance)
    of_topic = words % (WORDS // CLASSES) + labels * (WORDS // CLASSES)
    words = torch.where(torch.rand(count, LENGTH, generator=chance) < 0.5, of_topic, words)
    return [{"input_ids": one, "labels": label} for one, label in zip(words, labels[:, 0], strict=True)]


def chains(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return sequences of words in which a word determines the next one, with a probability of 0.9."""
    chance = torch.Generator().manual_seed(seed)
    after = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))
    words = torch.randint(WORDS, (count, LENGTH), generator=chance)
    follows = torch.rand(count, LENGTH, generator=chance) < 0.9
    for i in range(1, LENGTH):
        words[:, i] = torch.where(follows[:, i], after[words[:, i - 1]], words[:, i])
    return [{"input_ids": one, "labels": one} for one in words]


def trained_and_pruned(module: LightningModule, train: list, val: list, epochs: int, path: str) -> RouletteWheelPruning:
    """Train a module, save a checkpoint, and prune the checkpoint."""
    train_loader, val_loader = DataLoader(train, batch_size=50, shuffle=True), DataLoader(val, batch_size=100)
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", enable_progress_bar=sys.stdout.isatty(), **options)
    trainer.fit(module, train_loader, val_loader)
    trainer.save_checkpoint(path)
    return prune(
        trainer,
        module,
        train_loader,
        val_loader,
        ckpt_path=path,
        tolerance=0.03,
        target_sparsity=0.7,
        branches=3,
        refit=LeastSquares(batches=2),
        tree=Tree(pruning_rate=0.25),
    )


def show(name: str, pruning: RouletteWheelPruning, loaded: Model) -> None:
    kept = sparsity(prunable_parameters(loaded))
    print(f"\n{name}: {pruning.report}\nafter from_pretrained: sparsity {kept:.2%}")


def main(folder: str = "runs/huggingface") -> tuple[Model, Model]:
    """Prune two models, save them in a folder, and return them."""
    torch.set_num_threads(1)  # more threads are slower for tensors this small
    seed_everything(0, verbose=False)
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": WORDS}

    bert = BertConfig(**small, intermediate_size=64, num_labels=CLASSES, max_position_embeddings=LENGTH)
    classifier = AutoModelForSequenceClassification.from_config(bert)
    module, path = Classifier(classifier), f"{folder}/classifier.ckpt"
    pruning = trained_and_pruned(module, topics(800, 1), topics(300, 2), 3, path)
    classifier.save_pretrained(f"{folder}/classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(f"{folder}/classifier")
    show("classifier", pruning, loaded)

    gpt2 = GPT2Config(**small, n_positions=LENGTH, bos_token_id=0, eos_token_id=0)
    language_model = AutoModelForCausalLM.from_config(gpt2)
    pruning = trained_and_pruned(
        LanguageModel(language_model), chains(800, 1), chains(300, 2), 4, f"{folder}/language_model.ckpt"
    )
    language_model.save_pretrained(f"{folder}/language_model")
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/language_model")
    show("language model", pruning, loaded)
    return classifier, language_model


if __name__ == "__main__":
    main()
