"""Many names in a few words."""

from __future__ import annotations

import pytest

from lightning_roulette.report.names import shortened

BLOCKS = [f"blocks.{number}.{part}.weight" for number in range(6) for part in ("a", "b")]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a"], "a"),
        (["a.0", "a.1", "a.2"], "a.0, a.1, a.2"),
        (BLOCKS, "blocks.*.a.weight, blocks.*.b.weight"),
        ([f"net.{word}.weight" for word in "abcd"], "net.* (4 parameters)"),
        ([f"{word}.weight" for word in "abcd"], "a.weight, b.weight and others (4 parameters)"),
        (list("abcd"), "a, b and others (4 parameters)"),
    ],
)
def test_names_are_shortened(names, text):
    assert shortened(names) == text
