"""The site: every page has its place, every public name its documentation, and nothing is fetched to read it."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml

import lightning_roulette
from tests.support.pages import PAGES, PROJECT, text_of

SITE = yaml.safe_load((PROJECT / "mkdocs.yml").read_text())
REFERENCE = re.findall(r"^::: lightning_roulette\.(\w+)$", text_of("docs/reference.md"), re.MULTILINE)


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


def test_the_menu_has_every_page(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "docs/site")
    import hook

    assert sorted(places(hook.menu())) == sorted([*PAGES, "CHANGELOG.md", "SECURITY.md"])


def test_a_reader_of_the_site_fetches_nothing_from_elsewhere():
    assert SITE["theme"]["font"] is False
    assert "extra_javascript" not in SITE
    assert "extra_css" not in SITE
