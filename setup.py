"""What setup.cfg cannot say: the mapped package ``recbole_llm.properties``, and the description as PyPI shows it.

On PyPI there are no files beside the README. Its links to files lead to the ``Source`` of ``project_urls`` in setup.cfg. While
there is none, they are plain text, as are links within the page, whose headings have no anchors there.
"""

import configparser
import posixpath
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def source() -> str | None:
    """The address of the repository, if setup.cfg has one."""
    parser = configparser.ConfigParser()
    parser.read(HERE / "setup.cfg", encoding="utf-8")
    urls = dict(line.split("=", 1) for line in parser["metadata"].get("project_urls", "").splitlines() if "=" in line)
    return {name.strip(): url.strip() for name, url in urls.items()}.get("Source")


def description(readme: str, repository: str | None) -> str:
    """A README whose links work elsewhere, too."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target:
            return match[0]
        if repository is None or target.startswith("#"):
            return text
        return f"[{text}]({posixpath.join(repository, 'blob/main', target)})"

    return LINK.sub(link, readme)


setup(
    packages=[*find_packages(include=["recbole_llm", "recbole_llm.*"]), "recbole_llm.properties"],
    long_description=description((HERE / "README.md").read_text(encoding="utf-8"), source()),
    long_description_content_type="text/markdown",
)
