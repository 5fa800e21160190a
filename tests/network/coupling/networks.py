"""Small networks whose units are coupled in every way."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.networks import Layers, Residual, numbers


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.m = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.m(self.b(torch.relu(self.n(self.a(x))))))


class Joined(Layers):
    """Concatenates two convolutions, and flattens the images."""

    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(2, 6, 3), c=nn.Conv2d(10, 8, 1), d=nn.Linear(8 * 16, 3))

    def forward(self, x):
        return self.d(torch.relu(self.c(torch.relu(torch.cat([self.a(x), self.b(x)], 1)))).flatten(1))


class Gated(Layers):
    """One layer computes values and gates."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(5, 12), b=nn.Linear(6, 3))

    def forward(self, x):
        values, gates = self.a(x).chunk(2, -1)
        return self.b(values * torch.sigmoid(gates))


class Squeezed(Layers):
    """A depthwise convolution whose channels are scaled by what is computed from their means."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv2d(2, 8, 3, padding=1),
            d=nn.Conv2d(8, 16, 3, groups=8),
            n=nn.BatchNorm2d(16),
            r=nn.Conv2d(16, 4, 1),
            e=nn.Conv2d(4, 16, 1),
            b=nn.Conv2d(16, 6, 1),
            f=nn.Linear(6, 2),
        )

    def forward(self, x):
        y = nn.functional.hardswish(self.n(self.d(self.a(x))))
        scale = torch.sigmoid(self.e(torch.relu(self.r(y.mean((2, 3), keepdim=True)))))
        return self.f(self.b(y * scale).mean((2, 3)))


class Shuffled(Layers):
    """Shuffles channels, which Torch-Pruning does not see."""

    def __init__(self) -> None:
        super().__init__(a=nn.Conv2d(2, 8, 1), b=nn.Conv2d(8, 4, 1), c=nn.Linear(4, 2))

    def forward(self, x):
        y = self.a(x)
        y = y.reshape(len(y), 2, 4, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        return self.c(torch.relu(self.b(y)).mean((2, 3)))


class Hidden(Layers):
    """Reads a unit in a place that no gradient shows."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(5, 6), b=nn.Linear(6, 3))

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y) + y.detach()[:, :3]


class Own(nn.Module):
    """Attention of the shape that transformers' models have, with an empty cache of keys."""

    def __init__(self, heads: int, groups: int, packed: str = "", rotated: bool = False) -> None:
        super().__init__()
        self.packed = packed  # "queries, keys, values", or "heads"
        self.num_heads, self.head_dim, self.rotated = heads, 4, rotated
        sizes = [4 * heads, 4 * groups, 4 * groups]
        if packed:
            self.qkv = nn.Linear(8, sum(sizes))
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, size) for size in sizes)
        self.o_proj = nn.Linear(4 * heads, 8)

    def forward(self, x):
        if self.packed == "heads":
            found = (one.flatten(2) for one in self.qkv(x).unflatten(-1, (-1, 12)).chunk(3, -1))
        else:
            found = self.qkv(x).chunk(3, -1) if self.packed else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (one.unflatten(-1, (-1, 4)).transpose(1, 2) for one in found)
        cache = torch.tensor([], dtype=k.dtype)
        q, k = (turned(one) for one in (q, k)) if self.rotated else (q, torch.cat([cache, k], -2))
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        y = torch.softmax(q @ k.mT / 2, -1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Placed(Own):
    """Attention with a table of relative positions, a scale for each head, and slopes that no state dict holds."""

    def __init__(self, heads: int, groups: int, slopes: bool = False) -> None:
        super().__init__(heads, groups)
        self.table = nn.Parameter(torch.zeros(13, heads))
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.slopes = slopes
        self.register_buffer("slope", torch.linspace(1, 2, heads).view(-1, 1, 1), persistent=False)

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (-1, 4)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        places = torch.arange(7)[:, None] - torch.arange(7) + 6
        added = self.table[places].permute(2, 0, 1) + (self.slope if self.slopes else 0)
        y = torch.softmax(q @ k.mT * self.scale + added, -1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


def turned(x):
    """Queries or keys with positions, as rotary embeddings give them."""
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
    return x * torch.cos(angles) + torch.cat([-x[..., 2:], x[..., :2]], -1) * torch.sin(angles)


class Transposed(nn.Module):
    """A layer like transformers' `Conv1D`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Transposed.__name__ = "Conv1D"


def sequences(attention: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(8), attention, nn.LayerNorm(8), Transposed(16, 8), nn.GELU(), Transposed(8, 16), nn.LayerNorm(8)
    )


IMAGES, ROWS, WORDS = numbers(3, 2, 6, 6), numbers(3, 5), numbers(3, 7, 8)

# the network, an input, and the number of units of each group that may leave
NETWORKS = {
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3), Block(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)),
        IMAGES,
        {"0": 8, "1.a": 8},
    ),
    "circular": (Residual, IMAGES, {"first": 4}),
    "joined": (Joined, IMAGES, {"a": 4, "b": 6, "c": 8}),
    "gated": (Gated, ROWS, {"a": 6}),
    "squeezed": (Squeezed, IMAGES, {"a": 8, "r": 4, "b": 6}),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=4), nn.PReLU(12), nn.Conv2d(12, 3, 1)
        ),
        IMAGES,
        {"0": 2, "2": 3},
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ),
        IMAGES,
        {"0": 4, "2": 3},
    ),
    "embedded": (
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        torch.arange(9).reshape(3, 3),
        {"0": 6, "1": 8},
    ),
    "torch's attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        WORDS,
        {"linear1": 16, "self_attn": 2},
    ),
    "own attention": (lambda: sequences(Own(4, 4)), WORDS, {"3": 16, "1": 4}),
    "packed attention": (lambda: sequences(Own(4, 4, packed="queries, keys, values")), WORDS, {"3": 16, "1": 4}),
    "attention packed by heads": (lambda: sequences(Own(4, 4, packed="heads")), WORDS, {"3": 16, "1": 4}),
    "relative positions": (lambda: sequences(Placed(6, 3)), WORDS, {"3": 16, "1": 3}),
    "grouped queries": (lambda: sequences(Own(4, 2, rotated=True)), WORDS, {"3": 16, "1": 2}),
}
