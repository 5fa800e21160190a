"""The program while it is made, node by node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lightning_roulette.slim.export.graph.captured import Captured
from lightning_roulette.slim.export.operations import Final, Operation, Reshape, Value


@dataclass(frozen=True, eq=False)
class Normalise:
    """`input * scale + shift` for each channel. It is an operation only until it is folded.

    Attributes:
        input: Shape `(channels, ...)`.
        output: Likewise.
        name: Name of the tensor that scales, or of the operation.
        scale: Shape `(channels,)`, float64.
        shift: Likewise.
    """

    input: Value
    output: Value
    name: str
    scale: Tensor
    shift: Tensor


class Refused(Exception):
    """An operation of the graph has no counterpart. The text says what about it."""


@dataclass(frozen=True)
class Seen:
    """A node's result: a value of the program, and the shape that the network sees, without the batch.

    The two shapes differ where the network reshapes: the elements and their order are the same.
    """

    value: Value
    shape: tuple[int, ...]


@dataclass(eq=False)
class Builder:
    """Operations so far, and what each node stands for.

    Attributes:
        graph: The graph that is translated.
        input: What the network is given.
        operations: The operations so far.
        seen: The results of nodes that depend on the input.
        constants: The values of nodes that do not.
        names: Names in the network of constants and of what is computed from one.
        refused: One line for each operation that has no counterpart.
        final: The function that the network applies to its output last.
    """

    graph: Captured
    input: Value
    operations: list[Operation | Normalise] = field(default_factory=list)
    seen: dict[Node, Seen] = field(default_factory=dict)
    constants: dict[Node, Any] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    final: Final | None = None
    _taken: set[str] = field(default_factory=set)

    def new(self, name: str, shape: tuple[int, ...]) -> Value:
        """Return a value with a name that is not taken yet."""
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return Value(unique, shape)

    def add(self, node: Node, operation: Operation | Normalise) -> None:
        """Add an operation that computes a node."""
        self.operations.append(operation)
        self.seen[node] = Seen(operation.output, shape_of(node))

    def given(self, node: Any) -> Seen:
        """Return what a node stands for.

        Raises:
            Refused: If it is not computed from the network's input, or is not a tensor.
        """
        if not isinstance(node, Node) or node not in self.seen:
            raise Refused("with a constant where an input is expected")
        return self.seen[node]

    def as_shape(self, node: Any, shape: tuple[int, ...]) -> Value:
        """Return the value of a node in another shape of the same elements."""
        value = self.given(node).value
        if value.shape == shape:
            return value
        reshaped = Reshape(value, self.new(f"{value.name}_reshaped", shape))
        self.operations.append(reshaped)
        return reshaped.output

    def as_image(self, node: Any) -> Value:
        """Return the value of a node of shape `(channels, height, width)` or `(channels, length)` as an image."""
        shape = self.given(node).shape
        if len(shape) not in (2, 3):
            raise Refused(f"on a tensor of shape (n, {', '.join(map(str, shape))})")
        return self.as_shape(node, shape if len(shape) == 3 else (shape[0], 1, shape[1]))

    def constant(self, node: Any) -> Tensor | None:
        """Return a weight in float64; None if there is none.

        Raises:
            Refused: If it depends on the network's input.
        """
        if node is None:
            return None
        if isinstance(node, (int, float)):
            return torch.tensor(float(node), dtype=torch.float64)
        if node not in self.constants:
            raise Refused("with weights that depend on the input")
        found = self.constants[node]
        assert isinstance(found, Tensor)
        return found.to(torch.float64)


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape that the network sees at a node, without the batch."""
    return tuple(int(size) for size in node.meta["val"].shape[1:])


def path_of(node: Node) -> str:
    """Return the name of the module in which a node is computed; empty if it is the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
