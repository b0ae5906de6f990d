"""What MkDocs asks while it builds the site (mkdocs.yml): the navigation, the references, and links out of docs/.

The project's README is the site's first page. Whatever else of the repository a page links to becomes a page too.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.append(str(Path(__file__).parent))
from site_references import api_page, keys_page

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"README.md": "index.md", "docs/README.md": "contents.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site by their files in the repository, where they are not those below docs/."""
KEYS, API = "keys.md", "api.md"


# ------------------------------------------------------------------------------------------------- what MkDocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the reading order of docs/README.md as the navigation."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page for line in re.findall(r"^\d+\. .*(?:\n   .*)*", index, re.M) for page in _pages_of(line)]
    guide = ["contents.md", *pages]
    config.nav = [{"Overview": "index.md"}, {"Guide": guide}, {"Reference": [KEYS, API]}, "changelog.md"]
    return config


def _pages_of(line: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)#]+\.md)\)", line) if not target.startswith("..")]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and one for each file of the repository that a page links to."""
    readme = files.get_file_from_path("README.md")
    if readme is not None:
        files.remove(readme)
    pages = {place: (ROOT / source).read_text(encoding="utf-8") for source, place in PLACES.items()}
    pages |= {KEYS: keys_page(), API: api_page()}
    told = {page.src_uri: page.content_string for page in files.documentation_pages()} | pages
    for place, text in told.items():
        for source in _targets(text, source_of(place)):
            if _outside(source) and (ROOT / source).exists():
                pages[place_of(source)] = repository_page(source)
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages; MkDocs refuses those that lead nowhere."""
    here = page.file.src_uri
    return _relinked(markdown, source_of(here), lambda source: posixpath.relpath(place_of(source), _folder(here)))


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the map of the site: it is empty without an address of the site's own, and bears the day's date."""
    for name in ("sitemap.xml", "sitemap.xml.gz"):
        Path(config.site_dir, name).unlink()


# ------------------------------------------------------------------------------------------------------------ links


def place_of(source: str) -> str:
    """Return the site's file for a file of the repository."""
    if source in PLACES:
        return PLACES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"repository/{source}.md"


def source_of(place: str) -> str:
    """Return the file of the repository behind a page of the site, as if a page that is made lay in docs/."""
    known = {made: source for source, made in PLACES.items()}
    return known.get(place, f"docs/{place}")


def _outside(source: str) -> bool:
    return not source.startswith("docs/") and source not in PLACES


def _folder(path: str) -> str:
    return posixpath.dirname(path) or "."


_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def _targets(markdown: str, source: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to."""
    found: list[str] = []
    _relinked(markdown, source, lambda target: found.append(target) or target)  # type: ignore[func-returns-value]
    yield from found


def _relinked(markdown: str, source: str, change: Callable[[str], str]) -> str:
    """Return a page whose links to files are changed; ``change`` gets a path from the repository's root."""

    def changed(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", match[0]):
            return match[0]
        return change(posixpath.normpath(posixpath.join(_folder(source), match[0])))

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(changed, part) for i, part in enumerate(parts))


def repository_page(source: str) -> str:
    """Return a page that shows a file of the repository, or lists a folder's files with theirs."""
    path = ROOT / source
    files = sorted(path.glob("*.*")) if path.is_dir() else [path]
    parts = ["---\nsearch:\n  exclude: true\n---", f"# {source}"]
    for file in files:
        title = f"## {file.name}\n\n" if path.is_dir() else ""
        text, kind = file.read_text(encoding="utf-8").rstrip(), file.suffix.lstrip(".").replace("yml", "yaml")
        parts.append(f"{title}`````{kind}\n{text}\n`````")
    return "\n\n".join(parts) + "\n"
