"""Operations that disappear into others: batch normalisations, activations, paddings, and what nothing uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from lightning_roulette.slim.export.graph.builder import Normalise
from lightning_roulette.slim.export.operations import (
    Activate,
    Add,
    Conv2d,
    Linear,
    Operation,
    Pad,
    Pool2d,
    Reshape,
    Value,
    inputs_of,
)

Step: TypeAlias = Operation | Normalise


def folded(steps: Sequence[Step], output: Value) -> tuple[Operation, ...]:
    """Return the operations that compute `output`, with as few of them as possible.

    A normalisation is folded into the layer before it, and an activation into the layer or the sum before it, if
    nothing else uses what lies between. A padding is folded into the convolutions after it. A normalisation that
    follows no layer becomes a depthwise convolution. Weights that are zero stay zero.
    """
    folds = (_activations_before_pools, _into_the_step_before, _alone, _into_the_step_before, _paddings)
    steps = used(steps, output)
    for fold in folds:
        steps = used(fold(steps, output), output)
    return tuple(_final(step) for step in steps)


def used(steps: Sequence[Step], output: Value) -> list[Step]:
    """Return the operations on which `output` depends."""
    needed, kept = {output.name}, []
    for step in reversed(steps):
        if step.output.name in needed:
            needed |= {value.name for value in _inputs(step)}
            kept.append(step)
    return kept[::-1]


def _activations_before_pools(steps: Sequence[Step], output: Value) -> list[Step]:
    """Put an activation that follows a max pooling before it. The results are equal, as both keep the order."""
    uses, done = _uses(steps, output), {step.output.name: step for step in steps}
    for step in steps:
        pool = done.get(step.input.name) if isinstance(step, Activate) else None
        if (
            isinstance(step, Activate)
            and isinstance(pool, Pool2d)
            and pool.kind == "max"
            and uses[pool.output.name] == 1
        ):
            between = Value(f"{pool.output.name}_before", pool.input.shape)
            done[pool.output.name] = replace(step, input=pool.input, output=between)
            done[step.output.name] = replace(pool, input=between, output=step.output)
    return list(done.values())


def _into_the_step_before(steps: Sequence[Step], output: Value) -> list[Step]:
    """Fold normalisations and activations."""
    uses = _uses(steps, output)
    done: dict[str, Step] = {}
    for step in steps:
        before = done.get(step.input.name) if isinstance(step, (Normalise, Activate)) else None
        together = None if before is None or uses[before.output.name] != 1 else _together(before, step)
        if before is not None and together is not None:
            del done[before.output.name]
        done[step.output.name] = together or step
    return list(done.values())


def _together(before: Step, step: Step) -> Step | None:
    """Return one operation for two, or None if there is none."""
    if isinstance(step, Normalise) and isinstance(before, Normalise):
        shift = before.shift * step.scale + step.shift
        return replace(step, input=before.input, scale=before.scale * step.scale, shift=shift)
    if isinstance(before, (Linear, Conv2d)) and before.activation == "none" and isinstance(step, Normalise):
        scale = step.scale.reshape(-1, *[1] * (before.weight.ndim - 1))
        weight, bias = before.weight * scale, before.bias * step.scale + step.shift
        return replace(before, output=step.output, weight=weight, bias=bias)
    if isinstance(before, (Linear, Conv2d, Add)) and before.activation == "none" and isinstance(step, Activate):
        return replace(before, output=step.output, activation=step.activation)
    return None


def _paddings(steps: Sequence[Step], output: Value) -> list[Step]:
    """Fold each padding into the convolutions that use it. What else uses it keeps it."""
    pads = {step.output.name: step for step in steps if isinstance(step, Pad)}
    return [
        replace(step, input=pads[step.input.name].input, padding=_sum(step.padding, pads[step.input.name].padding))
        if isinstance(step, Conv2d) and step.input.name in pads
        else step
        for step in steps
    ]


def _alone(steps: Sequence[Step], output: Value) -> list[Step]:
    """Make each normalisation that follows no layer a depthwise convolution."""
    return [one for step in steps for one in (_as_conv(step) if isinstance(step, Normalise) else [step])]


def _as_conv(step: Normalise) -> list[Step]:
    channels = step.input.shape[0]
    weight = step.scale.reshape(-1, 1, 1, 1)
    if len(step.input.shape) == 3:
        return [Conv2d(step.input, step.output, step.name, weight, step.shift, groups=channels)]
    image, scaled = (
        Value(f"{one.name}_as_image", (channels, 1, one.size // channels)) for one in (step.input, step.output)
    )
    conv = Conv2d(image, scaled, step.name, weight, step.shift, groups=channels)
    return [Reshape(step.input, image), conv, Reshape(scaled, step.output)]


def _final(step: Step) -> Operation:
    """Return an operation with float32 weights."""
    assert not isinstance(step, Normalise)
    if isinstance(step, (Linear, Conv2d)):
        weight, bias = step.weight.contiguous().to(torch.float32), step.bias.contiguous().to(torch.float32)
        return replace(step, weight=weight, bias=bias)
    return step


def _uses(steps: Sequence[Step], output: Value) -> Counter[str]:
    """Return how often each value is used."""
    return Counter([output.name, *(value.name for step in steps for value in _inputs(step))])


def _inputs(step: Step) -> tuple[Value, ...]:
    return (step.input,) if isinstance(step, Normalise) else inputs_of(step)


def _sum(first: Any, second: Any) -> Any:
    return tuple(one + other for one, other in zip(first, second, strict=True))
