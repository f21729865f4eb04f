"""No text of a CSV file is a formula of a spreadsheet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from recbole_llm.recommend.output import _csv
from recbole_llm.recommend.recommender import COLUMNS


def test_a_title_that_begins_as_a_formula_gets_an_apostrophe_and_ids_stay(tmp_path: Path) -> None:
    row = {"user": "=u1", "item": "-5", "title": "=HYPERLINK(1)", "rank": 1, "score": -0.5}
    with _csv(tmp_path / "top.csv") as add:
        add(pd.DataFrame([row])[[*COLUMNS]])
    assert pd.read_csv(tmp_path / "top.csv", dtype={"item": str}).to_dict("records") == [row | {"title": "'=HYPERLINK(1)"}]
