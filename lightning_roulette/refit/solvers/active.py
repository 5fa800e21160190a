"""Outputs of an iteration that are not solved yet: one row of each tensor for each output."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Rows = TypeVar("Rows", bound="DataclassInstance")


def rows_of(of: Rows, left: Tensor) -> Rows:
    """Return some rows of all fields of a dataclass of tensors.

    Args:
        of: The dataclass.
        left: Bool, shape `(rows,)`.
    """
    return replace(of, **{one.name: getattr(of, one.name)[left] for one in fields(of)})


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the products of rows, shape `(rows,)`."""
    return (one.unsqueeze(1) @ other.unsqueeze(2)).flatten()
