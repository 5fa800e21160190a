"""Devices that do not support every type."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Placed(Protocol):
    """Something with a device."""

    @property
    def device(self) -> torch.device:
        """The device."""
        ...


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor on its own device, or on the CPU if that device (Apple's MPS) has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def device_for_bits(placed: Placed) -> torch.device:
    """The device that holds packed bits of a tensor: its own, or the CPU instead of Apple's MPS.

    The integer operations of MPS differ from those of the CPU.
    """
    return torch.device("cpu") if placed.device.type == "mps" else placed.device
