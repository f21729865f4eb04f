"""What the reader of atomic files reads, what it refuses, and what the messages say."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random
from typing import Any

import malformed_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_llm.config import LLMConfig
from recbole_llm.data import atomic_files
from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError, AtomicFormat
from recbole_llm.data.dataset import RankedTime
from recbole_llm.data.loading import create_dataset, data_preparation

HEADER = b"user_id:token\titem_id:token\ttimestamp:float\n"


def table(folder: Path, content: bytes, **form: str) -> AtomicFile:
    path = folder / "toy.inter"
    path.write_bytes(content)
    return AtomicFile(path, AtomicFormat(**form))


def read(folder: Path, content: bytes, **form: str) -> dict[str, list[Any]]:
    file = table(folder, content, **form)
    return {name: values.tolist() for name, values in file.read([*file.types]).items()}


EXPECTED = {"user_id": ["u1", "u2"], "item_id": ["é", 'a "b'], "timestamp": [1.0, -20.5]}
PLAIN = HEADER + 'u1\té\t1\nu2\ta "b\t-2.05e1\n'.encode()


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (PLAIN, {}),
        (PLAIN.removesuffix(b"\n"), {}),
        (PLAIN.replace(b"\n", b"\r\n"), {}),
        (PLAIN.replace(b"\n", b"\r\n").removesuffix(b"\n"), {}),
        (PLAIN.replace(b"\n", b"\n\n") + b"\n\r\n", {}),
        (b"\xef\xbb\xbf" + PLAIN, {}),
        (PLAIN.replace(b"\t", b","), {"field_separator": ","}),
        (PLAIN.replace(b"\t", b"::"), {"field_separator": "::"}),
        (PLAIN.decode().encode("latin-1"), {"encoding": "latin-1"}),
        (PLAIN.decode().encode("utf-16"), {"encoding": "utf-16"}),
        (PLAIN.replace(b"\t1\n", b"\t 1 \n"), {}),
    ],
)
def test_what_is_certain_is_read(content: bytes, form: dict[str, str], tmp_path: Path) -> None:
    assert read(tmp_path, content, **form) == EXPECTED


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_BLOCK", 3)
    assert read(tmp_path, PLAIN.replace(b"\n", b"\r\n\n")) == EXPECTED
    with pytest.raises(AtomicFileError, match="line 4, column timestamp: 'x'"):
        read(tmp_path, PLAIN + b"u3\ti\tx\n")


def test_a_file_without_line_feeds_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_BLOCK", 8)
    monkeypatch.setattr(atomic_files, "_LONGEST", 40)
    assert read(tmp_path, b"user_id:token\n" + b"u" * 39 + b"\n")["user_id"] == ["u" * 39]
    for content in (b"user_id:token\n" + bytes(1000), bytes(1000)):  # as a file with a hole has them
        with pytest.raises(AtomicFileError, match=r"toy\.inter: a line has more than 40 characters"):
            read(tmp_path, content)


def test_separators_of_several_characters_do_not_join_lines(tmp_path: Path) -> None:
    assert read(tmp_path, b"a:token::b:token\nx::a:\ny::b\n", field_separator="::") == {"a": ["x", "y"], "b": ["a:", "b"]}


def test_cells_are_not_interpreted(tmp_path: Path) -> None:
    words = ["NA", "null", "nan", '"', "'a", "#x", "\\N", " b ", "a\rb", "a\u2028b", "a\x85b", "007", "1e5"]
    content = "a:token\tb:token_seq\n" + "".join(f"{word}\t{word}\n" for word in words)
    assert read(tmp_path, content.encode()) == {"a": words, "b": words}


def test_an_empty_number_is_missing_and_text_stays_text(tmp_path: Path) -> None:
    file = table(tmp_path, b"a:float\tb:float_seq\n\t1 2\n1.50\t\n")
    columns = file.read(["a", "b"])
    assert np.isnan(columns["a"][0]) and columns["a"][1] == 1.5 and columns["b"].tolist() == ["1 2", ""]
    assert file.read(["a"], as_text=True)["a"].tolist() == ["", "1.50"]


ROWS = b"u1\ti1\t1\nu2\ti2\t2\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"toy\.inter, line 1: there is no header"),
        (b"\n" + ROWS, "line 1: there is no header"),
        (HEADER, "has a header and no rows"),
        (ROWS, "line 1: 'u1' is not a cell of a header; that is name:type.* token, float, token_seq, float_seq"),
        (b"user_id\titem_id\n" + ROWS, "line 1: 'user_id' is not a cell of a header"),
        (HEADER.replace(b"float", b"int") + ROWS, "line 1: 'timestamp:int' is not"),
        (HEADER.replace(b"item_id", b" item_id") + ROWS, "line 1: ' item_id:token' is not"),
        (HEADER.replace(b"\n", b"\t\n") + ROWS, "line 1: '' is not"),
        (HEADER.replace(b"item_id", b"user_id") + ROWS, "line 1: there are two columns 'user_id'"),
        (HEADER.replace(b"\t", b","), "if ',' separates the columns, set field_separator to it"),
        ((HEADER + ROWS).replace(b"\n", b"\r"), "a carriage return alone ends the lines"),
        (HEADER + ROWS.replace(b"\t", b","), "line 2: 1 cells, but the header has 3 .*'u1,i1,1'.* set field_separator"),
        (HEADER + ROWS.replace(b"1\n", b"1\t\n"), "line 2: 4 cells, .* remove the separator at the end of the line"),
        (HEADER + ROWS + b"u3\ti3", "line 4: 2 cells, but the header has 3 .*'u3.ti3'; a missing value is an empty cell"),
        (HEADER + ROWS + b"u3\ti3\tx\t3\n", r"line 4: 4 cells.* a value contains '\\t'"),
        (HEADER + ROWS + b"u3\ti3\t2020-01-31\nu4\ti4\t2020-02-01\n", "timestamp: '2020-01-31' .*to_datetime.*2 such rows"),
        *((HEADER + ROWS + b"u3\ti\t%b\n" % value, "line 4, column timestamp: .* is not a number; write it as 3.5")
          for value in (b"0x1F", b"1_000", b"nan", b"inf", b"1,5", b"--1", b".", b" ", b"\xd9\xa3", b"1\r1")),
        (HEADER + ROWS + b"u3\ti\t9007199254740993\n", "'9007199254740993' has more digits than a float64 holds"),
        (HEADER + ROWS + b"u3\ti\t1e999\n", "'1e999' has more digits"),
        (b"\xff\xfe" + (HEADER + ROWS).decode().encode("utf-16-le"), "mark of utf-16, but encoding is utf-8; set encoding to"),
        (HEADER + ROWS + b"u3\tAm\xe9lie\t3\n", r"line 4: b'u3\\tAm\\xe9lie\\t3\\n' is not text in utf-8 .*such as latin-1"),
        (b"a:float_seq\n1 2\n3 x\n", "line 3, column a: '3 x' is not a number"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused_by_file_line_column_and_value(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(AtomicFileError, match=message) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "toy.inter") in str(caught.value)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"field_separator": ""}, "field_separator: '' cannot separate cells"),
        ({"seq_separator": "\n"}, "seq_separator: .* cannot separate"),
        ({"encoding": "utf-99"}, "encoding: 'utf-99' is not an encoding"),
        ({"encoding": "hex"}, "encoding: 'hex' is not an encoding"),
    ],
)
def test_formats_that_do_not_exist(form: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtomicFormat(**form)


# -- datasets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    malformed_files.write(tmp_path)
    return tmp_path / "toy"


def load(toy: Path, **values: Any) -> Any:
    return create_dataset(LLMConfig("Pop", "toy", config_dict={"data_path": str(toy.parent), **values}))


def change(file: Path, before: str, after: str, count: int = -1) -> None:
    content = file.read_text(encoding="utf-8")
    assert before in content
    file.write_text(content.replace(before, after, count), encoding="utf-8", newline="")


def test_texts_and_interactions_of_another_separator_and_encoding(toy: Path) -> None:
    expected = load(toy)
    for file in ("toy.inter", "toy.item"):
        content = (toy / file).read_text(encoding="utf-8").replace(",", "").replace("\t", ",")
        (toy / file).write_text(content, encoding="latin-1")
    found = load(toy, field_separator=",", encoding="latin-1")
    assert found.inter_feat.equals(expected.inter_feat)
    assert found.item_texts.titles == [title.replace(",", "") for title in expected.item_texts.titles]
    with pytest.raises(AtomicFileError, match=r"toy\.inter, line 1: .* if ',' separates the columns"):
        load(toy, encoding="latin-1")


def test_separators_can_stand_beside_the_data(toy: Path) -> None:
    for file in ("toy.inter", "toy.item"):
        content = (toy / file).read_text(encoding="utf-8").replace("\t", "|")
        (toy / file).write_text(content, encoding="utf-16")
    (toy / "toy.yaml").write_text("field_separator: '|'\nencoding: utf-16\n")
    assert load(toy).item_texts.titles[1].startswith("The ")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("u1\t", "\t", r"toy\.inter, line 7, column user_id: '' is an empty id.* \(5 such rows\)"),
        ("\ti4", "\t i4", "column item_id: ' i4' is an id with a control character, or with white space"),
        ("\ti4", "\ti4\x07", "is an id with a control character"),
        ("\ti4", "\t[PAD]", "is RecBole's name of the padding id"),
        ("\t1600000001", "\t", "column timestamp: '' is a missing value.* fill it in or remove the row"),
        ("timestamp:float", "timestamp:token", "line 1: timestamp:token is the column of TIME_FIELD, which must be a float"),
        ("user_id:token", "user_id:float", "line 1: user_id:float is the column of USER_ID_FIELD, which must be a token"),
        ("user_id:token", "user:token", "USER_ID_FIELD: there is no column 'user_id' in .*its columns are user, item_id"),
    ],
)
def test_columns_that_an_interaction_needs(before: str, after: str, message: str, toy: Path) -> None:
    change(toy / "toy.inter", before, after)
    with pytest.raises(AtomicFileError, match=message):
        load(toy)


def test_a_missing_rating_is_refused_if_ratings_are_read(toy: Path) -> None:
    change(toy / "toy.inter", "\t1\t1600000000", "\t\t1600000000", 1)
    assert "rating" not in load(toy).inter_feat
    with pytest.raises(
        AtomicFileError, match=r"line 2, column rating: '' is a missing value.* or leave the column out of load_col"
    ):
        load(toy, load_col={"inter": ["user_id", "item_id", "rating", "timestamp"]})


def test_a_missing_feature_of_an_item_is_reported(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(toy / "toy.item", "\t1990\t", "\t\t")
    feat = load(toy, load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "year", "genre"]}).item_feat
    assert "toy.item: 1 of 9 rows have no year; RecBole takes the mean of the others" in caplog.text
    assert feat["year"][1] == np.mean([*range(1991, 1999)])


def test_ids_that_differ_in_how_a_number_is_written(toy: Path) -> None:
    change(toy / "toy.item", "\n265\t", "\n265.0\t")
    with pytest.raises(
        AtomicFileError, match=r"1 of 9 ids .*toy\.item: '265' in \.inter seems to be '265\.0' there; write each id"
    ):
        load(toy)
    change(toy / "toy.inter", "\t265\t", "\t265.0\t", 1)
    with pytest.raises(AtomicFileError, match=r"toy\.inter, line \d+, column item_id: '265\.0' is also written as '265'"):
        load(toy)


@pytest.mark.parametrize("model", ["Pop", "TALLRec"])
def test_items_of_which_none_has_a_row_stop_every_model(model: str, toy: Path) -> None:
    content = (toy / "toy.item").read_text(encoding="utf-8").split("\n")
    (toy / "toy.item").write_text("\n".join([content[0], *(f"x{line}" for line in content[1:-1]), ""]), encoding="utf-8")
    with pytest.raises(AtomicFileError, match=r"9 of 9 ids of the interactions have no row in .*toy\.item: they are 'i0', "):
        load(toy)
    with pytest.raises(AtomicFileError, match="no row in"):
        load(toy, load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"]})


def test_a_damaged_item_file_is_not_taken_for_a_missing_one(toy: Path) -> None:
    (toy / "toy.item").unlink()
    assert load(toy).catalogue_titles[1].startswith(("i", "2"))
    (toy / "toy.item").write_bytes(b"item_id:token\ttitle:token_seq\ni1\n")
    with pytest.raises(AtomicFileError, match=r"toy\.item, line 2: 1 cells"):
        load(toy)


def test_rows_that_repeat_an_item_are_counted_and_the_first_counts(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(toy / "toy.item", "a", encoding="utf-8") as file:
        file.write("i1\tanother title\t2001\tdrama\n")
    dataset = load(toy)
    assert "1 rows repeat a item_id, the first is 'i1'; the first row of each counts" in caplog.text
    assert not any("another" in title for title in dataset.item_texts.titles)


def test_files_that_are_split_already_form_one_table(toy: Path) -> None:
    header, *lines = (toy / "toy.inter").read_text().splitlines()
    for part, rows in {"a": lines[::2], "b": lines[1::2], "c": lines[:3]}.items():
        (toy / f"toy.{part}.inter").write_text("\n".join([header, *rows, ""]))
    given = {"benchmark_filename": ["a", "b", "c"], "load_col": None, "rm_dup_inter": None}
    assert len(load(toy, **given).inter_feat) == len(lines) + 3
    change(toy / "toy.c.inter", "rating:float", "stars:float")
    with pytest.raises(
        AtomicFileError, match=r"benchmark_filename: .*toy\.a\.inter has the columns .*rating.*toy\.c\.inter has .*stars"
    ):
        load(toy, **given)
    change(toy / "toy.c.inter", "stars:float", "rating:float")
    change(toy / "toy.c.inter", "\ti0\t", "\t265.0\t", 1)
    with pytest.raises(AtomicFileError, match=r"benchmark_filename: item_id '265\.0' .* is also written as '265'"):
        load(toy, **given)


def test_filters_that_leave_nothing_are_named(toy: Path) -> None:
    with pytest.raises(
        ValueError, match=r"toy: the filters leave no row of \.inter; relax them .*user_inter_num_interval: \[99,inf\)"
    ):
        load(toy, user_inter_num_interval="[99,inf)")


def test_every_column_is_read_as_recbole_reads_it(toy: Path) -> None:
    """A file without quotation marks, missing values and other odd things: RecBole's frames, token for token."""
    from recbole.data.dataset import Dataset

    class ByRecBole(RankedTime, Dataset):
        _load_feat = Dataset._load_feat

    change(toy / "toy.item", '"', "")
    values = {"load_col": None, "seq_len": {"title": 2}, "data_path": str(toy.parent), "rm_dup_inter": None}
    config = LLMConfig("Pop", "toy", config_dict=values)
    ours, theirs = create_dataset(config), ByRecBole(config)
    for name in ("inter_feat", "item_feat"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert [*found] == [*expected]
        for column in found:
            rows = zip(found[column], expected[column], strict=True)
            assert all(np.array_equal(a, b) for a, b in rows), column
    for attribute in ("field2type", "field2source", "field2seqlen", "field2bucketnum"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert all(ours.field2id_token[name].tolist() == tokens.tolist() for name, tokens in theirs.field2id_token.items())


def test_a_knowledge_graph_is_read_by_the_same_rules(tmp_path: Path) -> None:
    config = LLMConfig("CKE", "ml-100k")
    dataset = create_dataset(config)
    assert (dataset.entity_num, len(dataset.kg_feat), len(dataset.item2entity)) == (34629, 91631, 1598)
    assert len(data_preparation(config, dataset)) == 3


# -- any damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], LLMConfig]:
    folder = tmp_path_factory.mktemp("damage")
    return folder, malformed_files.write(folder), malformed_files.settings(folder)


@given(rng=st.randoms(use_true_random=False), suffix=st.sampled_from(["inter", "item"]))
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_damaged_file_is_refused_by_name_or_read_as_the_reference_reads_it(
    damage: tuple[Path, dict[str, bytes], LLMConfig], rng: Random, suffix: str
) -> None:
    folder, files, config = damage
    logging.disable(logging.ERROR)
    file = folder / "toy" / f"toy.{suffix}"
    try:
        content, names = malformed_files.damaged(rng, files[suffix])
        file.write_bytes(content)
        malformed_files.outcome(config, folder)
    finally:
        file.write_bytes(files[suffix])
        logging.disable(logging.NOTSET)
