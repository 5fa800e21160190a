"""A package that is not installed."""

from __future__ import annotations

import importlib

import pytest


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """`importlib.import_module` finds no module of this package."""
    load = importlib.import_module

    def missing(name: str, *rest: str) -> object:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
