"""The rooms of the package: imports point down, and lightning is used in one room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_roulette"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# each room may import from those on lower floors
FLOORS = (
    {"checks", "large", "report"},
    {"values", "unit"},
    {"settings", "refit_settings", "mask"},
    {"network"},
    {"wheel", "slim"},
    {"refit", "judge"},
    {"search"},
    {"trainer"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "tensorboard"}

pytestmark = pytest.mark.every_case


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The module and the names of each import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [one.name for one in node.names]
        elif isinstance(node, ast.Import):
            yield from ((one.name, []) for one in node.names)


def ours(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The room and the names of each import from this package."""
    for module, names in imports(path):
        if module.split(".")[0] == PACKAGE.name:
            yield [*module.split("."), *names][1], names


def test_every_file_stands_in_a_known_room():
    assert {room_of(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    assert [other for other, _ in ours(path) if other != room and FLOOR[other] >= FLOOR[room]] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_trainer_room_imports_lightning(path):
    used = {module.split(".")[0] for module, _ in imports(path)} & FRAMEWORKS
    assert not used or room_of(path) == "trainer"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_imports_a_private_name_of_another(path):
    assert [name for _, names in ours(path) for name in names if name.startswith("_")] == []
