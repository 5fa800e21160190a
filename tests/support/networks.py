"""Small networks of many kinds in double precision, with batches of inputs and masks: the table of refit tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchmetrics import Metric

from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.parameters import prunable_parameters


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(rows: int, *shape: int, seed: int = 0) -> Tensor:
    """Rows of numbers that depend on one another, so that survivors can make up for what is pruned."""
    common = numbers(rows, *(1 for _ in shape), seed=seed + 1000)
    return numbers(rows, *shape, seed=seed) / 2 + common + 0.5


def known(module: nn.Module) -> nn.Module:
    """The module in double precision, with the same parameters and statistics at every call."""
    module.double()
    for seed, (name, one) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if one.is_floating_point():
            fan = max(1, one[0].numel()) if one.dim() else 1
            one.data = numbers(*one.shape, seed=seed + 100) / math.sqrt(fan)
            one.data = one.data.abs() + 0.5 if name.endswith("var") else one.data
    return module


def mask_of(module: nn.Module, density: float = 0.5, seed: int = 0, without: tuple[str, ...] = ()) -> Mask:
    chance = np.random.default_rng(seed)
    names = [name for name in prunable_parameters(module) if name not in without]
    return Mask({n: torch.from_numpy(chance.random(module.get_parameter(n).shape) < density) for n in names})


def changed(module: nn.Module, mask: Mask, values=None) -> nn.Module:
    """A copy of the network with other values, pruned."""
    other = deepcopy(module)
    with torch.no_grad():
        for name, value in (values or {}).items():
            dict([*other.named_parameters(), *other.named_buffers()])[name].copy_(value)
        for name, kept in mask.items():
            other.get_parameter(name).masked_fill_(~kept, 0)
    return other


def state_of(module: nn.Module):
    """All that a caller can see of a network, as bytes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    grads = {name: None if one.grad is None else one.grad.numpy().tobytes() for name, one in module.named_parameters()}
    return (
        {name: one.detach().numpy().tobytes() for name, one in tensors},
        {name: (id(one), one.data_ptr(), one.requires_grad) for name, one in tensors},
        grads,
        {name: part.training for name, part in module.named_modules()},
        {name: (len(part._forward_pre_hooks), len(part._forward_hooks)) for name, part in module.named_modules()},
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


class MetricOf(Metric):
    """A metric that has a network, as the Inception score has."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def update(self) -> None: ...

    def compute(self) -> None: ...


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.inner, self.norm = nn.Conv2d(4, 4, (3, 1), padding="same", bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + torch.relu(self.norm(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Takes queries, keys and values, and calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x, keys, values):
        return self.head(input=torch.tanh(self.look(query=x, key=keys, value=values)[0]))


class Layers(nn.Module):
    """Holds the layers given by name. A derived class calls them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Repeated(Layers):
    """Calls one layer twice and another never."""

    def __init__(self) -> None:
        super().__init__(again=nn.Linear(5, 5), last=nn.Linear(5, 3), spare=nn.Linear(5, 5))

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Either(Layers):
    """Calls another layer first on long batches."""

    def forward(self, x):
        first, second = (self.a, self.b) if len(x) > 45 else (self.b, self.a)
        return second(torch.tanh(first(x)))


class Choosy(Layers):
    """Calls one layer on long batches only."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.long(h)) if len(x) > 45 else h)


class Careful(Layers):
    """Catches every `Exception`."""

    def forward(self, x):
        try:
            return self.b(torch.tanh(self.a(x)))
        except Exception as caught:
            raise AssertionError("the network saw an exception of the refit") from caught


class Late(Layers):
    """Its first layer comes after weights that no refit looks at."""

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Recurring(Layers):
    """Reads sequences and gives a number for each time step."""

    def forward(self, x):
        return self.head(torch.tanh(self.read(x)[0]))


class Packs(Layers):
    """Reads sequences of different lengths."""

    def forward(self, x):
        lengths = torch.arange(len(x)).remainder(x.shape[1]) + 1
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.read(packed)
        return self.head(last[-1])


class Stepwise(Layers):
    """Reads sequences step by step, with the state that the step before gave, or afresh."""

    def __init__(self, carries: bool) -> None:
        super().__init__(read=nn.LSTM(4, 5), head=nn.Linear(5, 3))
        self.carries = carries

    def forward(self, x):
        outputs, state = [], None
        for one in x.unbind(1):
            output, found = self.read(one[None], state)
            state = found if self.carries else None
            outputs.append(output[0])
        return self.head(torch.stack(outputs, 1))


def recurring(kind: Callable[..., nn.Module], **options: object) -> nn.Module:
    read = kind(4, 5, num_layers=2, batch_first=True, bidirectional=True, dropout=0.5, **options)
    return Recurring(read=read, head=nn.Linear(2 * (read.proj_size or 5), 3))


def choosy() -> nn.Module:
    return Choosy(a=nn.Linear(4, 6), long=nn.Linear(6, 6), c=nn.Linear(6, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 2, groups=4, dilation=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(12, 3),
        nn.BatchNorm1d(3),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.5, batch_first=True)
    return nn.Sequential(layer, nn.Linear(6, 3))


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 12),
        nn.Unflatten(1, (6, 2)),
        nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Unflatten(2, (2, 2)),
        nn.ConvTranspose2d(4, 3, (3, 2), stride=(1, 2), dilation=2, bias=False),
    )


@dataclass(frozen=True)
class Kind:
    """How a network is made, the shapes of its arguments, the sizes of its batches, and weights left out of masks."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] = (40, 40, 40)
    without: tuple[str, ...] = ()


PLAIN = {
    "mlp": Kind(mlp, ((6,),)),
    "conv": Kind(conv, ((2, 7, 7),)),
    "decoder": Kind(decoder, ((5,),)),
    "residual": Kind(Residual, ((2, 4, 5),)),
    "encoder": Kind(encoder, ((5, 6),)),
    "attention": Kind(Attention, ((3, 6), (4, 4), (4, 5))),
}
KINDS = PLAIN | {
    "repeated": Kind(Repeated, ((5,),), without=("spare.weight",)),
    "either": Kind(lambda: Either(a=nn.Linear(4, 4), b=nn.Linear(4, 4)), ((4,),), sizes=(48, 40)),
    "choosy": Kind(choosy, ((4,),), sizes=(48, 40, 48)),
    "choosy at last": Kind(choosy, ((4,),), sizes=(40, 40, 48)),
    "careful": Kind(lambda: Careful(a=nn.Linear(4, 4), b=nn.Linear(4, 4)), ((4,),)),
    "late": Kind(lambda: Late(cell=nn.LSTMCell(5, 6), head=nn.Linear(6, 3)), ((5,),)),
    "lstm": Kind(lambda: recurring(nn.LSTM), ((6, 4),)),
    "gru": Kind(lambda: recurring(nn.GRU), ((6, 4),)),
    "packed": Kind(lambda: Packs(read=nn.LSTM(4, 5), head=nn.Linear(5, 3)), ((6, 4),)),
    "norm first": Kind(lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), ((6,),)),
}

QUICK = ("mlp", "conv", "lstm")


def slow_but_for_a_few(kind: str, *others: Any) -> Any:
    """A parameter of a test that has many cases for each kind: slow for most kinds."""
    return pytest.param(kind, *others, marks=[] if kind in QUICK else [pytest.mark.slow])


def case(kind: str, density: float = 0.5, sizes: tuple[int, ...] | None = None):
    """A network, its batches, and a mask."""
    row = KINDS[kind]
    batches = [
        tuple(related(size, *shape, seed=10 * batch + place) for place, shape in enumerate(row.shapes))
        for batch, size in enumerate(sizes or row.sizes)
    ]
    net = known(row.make())
    return net, batches if len(row.shapes) > 1 else [one for (one,) in batches], mask_of(net, density, 0, row.without)
