"""Other size limits for one test."""

from __future__ import annotations

from dataclasses import replace

from lightning_roulette.large import limits


def set_limits(monkeypatch, **fields: int) -> None:
    """Other values of some fields of `Limits` until the test ends."""
    monkeypatch.setattr(limits, "_current", replace(limits.limits(), **fields))
