"""A record names the code that made it, the user's own included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_llm.classical.record_code import record_code
from recbole_llm.config import LLMConfig
from recbole_llm.store import code


@pytest.mark.parametrize(
    "given",
    [
        {"merge": "my_merges:mine"},
        {"merge": "my_merges.mine"},
        {"merge": "my_merges.py:mine"},
        {"merge_beside": {"mine": {"merge": "my_merges:mine"}}},
    ],
)
def test_a_merge_function_of_the_user_is_part_of_it(
    given: dict[str, Any], data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for factor in (1, 2):
        (tmp_path / "my_merges.py").write_text(f"def mine(problem):\n    return {factor}\n")
        code._tree.cache_clear()
        config = LLMConfig("LoRACocktail", "tiny", config_dict={"data_path": str(data_path), **given})
        found.append(record_code(config))
    assert found[0] != found[1]


@pytest.mark.parametrize("merge", ["my_mergez:mine", "ties:", "math.sqrt"])
def test_a_merge_without_code_is_for_the_merge_to_refuse(merge: str, data_path: Path) -> None:
    plain, given = ({"data_path": str(data_path), **own} for own in ({}, {"merge": merge}))
    codes = [record_code(LLMConfig("LoRACocktail", "tiny", config_dict=settings)) for settings in (plain, given)]
    assert codes[0] == codes[1]
