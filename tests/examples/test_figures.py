"""The figures of the pages: each is drawn by one script, can be read in the dark, and is described in words."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tests.support.pages import PAGES, PROJECT, text_of

FOLDER = PROJECT / "docs/figures"
SHOWN = [found for page in PAGES for found in re.findall(r"!\[([^\]]*)\]\(figures/(\w+)\.svg\)", text_of(page))]


@pytest.fixture
def draw(monkeypatch):
    """The script that draws the figures."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(FOLDER)
    import draw

    return draw


def test_the_pages_show_each_figure_of_the_script_once(draw):
    assert sorted(name for _, name in SHOWN) == sorted(draw.FIGURES) == sorted(one.stem for one in FOLDER.glob("*.svg"))


@pytest.mark.parametrize(("words", "name"), SHOWN)
def test_a_figure_is_described_and_fetches_nothing_and_has_ink_for_both_backgrounds(words, name):
    assert len(words.split()) > 15
    text = (FOLDER / f"{name}.svg").read_text()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text
    assert "var(--ink)" in text
    assert re.findall(r"""(?:href|src)=["'](?!#)|url\((?!#)""", text) == []


@pytest.mark.slow
def test_the_script_draws_what_the_pages_show(draw, tmp_path):
    for name in ("wheel", "race"):
        draw.draw(name, tmp_path)
        drawn, shown = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, FOLDER))
        words = [re.findall(r"<text[^>]*>([^<]*)</text>", one) for one in (drawn, shown)]
        assert words[0] == words[1] != []


def test_the_certificate_of_the_figure_is_that_of_the_page(draw):
    assert draw.smallest_tolerance(598, 0.0) == pytest.approx(0.005, rel=0.01)
    assert "598 held-out images" in text_of("docs/scores.md")
    assert draw.smallest_tolerance(2000, 0.01) > 0.005 > draw.smallest_tolerance(3000, 0.01)
    assert "1 % gained, 2,000 to 3,000 are needed" in text_of("docs/scores.md")
