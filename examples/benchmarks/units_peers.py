"""The peers of `units.py`: Torch-Pruning, and the magnitude within groups of four.

Torch-Pruning removes units by a rule that is given a share of the units, not of the multiply-adds. The share is found
by bisection. It knows no `Conv1D` of transformers, so it is given a GPT-2 whose layers of this class are linear ones.
It cannot follow the division of one projection into queries, keys and values, so the heads of a GPT-2 stay.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn
from units_cases import Case, loss

from lightning_roulette.network.modes import evaluating
from lightning_roulette.network.multiply_adds import multiply_adds

__all__ = ["PEERS", "CannotError", "Peer", "adds_of", "to_adds", "to_floor"]

Gradients = dict[str, Tensor]
HALVINGS = 10
PROJECTIONS, PACKED = ("q_proj", "k_proj", "v_proj"), "c_attn"  # of the attentions of transformers


class CannotError(Exception):
    """A peer cannot prune a network. The message says why."""


@dataclass(frozen=True)
class Peer:
    """A rule of Torch-Pruning.

    Attributes:
        importance: Makes the measure of importance.
        everywhere: Whether units of all layers compete. Otherwise each layer loses the same share.
        gradients: Whether the measure needs gradients of the loss.
    """

    importance: Callable[[], object]
    everywhere: bool
    gradients: bool = False


PEERS = {
    "Torch-Pruning, magnitude": Peer(tp.importance.MagnitudeImportance, False),
    "Torch-Pruning, magnitude, all layers": Peer(tp.importance.MagnitudeImportance, True),
    "Torch-Pruning, Taylor": Peer(tp.importance.TaylorImportance, False, True),
    "Torch-Pruning, Taylor, all layers": Peer(tp.importance.TaylorImportance, True, True),
}


def adds_of(network: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of a network for one input, counting the weights that are not zero."""
    with evaluating(network), torch.no_grad():
        return multiply_adds(network, lambda: network(example[:1])).effective


def removed(case: Case, peer: Peer, share: float, gradients: Gradients) -> nn.Module:
    """Return the network without a share of its units.

    Args:
        case: The network and its data.
        peer: Which units are removed.
        share: Their share, in (0, 1).
        gradients: Those of the parameters that the peer needs.
    """
    network = deepcopy(case.network)
    for name, parameter in network.named_parameters():
        parameter.grad = gradients.get(name)
    make_linear(network)
    heads = {getattr(one, name): one.num_attention_heads for one in attentions(network) for name in PROJECTIONS}
    packed = [getattr(one, PACKED) for one in network.modules() if hasattr(one, PACKED)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of layers
        pruner = tp.pruner.BasePruner(
            network,
            case.example[:1],
            peer.importance(),
            global_pruning=peer.everywhere,
            pruning_ratio=share,
            max_pruning_ratio=0.95,
            ignored_layers=[network.get_submodule(case.head), *packed],
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
            head_pruning_ratio=share if heads else 0.0,
        )
    pruner.step()
    network.zero_grad(set_to_none=True)
    return network.eval()


def to_adds(case: Case, peer: Peer, reduction: float, seed: int) -> nn.Module:
    """Return the network without as few units as save a share of the multiply-adds.

    Raises:
        CannotError: If the peer finds no such network.
    """
    dense = adds_of(case.network, case.example)
    found = bisected(case, peer, seed, lambda network: adds_of(network, case.example) > (1 - reduction) * dense)
    if found.above is None:
        raise CannotError(found.failure or f"more than {1 - reduction:.0%} of the multiply-adds stay")
    return found.above


def to_floor(case: Case, peer: Peer, tolerance: float, seed: int) -> nn.Module:
    """Return the network without as many units as the score on the choosing part allows, in points.

    Raises:
        CannotError: If the peer fails, and finds no such network.
    """
    floor = case.score(case.network, case.choosing) - tolerance
    found = bisected(case, peer, seed, lambda network: case.score(network, case.choosing) >= floor)
    if found.below is None and found.failure:
        raise CannotError(found.failure)
    return found.below or case.network


@dataclass
class Bisected:
    """What a bisection over the share of units has found.

    Attributes:
        below: The last network of which more may be removed.
        above: The last network of which no more may be removed.
        failure: The last error of the peer, or of a network that it had cut.
    """

    below: nn.Module | None = None
    above: nn.Module | None = None
    failure: str | None = None


def bisected(case: Case, peer: Peer, seed: int, more: Callable[[nn.Module], bool]) -> Bisected:
    """Return what is found. After an error a smaller share is tried."""
    low, high, found = 0.0, 1.0, Bisected()
    gradients = gradients_of(case, seed) if peer.gradients else {}
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        network, goes_on = None, False
        try:
            cut = removed(case, peer, middle, gradients)
            if is_whole(cut):
                goes_on, network = more(cut), cut
        except Exception as error:
            found.failure = f"{type(error).__name__}, {str(error).splitlines()[0]}"
        if goes_on:
            low, found.below = middle, network
        else:
            high, found.above = middle, network or found.above
    return found


def is_whole(network: nn.Module) -> bool:
    """Return whether no layer has lost all its units."""
    return all(one.numel() > 0 for one in network.parameters())


def attentions(network: nn.Module) -> list[nn.Module]:
    """Return the attentions of transformers' vision models. They compute the number of heads from the projections."""
    return [one for one in network.modules() if all(hasattr(one, name) for name in PROJECTIONS)]


def make_linear(network: nn.Module) -> None:
    """Put a linear layer in the place of each `Conv1D` of transformers, with its gradients."""
    for name, part in list(network.named_modules()):
        if type(part).__name__ == "Conv1D":
            layer = nn.Linear(part.nx, part.nf)
            layer.weight.data, layer.bias.data = part.weight.detach().T.contiguous(), part.bias.detach()
            if part.weight.grad is not None:
                layer.weight.grad, layer.bias.grad = part.weight.grad.T.contiguous(), part.bias.grad
            network.set_submodule(name, layer)


def gradients_of(case: Case, seed: int) -> Gradients:
    """Return the gradients of the loss on labelled inputs that a seed draws."""
    network, split = deepcopy(case.network), case.calibration(seed)
    for x, y in zip(split[0].split(500), split[1].split(500), strict=True):
        loss(network(x), y).backward()
    return {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
