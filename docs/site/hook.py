"""Gives mkdocs the pages at their places in the repository, and the menu that docs/README.md has.

So the links of a page are the same here and on the site, and a new page is listed once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from links import dead_links  # mkdocs imports what is beside a hook

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PROJECT = Path(__file__).parents[2]
FOLDERS = ("docs", "examples", "tests")
FORMATS = {".md", ".py", ".png", ".svg", ".yaml", ".jsonl", ".csv", ".cff"}
_OTHERS = {"Changes": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md", "Security": "SECURITY.md"}


def menu() -> list[dict[str, Any]]:
    """Return the front page, the index of the pages with its sections, and the pages about the project."""
    index = (PROJECT / "docs" / "README.md").read_text()
    found: list[dict[str, Any]] = [{"Start": "README.md"}, {"All pages": "docs/README.md"}]
    for part in re.split(r"(?m)^(?=[A-Z][\w ]+:$)", index)[1:]:
        pages = re.findall(r"(?m)^- \[([^\]]+)\]\((\w+\.md)\)", part)
        found.append({part.partition(":")[0]: [{title: f"docs/{page}"} for title, page in pages]})
    return [*found, {"The project": [{title: page} for title, page in _OTHERS.items()]}]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the menu."""
    config.nav = menu()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the theme and the style sheet, and all that pages may link to, which is copied as it is."""
    from mkdocs.structure.files import File, Files

    of_site = [one for one in files if one.src_dir != config.docs_dir or one.src_uri.endswith(".css")]
    found = [*PROJECT.iterdir(), *(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*"))]
    named = [path for path in sorted(found) if path.suffix in FORMATS and path.is_file()]
    return Files([*of_site, *(File.generated(config, _name(path), abs_src_path=str(path)) for path in named)])


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page of the site names a file or a heading that does not exist: a style sheet, a picture, a link."""
    from mkdocs.exceptions import PluginError

    if dead := dead_links(Path(config.site_dir)):
        raise PluginError("the site names what it lacks:\n" + "\n".join(dead))


def _name(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()
