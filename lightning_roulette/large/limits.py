"""Every size limit of the package in one frozen object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """How much is kept in memory, and how much is worked on at a time.

    None of them changes a result, except `gram_rows`: floating-point sums depend on how they are grouped.

    Attributes:
        unpacked_entries: Masks of tensors with at most this many entries stay bool tensors. Larger ones are packed.
        masked_entries: Entries of a larger tensor that are masked at a time.
        packed_entries: Entries that are packed or unpacked at a time; a multiple of 8.
        copied_bytes: Copies of weights up to this size stay in memory. Larger ones go to a temporary file.
        written_entries: Entries that are written to that file at a time.
        held_weights: Networks with at most this many weights have importance and terms of keys held for each weight.
            For larger ones they are made again when needed.
        joint_weights: Parameters with at most this many weights in all are drawn as one tensor.
        compared_keys: Wheels with at most this many survivors compare all keys with one another.
        block_keys: Keys that are made at a time on the CPU, so that a block stays in the processor's cache.
        block_keys_off_cpu: Keys that are made at a time on other devices.
        branch_mask_bytes: Masks of one branch that are kept; the others are drawn again.
        gram_rows: Rows whose products are summed together.
        system_bytes: Linear systems that are solved together.
        dense_output_bytes: Outputs of the dense network that a refit keeps; the others are computed again.
        recorded_bytes: Arguments of metric updates that are recorded. If there are more, none are.
        calibration_bytes: Calibration batches that are kept; at least one is.
        joined_bytes: Calibration batches that are joined into one.
        sampled_indices: Indices that are asked of a sampler without a length.
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
    gram_rows: int = 1 << 12
    system_bytes: int = 1 << 26
    dense_output_bytes: int = 1 << 29
    recorded_bytes: int = 1 << 30
    calibration_bytes: int = 1 << 28
    joined_bytes: int = 1 << 25
    sampled_indices: int = 1 << 20


_current = Limits()


def limits() -> Limits:
    """The limits that apply now."""
    return _current


@contextmanager
def limited(**fields: int) -> Iterator[Limits]:
    """Inside the block other limits apply.

    Args:
        fields: Names and values of the fields of `Limits` that differ.
    """
    global _current
    before, _current = _current, replace(_current, **fields)
    try:
        yield _current
    finally:
        _current = before
