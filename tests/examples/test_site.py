"""The site: every page has its place, every public name its documentation, and nothing is fetched to read it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import Enum

import pytest
import yaml
from lightning.pytorch import Callback

import lightning_roulette
from tests.support.pages import PAGES, PROJECT, text_of

SITE = yaml.safe_load((PROJECT / "mkdocs.yml").read_text())
REFERENCE = re.findall(r"^::: lightning_roulette\.(?:[\w.]+\.)?(\w+)$", text_of("docs/reference.md"), re.MULTILINE)

SETTINGS = ("Wheel", "Tree", "Validation", "Refit", "LeastSquares", "Codebook", "NofM", "Block", "Reduction")


def places(nav) -> list[str]:
    """The pages of a menu, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in places(part)]


def test_the_reference_has_every_public_name_once():
    missing = set(lightning_roulette.__all__) - set(REFERENCE)
    assert not missing, "add lines `::: lightning_roulette.NAME` to docs/reference.md"
    assert len(REFERENCE) == len(lightning_roulette.__all__)


@pytest.mark.parametrize("name", lightning_roulette.__all__)
def test_every_public_name_and_its_public_methods_are_documented(name):
    public = getattr(lightning_roulette, name)
    own = lightning_roulette.__name__
    methods = inspect.getmembers(public, inspect.isfunction) if inspect.isclass(public) else []
    ours = [(part, one) for part, one in methods if not part.startswith("_") and one.__module__.startswith(own)]
    assert [part for part, one in [(name, public), *ours] if not (one.__doc__ or "").strip()] == []
    # a dataclass without a docstring gets its signature as one
    assert not public.__doc__.startswith(f"{name}(")


def taken_by(public) -> set[str]:
    """The names of the arguments of a function or a class."""
    if inspect.isclass(public) and issubclass(public, Enum):
        return set()
    parameters = inspect.signature(public).parameters.values()
    return {one.name for one in parameters if one.kind is not one.VAR_POSITIONAL}


def documented_in(public) -> set[str]:
    """The names that a docstring explains, as arguments or as attributes."""
    sections = re.findall(r"(?ms)^(?:Args|Attributes):$(.*?)(?=^\S|\Z)", inspect.getdoc(public))
    return {name.lstrip("*") for text in sections for name in re.findall(r"(?m)^    ([*\w]+): ", text)}


@pytest.mark.parametrize("name", lightning_roulette.__all__)
def test_every_argument_of_a_public_name_is_in_its_table(name):
    public = getattr(lightning_roulette, name)
    assert taken_by(public) - documented_in(public) == set()
    for part, one in own_methods(public):
        assert set(inspect.signature(one).parameters) - documented_in(one) - {"self", "cls"} == set(), part


def own_methods(public) -> list[tuple[str, Callable]]:
    """The public methods of a class of this package, without the hooks that Lightning calls and torch's."""
    if not inspect.isclass(public):
        return []
    found = inspect.getmembers(public, lambda one: inspect.isfunction(one) or inspect.ismethod(one))
    ours = [(part, one) for part, one in found if one.__module__.startswith(lightning_roulette.__name__)]
    return [(part, one) for part, one in ours if not part.startswith("_") and not hasattr(Callback, part)]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_user_builds_shows_the_defaults_of_its_arguments(name):
    # the site shows defaults of arguments, and none of attributes
    assert "\nArgs:\n" in inspect.getdoc(getattr(lightning_roulette, name))


def test_the_reference_names_no_package_in_place_of_a_function():
    # `search` is a function of the package and one of its folders, and the site reads files without running them
    written = re.findall(r"(?m)^::: (lightning_roulette\.\w+)$", text_of("docs/reference.md"))
    folders = {one.parent.name for one in (PROJECT / "lightning_roulette").glob("*/__init__.py")}
    files = {one.stem for one in (PROJECT / "lightning_roulette").glob("*.py")}
    assert {one.rpartition(".")[2] for one in written} & (folders | files) == set()


def test_the_menu_has_every_page(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "docs/site")
    import hook

    assert sorted(places(hook.menu())) == sorted([*PAGES, "CHANGELOG.md", "SECURITY.md"])


def test_a_reader_of_the_site_fetches_nothing_from_elsewhere():
    assert SITE["theme"]["font"] is False
    assert "extra_javascript" not in SITE
    assert all((PROJECT / "docs/site" / sheet).exists() for sheet in SITE["extra_css"])


def test_a_name_of_a_missing_file_or_heading_is_found(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(PROJECT / "docs/site")
    from links import dead_links

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/other.html").write_text('<h1 id="one">One</h1>')
    there = '<a href="folder/other.html#one"></a><a href="#two"></a><b id="two"></b><a href="https://elsewhere"></a>'
    (tmp_path / "index.html").write_text(there)
    assert dead_links(tmp_path) == []
    lost = '<link href="style.css"><img src="a%20b.png"><a href="folder/other.html#two"></a><a href="#three"></a>'
    (tmp_path / "index.html").write_text(there + lost)
    names = ("#three", "a%20b.png", "folder/other.html#two", "style.css")
    assert dead_links(tmp_path) == [f"index.html: {name}" for name in names]
