"""Reports as plain Python values for JSON and checkpoints, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from lightning_roulette.report.former import FORMER
from lightning_roulette.report.records import Candidate, Footprint, Held, Level, Method, Skipped, StopReason

if TYPE_CHECKING:
    from lightning_roulette.report.report import SearchReport


def written(record: SearchReport | Level | Candidate | Skipped | Footprint | Held) -> dict[str, Any]:
    """Return the fields of a record as plain values. NaN and infinities become strings, enum members their names."""
    return {one.name: _plain(getattr(record, one.name)) for one in fields(record)}


def read(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `SearchReport` from the dictionary that `written` returned."""
    record = _renamed(record)
    numbers = _numbers(record, "dense_score", "tolerance", "score", "trained_score", "held_out_dense", "dense_measured")
    numbers |= _numbers(record, "target_sparsity")
    return {
        **record,
        **numbers,
        "levels": tuple(_level(level) for level in record["levels"]),
        "stop_reason": StopReason[record["stop_reason"]] if record["stop_reason"] else None,
        "method": Method[record["method"]] if record.get("method") else None,
        "folds": tuple(record["folds"]),
        "skipped": _skipped(record.get("skipped", ())),
        "not_refitted": _skipped(record.get("not_refitted", ())),
        "notes": tuple(record.get("notes", ())),
        "footprint": Footprint(**record["footprint"]) if record.get("footprint") else None,
        "held": Held(**record["held"]) if record.get("held") else None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Candidate | Level | Skipped | Footprint | Held):
        return written(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(member) for member in value]
    return dict(value) if isinstance(value, Mapping) else value


def _skipped(records: Sequence[Mapping[str, Any]]) -> tuple[Skipped, ...]:
    return tuple(Skipped(**{**one, "names": tuple(one["names"])}) for one in records)


def _level(record: Mapping[str, Any]) -> Level:
    record = _renamed(record)
    numbers = _numbers(record, "error", "held_out_score", "held_out_error", "p_value")
    return Level(**{**record, **numbers, "candidates": tuple(_candidate(one) for one in record["candidates"])})


def _candidate(record: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**record, **_numbers(record, "score", "rank", "tiebreak")})


def _renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {FORMER.get(name, name): value for name, value in record.items()}


def _numbers(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return these fields as floats; None stays None."""
    return {name: None if (value := record.get(name)) is None else float(value) for name in names}
