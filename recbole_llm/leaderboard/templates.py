"""Templates of HTML pages, which escape what they show; ``style.css`` is the style that all pages include."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates() -> Environment:
    """An environment of jinja2 with the templates of this package."""
    return Environment(
        loader=PackageLoader("recbole_llm.leaderboard", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
