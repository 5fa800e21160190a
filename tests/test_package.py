"""What the package says about itself: its version, what it needs, and what is tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import tomllib

import lightning_roulette

PROJECT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
NEEDED = SETTINGS["project"]["dependencies"]


def pinned(text: str) -> dict[str, str]:
    """The versions in `name==version`."""
    return dict(re.findall(r"([\w.-]+)==([\w.]+)", text))


def bounds() -> dict[str, tuple[str, str]]:
    """The lowest version of each dependency, and the first that is too new."""
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", one) for one in NEEDED]
    return {one[1]: (one[2], one[3]) for one in found}


def test_every_place_names_the_same_version():
    version = SETTINGS["project"]["version"]
    assert lightning_roulette.__version__ == version
    assert f"version: {version}\n" in (PROJECT / "CITATION.cff").read_text()
    assert f" {version}" in (PROJECT / "CHANGELOG.md").read_text()


def test_the_lowest_versions_are_those_that_the_makefile_tests():
    (line,) = re.findall(r"^OLDEST = (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    tested = pinned(line)
    assert tested.pop("pytorch-lightning") == tested["lightning"]
    lowest = {name: low for name, (low, _) in bounds().items()}
    torch = lowest.pop("torch")
    assert {name: version for name, version in tested.items() if version.startswith(lowest[name])} == tested
    assert tested.keys() == lowest.keys()
    # torch is tested in one version
    assert pinned((PROJECT / "constraints.txt").read_text())["torch"].startswith(torch)


def private_names() -> list[str]:
    """The private names of lightning that the package imports."""
    found = []
    for path in sorted((PROJECT / "lightning_roulette").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning."):
                found += [one.name for one in node.names if one.name.startswith("_")]
    return found


def test_lightning_has_an_upper_bound_as_long_as_its_private_names_are_imported():
    minor = ".".join(pinned((PROJECT / "constraints.txt").read_text())["lightning"].split(".")[:2])
    bounded = bounds()["lightning"][1] == f"{minor[:-1]}{int(minor[-1]) + 1}"
    assert bounded == bool(private_names())


def test_python_310_is_checked_by_ruff_and_mypy():
    assert SETTINGS["project"]["requires-python"] == ">=3.10"
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py310"
    assert SETTINGS["tool"]["mypy"]["python_version"] == "3.10"


def test_the_page_about_installing_lists_every_extra_and_what_it_installs():
    rows = re.findall(r"(?m)^\| `([\w-]+)` \| .+ \| ([^|]+) \|$", (PROJECT / "docs/install.md").read_text())
    listed = {extra: packages.split(", ") for extra, packages in rows}
    extras = SETTINGS["project"]["optional-dependencies"]
    assert listed == {extra: [re.match(r"[\w-]+", one)[0] for one in extras[extra]] for extra in extras}


def test_the_page_about_installing_names_the_bounds_of_what_is_always_installed():
    page = (PROJECT / "docs/install.md").read_text()
    bounded = re.findall(r"\*\*(\w+)\*\* ([\d.]+) or later", page)
    assert set(bounded) == {(name, low) for name, (low, _) in bounds().items()}
    assert f"below {bounds()['lightning'][1]}" in page


@pytest.mark.parametrize("extra", SETTINGS["project"]["optional-dependencies"])
def test_every_extra_is_bounded_and_pinned(extra):
    pins = {name.lower() for name in pinned((PROJECT / "constraints.txt").read_text())}
    for one in SETTINGS["project"]["optional-dependencies"][extra]:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", one).groups()
        assert re.fullmatch(r">=[\w.]+,<[\w.]+", bound), one
        assert name.lower() in pins
