"""A network becomes a program, or an error that names all that stands in the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.coupling.check import is_within
from lightning_roulette.network.modes import evaluating
from lightning_roulette.slim.export.graph.builder import Builder
from lightning_roulette.slim.export.graph.captured import captured
from lightning_roulette.slim.export.graph.folded import folded
from lightning_roulette.slim.export.graph.translated import translated
from lightning_roulette.slim.export.operations import Program, Reshape
from lightning_roulette.slim.export.reference import finish, run

_CLOSE = 1e-5  # allowed difference from the network, relative to its largest output and to one
_SUPPORTED = (
    "Linear, Conv1d, Conv2d (with groups, stride, padding and dilation), BatchNorm, ReLU, ReLU6, max and average "
    "pooling, means over images, zero padding, sums, reshapes that keep the batch, dropout, and constants that are "
    "added or multiplied, one for each channel; softmax, log_softmax or sigmoid at the end"
)


def trace(model: nn.Module, example_input: Tensor) -> Program:
    """Return a network in evaluation mode as a program.

    Batch normalisations and activations are folded, dropout is gone. A softmax, log_softmax or sigmoid at the end is
    left out and named in `Program.final`. The program is run on the example and on random inputs of the same mean and
    spread: it must give the outputs of the network.

    Args:
        model: The network. Its forward takes one tensor and returns one. It is not changed.
        example_input: Inputs of any number, shape `(n, ...)`, float32, on the device of the network.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: In one of these cases:

            - `torch.export` cannot make a graph of the network.
            - A layer or the input has no entries.
            - The network returns anything but one tensor with the batch as its first dimension.
            - An operation has no counterpart. All of them are named.
            - The outputs of the program differ from those of the network by more than 1e-5, relative to the larger of
              one and the largest output.
    """
    _check_arguments(model, example_input)
    graph = captured(model, example_input)
    build = translated(graph, "input")
    returned = graph.nodes[-1].args[0]
    if not isinstance(returned, (tuple, list)) or len(returned) != 1 or returned[0] not in build.seen:
        raise ValueError(
            f"model is a {type(model).__name__} that returns {_described(returned)}, but must return one tensor "
            "computed from its input. Wrap it in a module that returns the one that the device needs."
        )
    if build.refused:
        raise ValueError(_refusal(model, build.refused))
    program = _program(build, returned[0])
    _check_not_empty(program)
    for inputs in (example_input, _random_like(example_input)):
        _check_equal(program, model, inputs)
    return program


def _program(build: Builder, returned: Any) -> Program:
    end = build.seen[returned]
    steps, output = list(build.operations), end.value
    if end.shape != output.shape:
        steps.append(Reshape(output, build.new("output", end.shape)))
        output = steps[-1].output
    return Program(build.input, folded(steps, output), output, build.final)


def _check_arguments(model: Any, example_input: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, but must be a torch.nn.Module.")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input is a {type(example_input).__name__}, but must be one tensor of inputs.")
    if example_input.dtype != torch.float32 or example_input.ndim < 2 or not len(example_input):
        raise ValueError(
            f"example_input has the type {example_input.dtype} and the shape {tuple(example_input.shape)}, but must be "
            "float32 and have at least one row, as in (n, features) or (n, channels, height, width)."
        )
    if not bool(example_input.isfinite().all()):
        raise ValueError("example_input has entries that are not finite. Give inputs as in validation.")


def _check_not_empty(program: Program) -> None:
    empty = [name for name, value in program.values.items() if not value.size]
    if empty:
        raise ValueError(
            f"model has values without entries ({', '.join(empty)}), which a device cannot compute. Remove layers "
            "without inputs or outputs."
        )


def _refusal(model: nn.Module, refused: list[str]) -> str:
    listed = "".join(f"\n- {one}" for one in dict.fromkeys(refused))
    return (
        f"model is a {type(model).__name__} with operations that an export does not know:{listed}\n"
        f"An export knows {_SUPPORTED}. Replace the others before training, or export the part of the network that "
        "has none of them."
    )


def _described(returned: Any) -> str:
    return f"{len(returned)} results" if isinstance(returned, (tuple, list)) else f"a {type(returned).__name__}"


def _random_like(example: Tensor) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn(example.shape, generator=chance).to(example.device)
    return example.mean() + max(float(example.std(correction=0)), 1e-3) * noise


def _check_equal(program: Program, model: nn.Module, inputs: Tensor) -> None:
    with evaluating(model), torch.no_grad():
        expected = model(inputs.clone())
    if isinstance(expected, Mapping):
        expected = list(expected.values())
    expected = (expected[0] if isinstance(expected, (tuple, list)) else expected).cpu()
    found = finish(run(program, inputs.cpu()), program.final)
    if expected.shape != found.shape:
        raise ValueError(f"model returns the shape {tuple(expected.shape)}, but its graph {tuple(found.shape)}.")
    if not bool(expected.isfinite().all()):
        raise ValueError(
            "model returns numbers that are not finite, for example_input or for random inputs of the same mean and "
            "spread. Check its weights."
        )
    if not is_within(expected, found, _CLOSE, 1.0):
        difference, largest = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
        raise ValueError(
            f"model and the program made of it differ by {difference:.2g} where the largest output is {largest:.2g}, "
            f"but may differ by {_CLOSE:g} of it. A forward that depends on the values of its input, or on chance, "
            "cannot be exported."
        )
