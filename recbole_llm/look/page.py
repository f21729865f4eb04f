"""The page: one self-contained HTML file that runs no script but its own and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.leaderboard.templates import templates
from recbole_llm.look.columns import Column, read_columns
from recbole_llm.look.content import HISTORY, SEED, page_content
from recbole_llm.store.files import atomic_write


def write_look(
    runs: Sequence[str],
    out: Path,
    *,
    rows: Sequence[str] = (),
    users: int | Sequence[str] = 200,
    top: int = 10,
    data_path: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Write the page of runs; returns its content.

    Args:
        runs, rows: as :func:`~recbole_llm.look.columns.read_columns`.
        out: the file.
        users, top, data_path: as :func:`~recbole_llm.look.content.page_content`.

    Raises:
        ValueError: as these functions.
    """
    if out.suffix != ".html":
        raise ValueError(f"--out={out}: give the name of an .html file")
    columns = read_columns(runs, rows)
    content = page_content(columns, users, top=top, data_path=data_path, show_progress=show_progress)
    atomic_write(out, to_html(content, columns))
    return content


def to_html(content: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """The page of a :func:`~recbole_llm.look.content.page_content`."""
    environment = templates()
    # jinja escapes <, >, & and ', and JSON all that is not ASCII, such as U+2028
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    source = importlib.resources.files("recbole_llm.look").joinpath("page.html").read_text(encoding="utf-8")
    script = source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(source).render(
        content=content, script_hash=f"sha256-{digest}", table=_table(columns), history=HISTORY, seed=SEED
    )


def _table(columns: Sequence[Column]) -> dict[str, Any]:
    """The first metric and the longest list of each metric, as far as all columns have them; for each column its values."""
    results = [column.record["results"][column.row] for column in columns]
    names = [name for name in results[0] if all(name in own for own in results)]
    longest = {name.partition("@")[0]: name for name in names}  # the last cutoff stays
    shared = list(dict.fromkeys([*names[:1], *longest.values()]))
    values = [[f"{own[name]:.4f}" for name in shared] for own in results]
    return {"heads": shared, "lines": list(zip(columns, values, strict=True))}
