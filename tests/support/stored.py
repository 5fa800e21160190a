"""Models as a TensorFlow Lite file holds them, of pruned layers with random weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lightning_roulette.slim.export.tflm.model import Model, Operator, Scales, StoredTensor


def chain(*widths: int, sparsity: float = 0.9, seed: int = 0) -> Model:
    """Fully connected layers of these widths, with a scale for each output and ReLU."""
    random = np.random.default_rng(seed)
    tensors = [vector("v0", widths[0], random)]
    operators = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        constants = layer(f"w{number}", (outputs, inputs), sparsity, random)
        tensors += [*constants, vector(f"v{number + 1}", outputs, random)]
        reads = (f"v{number}", *(tensor.name for tensor in constants))
        options = {"fusedActivationFunction": 1}
        operators.append(Operator("FULLY_CONNECTED", reads, (f"v{number + 1}",), "FullyConnected", options))
    last = f"v{len(widths) - 1}"
    return Model({tensor.name: tensor for tensor in tensors}, tuple(operators), ("v0",), (last,))


def sums(count: int) -> Model:
    """A value that is added to itself again and again."""
    random = np.random.default_rng(0)
    tensors = {f"v{number}": vector(f"v{number}", 3, random) for number in range(count + 1)}
    steps = [Operator("ADD", (f"v{at}", f"v{at}"), (f"v{at + 1}",), "Add") for at in range(count)]
    return Model(tensors, tuple(steps), ("v0",), (f"v{count}",))


def image(outputs: int, channels: int, size: int, sparsity: float = 0.9, seed: int = 0) -> Model:
    """One convolution of 3 x 3 with padding SAME."""
    random = np.random.default_rng(seed)
    constants = layer("w", (outputs, 3, 3, channels), sparsity, random)
    tensors = [
        StoredTensor("x", (1, size, size, channels), scales=scale(random)),
        *constants,
        StoredTensor("y", (1, size, size, outputs), scales=scale(random)),
    ]
    options = {"strideH": 1, "strideW": 1}
    one = Operator("CONV_2D", ("x", *(tensor.name for tensor in constants)), ("y",), "Conv2D", options)
    return Model({tensor.name: tensor for tensor in tensors}, (one,), ("x",), ("y",))


def layer(name: str, shape: tuple[int, ...], sparsity: float, random: np.random.Generator) -> list[StoredTensor]:
    """A weight, of which at least one value is not zero, and a bias."""
    weight = random.integers(-127, 128, shape, dtype=np.int8)
    weight[random.random(shape) < sparsity] = 0
    weight.flat[0] = 1
    scales = Scales((random.uniform(0.5, 1, shape[0]) / 128).astype(np.float32))
    bias = random.integers(-999, 1000, shape[0], dtype=np.int32)
    return [
        StoredTensor(name, shape, data=weight, scales=scales),
        StoredTensor(f"{name}:bias", bias.shape, "int32", bias),
    ]


def vector(name: str, width: int, random: np.random.Generator) -> StoredTensor:
    """A computed vector."""
    return StoredTensor(name, (1, width), scales=scale(random))


def scale(random: np.random.Generator) -> Scales:
    """A scale of a computed value."""
    return Scales(random.uniform(0.02, 0.03, 1).astype(np.float32), int(random.integers(-20, 20)))


def integers(model: Model, count: int, seed: int = 1) -> list[np.ndarray]:
    """Inputs of a model."""
    random = np.random.default_rng(seed)
    shape = model.tensors[model.inputs[0]].shape
    return [random.integers(-128, 128, shape, dtype=np.int8) for _ in range(count)]
