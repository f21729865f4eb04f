"""The page: one self-contained HTML file that runs no script but its own and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.leaderboard.templates import templates
from recbole_llm.look.columns import Column
from recbole_llm.look.content import HISTORY, SEED


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
