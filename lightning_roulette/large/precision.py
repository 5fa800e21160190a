"""Full precision of float32 matrix products, whatever is allowed for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FULL = ("none", "ieee")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute products of float32 matrices in float32 inside the block.

    Autocast is off for the device. The TF32 and bfloat16 kernels that `torch.set_float32_matmul_precision` and
    `fp32_precision` allow are not used. At the end of the block, all are as before.

    Args:
        device: The device of the matrices.
    """
    with torch.autocast(device.type, enabled=False), _full_products():
        yield


@contextmanager
def _full_products() -> Iterator[None]:
    backends = [part for part in _backends() if hasattr(part, "fp32_precision")]  # since torch 2.9
    before = [part.fp32_precision for part in backends]
    legacy = _legacy_precision()
    if legacy == "highest" and all(precision in _FULL for precision in before):
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for part, precision in zip(backends, before, strict=True):
            part.fp32_precision = precision


def _backends() -> list[object]:
    found = (getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn))
    return [part for part in found if part is not None]


def _legacy_precision() -> str:
    """Return what `torch.set_float32_matmul_precision` set, which torch does not tell beside `fp32_precision`."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # only fp32_precision is in use
        return "highest"
