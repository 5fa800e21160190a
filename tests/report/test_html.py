"""A report as HTML, read back with the parser of the standard library."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from tests.support.reports import CONFIRMED, REPORT


class Reader(HTMLParser):
    """Collects the texts of each kind of tag, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts = [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1], []).append(data)


def test_a_notebook_shows_the_lines_and_the_table_of_the_report():
    texts = Reader(CONFIRMED._repr_html_()).texts
    head, *rows = CONFIRMED.rows()
    assert texts["li"] == CONFIRMED.summary()
    assert texts["th"] == head
    assert texts["td"] == [cell for row in rows for cell in row]


def test_names_are_escaped_and_a_long_table_is_cut():
    levels = tuple(replace(CONFIRMED.levels[0], level=number) for number in range(1, 31))
    many = replace(CONFIRMED, monitor="<b>acc</b>", levels=levels)
    texts = Reader(many._repr_html_()).texts
    assert "b" not in texts
    assert any("<b>acc</b>" in line for line in texts["li"])
    assert texts["p"] == ["20 of 30 levels are left out. report.table() returns all of them."]


def test_a_report_without_levels_has_no_table():
    assert Reader(replace(REPORT, levels=())._repr_html_()).texts.keys() == {"li"}
