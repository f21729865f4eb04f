"""A file of predictions is read in every form, and whatever is wrong with it is refused with file, row, column and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_llm.evaluation.prediction_files import Predictions, read_predictions

USERS, ITEMS = ["[PAD]", "u1", "7", "u;3"], ["[PAD]", "a", "12", "c d", "12.0"]
ROWS = [("u1", "a", 0.5), ("u1", "12", 0.25), ("7", "12", 3.0), ("7", "c d", 1e-3), ("u;3", "a", -1.0)]


def frame(rows: list = ROWS, names: tuple[str, ...] = ("user", "item", "score")) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=names)


def read(path: Path, **options: Any) -> Predictions:
    return read_predictions(path, USERS, ITEMS, **options)


def scores(found: Predictions) -> list[list[float]]:
    return found.scores(torch.arange(1, 4)).tolist()


INF = -np.inf
EXPECTED = [[INF, 0, -1, INF, INF], [INF, INF, 0, -1, INF], [INF, 0, INF, INF, INF]]


def write(path: Path, table: pd.DataFrame, form: str) -> Path:
    path = path.with_name(f"{path.name}.{form}")
    if form == "parquet":
        table.to_parquet(path, index=False)
    elif form == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        text = table.to_csv(sep={"csv": ",", "csv.gz": ",", "tsv": "\t"}[form], index=False)
        path.write_bytes(gzip.compress(text.encode()) if form == "csv.gz" else text.encode())
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "tsv", "csv.gz"])
@pytest.mark.parametrize(
    "names",
    [
        ("user", "item", "score"),
        ("user_id", "item_id", "score"),
        ("User_ID", "Item_ID", "Prediction"),
        ("user_id:token", "item_id:token", "score:float"),
    ],
)
def test_forms_and_names(form: str, names: tuple[str, ...], tmp_path: Path) -> None:
    found = read(write(tmp_path / "file", frame(names=names), form))
    assert scores(found) == EXPECTED
    assert list(found.columns.values()) == list(names)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_marks_and_line_ends(separator: str, start: str, end: str, tmp_path: Path) -> None:
    text = frame().to_csv(sep=separator, index=False, lineterminator=end)
    (tmp_path / "file.csv").write_bytes((start + text).encode())
    assert scores(read(tmp_path / "file.csv")) == EXPECTED


def test_ranks_count_as_scores(tmp_path: Path) -> None:
    ranks = frame([("u1", "a", 1), ("u1", "12", 2), ("7", "12", 3), ("7", "c d", 10), ("u;3", "a", 1)], ("user", "item", "rank"))
    assert scores(read(write(tmp_path / "file", ranks, "csv"))) == EXPECTED


def test_equal_scores_share_a_place_and_doubles_that_float32_joins_do_not(tmp_path: Path) -> None:
    rows = [("u1", "a", 1.0), ("u1", "12", 1.0), ("u1", "c d", 1.0 - 1e-12), ("u1", "12.0", 0.5)]
    assert scores(read(write(tmp_path / "file", frame(rows), "parquet")))[0] == [INF, 0, 0, -1, -2]


def test_an_item_at_minus_infinity_is_not_recommended(tmp_path: Path) -> None:
    rows = [*ROWS, ("u1", "c d", -np.inf)]
    assert scores(read(write(tmp_path / "file", frame(rows), "parquet"))) == EXPECTED


def test_whole_numbers_are_tokens_however_pandas_keeps_them(tmp_path: Path) -> None:
    for number, kind in enumerate(("int64", "float64", "uint16")):
        table = pd.DataFrame({"user": np.array([7], kind), "item": np.array([12], kind), "score": [1.0]})
        assert scores(read(write(tmp_path / f"{number}", table, "parquet")))[1] == [INF, INF, 0, INF, INF]
    (tmp_path / "text.csv").write_text("user,item,score\n7,12.0,1\n")  # a text is the token that it is
    assert scores(read(tmp_path / "text.csv"))[1] == [INF, INF, INF, INF, 0]


def test_columns_are_named_where_they_are_not_found(tmp_path: Path) -> None:
    table = frame(names=("who", "what", "value")).assign(score="text")
    chosen = {"user": "who", "item": "what", "score": "value"}
    assert scores(read(write(tmp_path / "file", table, "parquet"), columns=chosen)) == EXPECTED
    with pytest.raises(ValueError, match=r"predictions_columns: .* has no column 'whose'; it has: who, what, value, score"):
        read(tmp_path / "file.parquet", columns={"user": "whose"})


def test_one_row_of_results_is_read(tmp_path: Path) -> None:
    table = pd.concat([frame().assign(row="SASRec"), frame([("u1", "c d", 1.0)]).assign(row="a control")])
    file = write(tmp_path / "file", table, "parquet")
    assert scores(read(file)) == EXPECTED and read(file).row == "SASRec"
    assert scores(read(file, row="a control"))[0] == [INF, INF, INF, 0, INF]
    with pytest.raises(ValueError, match="predictions_row: .* has no row 'Pop'; it has: SASRec, a control"):
        read(file, row="Pop")
    with pytest.raises(ValueError, match="predictions_row: .* has no column `row`; remove predictions_row=Pop"):
        read(write(tmp_path / "other", frame(), "csv"), row="Pop")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user,item,score\nu1,a,1\nu9,a,1\n", "row 2, column user: there is no user 'u9' in the dataset; .*'u1'"),
        ("user,item,score\nu1,a,1\nu1,zz,1\n", "row 2, column item: there is no item 'zz' in the dataset"),
        ("user,item,score\nu1, a,1\n", "row 1, column item: there is no item ' a'"),
        ("user,item,score\nu1,[PAD],1\n", r"row 1, column item: there is no item '\[PAD\]'"),
        ("user,item,score\nu1,a,1\nu1,12,high\n", "row 2, column score: 'high' is not a number; give a number"),
        ("user,item,score\nu1,a,1\nu1,12,\n", "row 2, column score: '' is not a number"),
        ("user;item;score\nu1;a;0,5\n", "row 1, column score: '0,5' is not a number"),
        ("user,item,score\nu1,a,nan\n", "row 1, column score: nan cannot be ranked; .*leave the row out"),
        ("user,item,score\nu1,a,inf\n", "row 1, column score: inf cannot be ranked"),
        ("user,item,rank\nu1,a,first\n", "row 1, column rank: 'first' is not a number"),
        (
            "user,item,score\nu1,a,1\n7,a,1\nu1,a,2\n",
            "row 3, column item: user 'u1' has item 'a' in row 1, too; keep one of them",
        ),
        ("user,item,score,rank\nu1,a,.1,1\nu1,12,.9,2\n", "row 2, column score: user 'u1' has a higher score at rank 2 .*negate"),
        ("user,item,score\n", "has no rows"),
        ("", "is empty"),
        ("\n", "none of the separators"),
        ("user item score\nu1 a 1\n", "none of the separators tab, comma, semicolon, bar; write the file with one of them"),
        ("user::item::score\nu1::a::1\n", "none of the separators"),
        ("u1,a,1\n7,a,1\n", "has no column of users .*predictions_columns"),
        ("user,item\nu1,a\n", "has no column of scores and none of ranks"),
        ("user,score\nu1,1\n", "has no column of items"),
        ("user,item,score\nu1,a,1\nu1,12\n", "cannot be read as csv: .*[Ee]xpected 3 columns, got 2"),
        ("user,item,score\nu1,a,1\nu1,12,1,1\n", "cannot be read as csv: .*[Ee]xpected 3 columns, got 4"),
        ("user,item,score,score\nu1,a,1,2\n", "several columns 'score'"),
        ("user,item,score\nu1,\xff,1\n", "cannot be read as csv|there is no item"),
    ],
)
def test_a_hostile_csv_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "file.csv"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=words) as found:
        read(file)
    assert str(file) in str(found.value) and str(found.value).startswith("predictions")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"user": "u1", "item": "a", "score": 1}', '{"user": "u1", "item": '], "line 2: .*each line is an object such as"),
        (['{"user": "u1", "item": "a", "score": 1}', '["u1", "a", 1]'], "line 2: list instead of an object"),
        (
            ['{"user": "u1", "item": "a", "score": 1}', '{"user": "u1", "item": "12"}'],
            "row 2, column score: the score is missing",
        ),
        (['{"user": "u1", "item": "a", "score": 1}', '{"item": "12", "score": 1}'], "row 2, column user: the user is missing"),
        (['{"user": "u1", "item": "a", "score": "x"}'], "row 1, column score: 'x' is not a number"),
        (['{"user": "u1", "item": "a", "score": 1}', '{"user": "u1", "item": "12", "score": "x"}'], "cannot be read as jsonl"),
        (['{"user": true, "item": "a", "score": 1}'], "column user: bool values cannot be user ids"),
        (['{"user": "u1", "item": "a", "score": [1]}'], "column score: list.* values are not scores"),
        (['{"user": 7.5, "item": "a", "score": 1}'], "column user: double values cannot be user ids"),
        (['{"user": 1e300, "item": "a", "score": 1}'], "column user: double values cannot be user ids"),
        (["not json"], "line 1: "),
        (["[]"], "line 1: list instead of an object"),
    ],
)
def test_hostile_json_lines_are_refused(lines: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "file.jsonl")


def test_numbers_as_ids_in_json(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text('{"user": 7, "item": 12, "score": 1}\n')
    assert scores(read(tmp_path / "file.jsonl"))[1] == [INF, INF, 0, INF, INF]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.csv"):
        read(tmp_path / "gone.csv")
    (tmp_path / "file.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"ends in .xlsx, an unknown form; give a .parquet"):
        read(tmp_path / "file.xlsx")
    (tmp_path / "file.parquet").write_bytes(b"PAR1 no parquet at all PAR1")
    with pytest.raises(ValueError, match=r"file.parquet cannot be read as parquet: .*; write it again"):
        read(tmp_path / "file.parquet")
    whole = write(tmp_path / "cut", frame(), "parquet")
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read(whole)
    pq.write_table(pa.table({"user": [["u1"]], "item": ["a"], "score": [1.0]}), tmp_path / "nested.parquet")
    with pytest.raises(ValueError, match="column user: list<.*> values cannot be user ids; give the tokens of USER_ID_FIELD"):
        read(tmp_path / "nested.parquet")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 200), put=st.binary(max_size=3), cut=st.integers(0, 3), form=st.sampled_from(["csv", "jsonl", "parquet"])
)
def test_any_bytes_at_any_place_end_in_one_error_or_in_a_reading(
    place: int, put: bytes, cut: int, form: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "file", frame(), form)
    content = file.read_bytes()
    file.write_bytes(content[:place] + put + content[place + cut :])
    try:
        found = read(file)
    except ValueError as error:
        assert str(error).startswith("predictions") and str(file) in str(error)
    else:
        assert found.scores(torch.arange(1, 4)).shape == (3, 5)


def test_the_json_of_a_file_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(json.dumps({"user": "__import__('os').abort()", "item": "a", "score": 1}) + "\n")
    with pytest.raises(ValueError, match="there is no user"):
        read(tmp_path / "file.jsonl")
