"""Devices that lack a type."""

from __future__ import annotations

from torch import Tensor


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor on its own device, or on the CPU where that device (Apple's MPS) has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
