"""``replication.json``: the results of all claims, by board and name.

A result is replaced by a later one of the same claim. If the claim, its test, its rows or its margin were changed in between, or
if the later one is of other settings, of fewer seeds or of runs by another state of the code, whose random draws may differ, the
earlier result stays in the file, under ``earlier``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.store.files import atomic_write
from recbole_llm.store.json_files import read_object

Results = dict[str, dict[str, dict[str, Any]]]
FORM = 1


def read_results(file: Path) -> Results:
    """The results of a file; none without the file.

    Raises:
        ValueError: it is not a file of results.
    """
    if not file.is_file():
        return {}
    try:
        content = read_object(file)
        if content["form"] != FORM or not isinstance(content["boards"], dict):
            raise KeyError("form")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a file of results of this version ({error}); move it away") from error
    return content["boards"]


def write_results(file: Path, results: Results) -> None:
    """Write strict JSON whose order does not depend on the order of the runs."""
    content = {"form": FORM, "boards": results}
    atomic_write(file, json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def add(results: Results, board: str, name: str, found: Mapping[str, Any]) -> None:
    """Add the result of a claim; one of another form of the claim or of other runs stays as an earlier one."""
    own = results.setdefault(board, {})
    before = own.get(name)
    earlier = list(before.get("earlier", [])) if before else []
    if before and _is_other(before, found):
        earlier.append({key: value for key, value in before.items() if key != "earlier"})
    own[name] = {**found, **({"earlier": earlier} if earlier else {})}


def _is_other(before: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    other = any(before.get(key) != found.get(key) for key in ("fingerprint", "changes", "commits"))
    return other or not {*before.get("seeds", ())} <= {*found.get("seeds", ())}
