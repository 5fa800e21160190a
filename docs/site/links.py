"""Finds what the pages of a site name and the site lacks."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_ABSOLUTE = {"404.html"}  # pages whose links start at the root of a server


class Page(HTMLParser):
    """What a page names (links, pictures, scripts, style sheets), and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.named: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take what one element names."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.named.add(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Return a line for each name of a file or an anchor that does not exist. Other sites are not asked."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for name in sorted(page.named) if path.name not in _ABSOLUTE else ():
            parts = urlsplit(name)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if there.is_dir():
                there /= "index.html"
            lacks = parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].anchors
            if not there.exists() or lacks:
                found.append(f"{path.relative_to(site)}: {name}")
    return found
