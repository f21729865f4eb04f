"""What mkdocs does before it builds the site: files outside docs/ become pages, and links to them lead to these.

So links between files are written once, as GitHub reads them, and the README is the first page of the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "properties/README.md": "property-files.md",
    "docs/notebooks/tour.ipynb": "notebooks/tour.md",
    "docs/notebooks/your-data.ipynb": "notebooks/your-data.md",
    "docs/notebooks/merge-and-compare.ipynb": "notebooks/merge-and-compare.md",
}
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]+)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/, and a page with the text of every other file that a page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_content(source)))
    for page in list(files.documentation_pages()):
        for target, _ in _LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            place = path and _in_site(path)
            if place and place.startswith("files/") and place not in files.src_uris:
                text = (ROOT / path).read_text(encoding="utf-8")
                language = "python" if path.endswith(".py") else "yaml"
                files.append(File.generated(config, place, content=f"# {path}\n\n````{language}\n{text}````\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where the files are in the site."""
    here = page.file.src_uri
    if here.startswith("files/"):
        return markdown

    def link(match: re.Match[str]) -> str:
        path = _in_repository(here, match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(_in_site(path), posixpath.dirname(here) or '.')}{match[2] or ''})"

    return _LINK.sub(link, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Docstrings have roles and literal blocks of reStructuredText, which Markdown shows as they are."""
    if not page.file.src_uri.startswith("api/"):
        return html
    html = re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)
    html = re.sub(r"(?<=<code>)~(?:\w+\.)*(?=\w+</code>)", "", html)
    return html.replace("<p>::</p>", "").replace("::</p>", ":</p>")


def _content(source: str) -> str:
    """The text of a page that lies outside docs/, or that is a notebook there."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if not source.endswith(".ipynb"):
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        own = "".join(cell["source"])
        parts.append(own if cell["cell_type"] == "markdown" else f"```python\n{own}\n```")
    return "\n\n".join([*parts, f'<a href="../{posixpath.basename(source)}" download>Download this page as a notebook</a>\n'])


def _in_repository(page: str, target: str) -> str | None:
    """Path in the repository of what a page links to; None where that is no file of it."""
    by_page = {page: source for source, page in PAGES.items()}
    source = by_page.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if "://" not in target and (ROOT / path).is_file() else None


def _in_site(path: str) -> str:
    """Source of a page of the site for a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}.md")
