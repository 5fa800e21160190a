"""The graph of a network in evaluation mode, as `torch.export` gives it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from lightning_roulette.network.modes import evaluating


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph and the constants that its nodes name.

    Attributes:
        nodes: All nodes in their order.
        constants: Parameters, buffers and other tensors of the network, on the CPU, by the name of their node.
        names: Their names in the network, by the name of their node.
        rows: Size of the batch with which the graph was made.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    names: Mapping[str, str]
    rows: int


def captured(module: nn.Module, example: Tensor) -> Captured:
    """Return the graph of a network in evaluation mode.

    Args:
        module: The network. Its modes are afterwards as they were.
        example: Inputs, shape `(n, ...)`. The graph is made with two rows, so that no other size is taken for theirs.

    Raises:
        ValueError: If `torch.export` cannot make a graph.
    """
    rows = torch.cat((example[:1], example[-1:]))
    with evaluating(module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outputs of the program are compared with those of the network
        try:
            exported = torch.export.export(module, (rows,), strict=False)
        except Exception as error:
            raise ValueError(
                f"model is a {type(module).__name__} of which torch.export cannot make a graph: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''} "
                "Its forward must take one tensor, and must not branch on values. Export a submodule for which "
                "this holds."
            ) from error
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    tensors = {**exported.constants, **exported.state_dict}
    constants = {node: tensors[name].detach().cpu() for node, name in names.items()}
    return Captured(tuple(exported.graph.nodes), constants, names, len(rows))
