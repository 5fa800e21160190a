"""An int8 model as a TensorFlow Lite file holds it: tensors, and operators that read and write them by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES = {"int8": 1, "uint8": 1, "int32": 4}


@dataclass(frozen=True)
class Scales:
    """How integers stand for real numbers: `real = scale * (integer - zero_point)`.

    Attributes:
        values: Shape `(1,)` or one scale for each index of `axis`; float32.
        zero_point: The integer that stands for 0, for all scales.
        axis: The dimension with a scale for each index.
    """

    values: NDArray[np.float32]
    zero_point: int = 0
    axis: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file.

    Attributes:
        name: Unique in the model.
        shape: Its dimensions, the batch of one included.
        kind: int8, uint8 or int32.
        data: The values of a constant; None for what an operator writes and for the input.
        scales: None where the integers are not scaled.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "int8"
    data: NDArray[Any] | None = None
    scales: Scales | None = None

    @property
    def size(self) -> int:
        """How many bytes its values take in memory."""
        return prod(self.shape) * BYTES[self.kind]


@dataclass(frozen=True)
class Operator:
    """One operator of the file.

    Attributes:
        code: Its name in the schema, as FULLY_CONNECTED, or TFLM_DECODE, which is a custom operator.
        inputs: Names of tensors.
        outputs: Names of tensors.
        options: Fields of the operator's options in the schema.
        kind: The name of the options' class in the schema without `Options`; None where it has no options.
    """

    code: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Tensors by name, operators in the order in which they run, and the names of the input and the output."""

    tensors: Mapping[str, StoredTensor]
    operators: tuple[Operator, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def with_operators(self, operators: Sequence[Operator], tensors: Sequence[StoredTensor]) -> Model:
        """This model with other operators, and with tensors added or put in the place of those of the same name."""
        known = {**self.tensors, **{tensor.name: tensor for tensor in tensors}}
        used = {name for one in operators for name in (*one.inputs, *one.outputs)} | {*self.inputs, *self.outputs}
        return replace(
            self,
            tensors={name: tensor for name, tensor in known.items() if name in used},
            operators=tuple(operators),
        )
