"""Every size limit of the package in one frozen object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """How much stays in memory, and how much is processed at a time.

    Only `gram_rows` can change a result, because floating-point sums depend on how they are grouped.

    Attributes:
        unpacked_entries: Masks of tensors with at most this many entries are bool tensors. Larger ones are packed.
        masked_entries: Entries of a larger tensor that are masked at a time.
        packed_entries: Entries that are packed or unpacked at a time; a multiple of 8.
        copied_bytes: Copies of weights up to this size stay in memory. Larger ones go to a temporary file.
        written_entries: Entries that are written to that file at a time.
        held_weights: Networks with at most this many weights keep the importance and the key terms of each weight.
            Larger ones compute them again when they are needed.
        joint_weights: Parameters with at most this many weights in all are drawn as one tensor.
        compared_keys: Wheels with at most this many survivors compare all keys with one another.
        block_keys: Keys that are computed at a time on the CPU. A block of them fits into the processor's cache.
        block_keys_off_cpu: Keys that are computed at a time on other devices.
        branch_mask_bytes: Masks of one branch that are kept. The others are drawn again.
        gram_rows: Rows whose products are summed together.
        system_bytes: Linear systems that are solved together.
        waiting_threads: Threads of calibration runs that wait, with the threads that compute for each of them.
        recorded_bytes: Arguments of metric updates that are recorded. If there are more, none are recorded.
        calibration_bytes: Calibration batches that are kept. At least one batch is kept.
        joined_bytes: Calibration batches that are joined into one.
        sampled_indices: Indices that are read from a sampler without a length.
    """

    unpacked_entries: int = 1 << 20
    masked_entries: int = 1 << 20
    packed_entries: int = 1 << 20
    copied_bytes: int = 1 << 30
    written_entries: int = 1 << 22
    held_weights: int = 1 << 24
    joint_weights: int = 1 << 20
    compared_keys: int = 1 << 12
    block_keys: int = 1 << 16
    block_keys_off_cpu: int = 1 << 22
    branch_mask_bytes: int = 1 << 24
    gram_rows: int = 1 << 8
    system_bytes: int = 1 << 26
    waiting_threads: int = 1 << 10
    recorded_bytes: int = 1 << 30
    calibration_bytes: int = 1 << 28
    joined_bytes: int = 1 << 25
    sampled_indices: int = 1 << 20


_current = Limits()


def limits() -> Limits:
    """The limits in force."""
    return _current


def are_few(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors have at most `limits().held_weights` entries in all, so that all can be set aside at once."""
    return sum(one.numel() for one in tensors) <= _current.held_weights


@contextmanager
def limited(**fields: int) -> Iterator[Limits]:
    """Use other limits inside the block.

    Args:
        fields: Names and new values of fields of `Limits`.
    """
    global _current
    before, _current = _current, replace(_current, **fields)
    try:
        yield _current
    finally:
        _current = before
