"""What a refit solves: the steps of a network, and the tensors that it may change."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_roulette.network.layers import Layer, batch_norms_of
from lightning_roulette.network.lending import named_tensors
from lightning_roulette.refit.traversal import Step


def steps_of(module: nn.Module, layers: Sequence[Layer]) -> list[Step]:
    """The steps of a network: of some of its layers, and of its batch normalisations."""
    together: dict[tuple[nn.Module, int], list[Layer]] = {}
    for layer in layers:
        together.setdefault((layer.module, layer.turn), []).append(layer)
    steps = []
    for (part, _), its in together.items():
        if any(layer.recurrent for layer in its):
            steps.append(Step(part, tuple(its), followed=True))
        steps.append(Step(part, tuple(its)))
    return steps + [Step(part, prefix=prefix) for prefix, part in batch_norms_of(module).items()]


def weights_of(steps: Sequence[Step]) -> list[str]:
    """The names of the weights that steps solve."""
    return [name for step in steps for layer in step.layers for name in layer.names]


def changeable(module: nn.Module, names: Sequence[str], steps: Sequence[Step]) -> dict[str, Tensor]:
    """The tensors with some names, and all that steps may change, by name."""
    own = [name for step in steps for layer in step.layers for name in layer.parameters]
    tensors = named_tensors(module)
    return {name: tensors[name] for name in dict.fromkeys([*names, *own, *statistics_of(steps)])}


def affine_of(module: nn.Module) -> dict[str, Tensor]:
    """The factors and biases of a network's batch normalisations, by name."""
    norms = batch_norms_of(module).items()
    return {f"{prefix}{own}": one for prefix, norm in norms for own, one in norm.named_parameters(recurse=False)}


def statistics_of(steps: Sequence[Step]) -> list[str]:
    """The names of the running statistics that steps compute."""
    norms = [step.prefix for step in steps if not step.layers]
    return [f"{prefix}{own}" for prefix in norms for own in ("running_mean", "running_var")]
