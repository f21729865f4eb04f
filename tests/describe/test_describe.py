"""What ``recbole-llm data describe`` says of datasets whose facts are known, and when it says that a model lacks something."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from recbole_llm import cli, registry
from recbole_llm.describe.facts import Description, describe
from recbole_llm.describe.needs import Need
from recbole_llm.describe.words import in_words
from tests.conftest import write_rows

# two rows of u1 and a are equal but for the time, two of u2 and b are equal; e is the test item of u3 alone
ROWS = [
    *(("u1", item, 10.0 * place) for place, item in enumerate("abcda")),
    *(("u2", item, 1.0) for item in "bacb"),
    *(("u3", item, 2.0 + place) for place, item in enumerate("abce")),
    *(("u4", item, 3.0 + place) for place, item in enumerate("dcba")),
]
ITEMS = "item_id:token\tname:token_seq\tshelf:token\n" + "".join(
    f"{item}\t{name}\t{shelf}\n"
    for item, name, shelf in [
        ("a", "Dune", "novels"),
        ("b", "Dune", "novels"),
        ("c", "", "novels"),
        ("d", "Atlas of the world", "maps"),
    ]
)


def library(folder: Path, items: str = ITEMS) -> str:
    """A dataset of a few books without a property file; returns the argument that finds it."""
    write_rows(folder, "books", ROWS)
    if items:
        (folder / "books" / "books.item").write_text(items)
    return f"--data_path={folder}"


def need(found: Description, model: str) -> Need:
    (own,) = [one for one in found.needs if model in one.models]
    return own


def test_facts_of_a_dataset_that_is_known(tmp_path: Path, tiny_lm: Path) -> None:
    from transformers import AutoTokenizer

    found = describe("books", cmd_line=[library(tmp_path), f"--llm_path={tiny_lm}"])
    assert found.passport["read"] == {"users": 4, "items": 5, "interactions": 17}
    assert [found.passport["counts"][name] for name in ("users", "items", "interactions")] == [4, 5, 15]
    assert found.per_user.tolist() == [4, 3, 4, 4] and sorted(found.per_item.tolist()) == [1, 2, 4, 4, 4]
    assert found.passport["repeats"]["dropped"] == 2 and found.equal_rows == 1 and not found.repeats_kept
    assert found.tied == 3 / 15  # those of u2
    assert found.times is not None and found.times.max() == 30
    assert (found.cold_items, found.cold_targets) == (1, 1 / 3)  # of u1, u3 and u4, who have four items
    assert found.titles is not None and found.titles.columns == {"title_field": "name"}
    assert (found.titles.untitled, found.titles.without_row, found.titles.shared) == (2, 1, 2)
    names = ["Dune (a)", "Dune (b)", "item c", "Atlas of the world", "item e"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    assert sorted(found.titles.tokens.tolist()) == sorted(len(tokenizer.tokenize(name)) for name in names)
    said = in_words(found)
    assert re.search("^targets +3 of validation, 3 of test$", said, re.MULTILINE)
    assert "2 dropped (rm_dup_inter: first); 1 rows repeat the time, too" in said
    assert "1 of 5 items have no training interaction" in said and "33.3% of the test users" in said


def test_repeats_that_are_kept_are_counted(tmp_path: Path) -> None:
    found = describe("books", cmd_line=[library(tmp_path), "--rm_dup_inter=~"])
    assert found.repeats_kept and found.equal_rows == 1 and found.passport["counts"]["interactions"] == 17
    assert "kept (rm_dup_inter: ~); users knew" in in_words(found)


@pytest.mark.parametrize("model", ["LoRACocktail", "WeaveRec"])
def test_a_model_of_domains_needs_categories_or_other_datasets(tmp_path: Path, model: str) -> None:
    path = library(tmp_path)
    lacking = need(describe("books", cmd_line=[path]), model).missing
    assert "no category_field for views" in lacking and "shelf" in lacking
    cut = describe("books", cmd_line=[path, "--category_field=shelf", "--domain_min_users=2"])
    assert need(cut, model).missing == "" and need(cut, model).found == "views by shelf: novels (2 users)"
    key = {"LoRACocktail": "general_datasets", "WeaveRec": "source_datasets"}[model]
    assert need(describe("books", cmd_line=[path, f"--{key}=['films']"]), model).found == f"{key}: films"


def test_a_dataset_without_titles(tmp_path: Path) -> None:
    found = describe("books", cmd_line=[library(tmp_path, items="")])
    assert found.titles is None and "books.item, does not exist; recbole-llm data convert --items=FILE" in found.no_titles
    assert "no titles, see above" in need(found, "TALLRec").missing and len(need(found, "TALLRec").missing) < 40
    for model, cls in ((name, registry.get_model(name)) for name in registry.MODELS if name != "Imported"):
        assert bool(need(found, model).missing) == cls.uses_item_text, model
    assert need(found, "SASRec").missing == "" and "titles" in in_words(found)


def test_a_dataset_without_times(tmp_path: Path) -> None:
    path = library(tmp_path)
    file = tmp_path / "books" / "books.inter"
    file.write_text("".join(line.rpartition("\t")[0] + "\n" for line in file.read_text().splitlines()))
    found = describe("books", cmd_line=[path])
    assert found.times is None and found.tied is None and "no column of times" in in_words(found)
    assert "TIME_FIELD" in need(found, "SASRec").missing and "TIME_FIELD" in need(found, "TALLRec").missing
    assert need(found, "Pop").missing == "" and "'order': 'RO'" in need(found, "Pop").found
    assert need(found, "AlphaRec").missing == ""  # which reads no histories


def test_files_that_are_split_already(tmp_path: Path) -> None:
    for part, places in {"train": range(4), "valid": [4], "test": [5]}.items():
        rows = [(f"u{user}", f"i{(user + place) % 9}", 1e9 + place) for user in range(8) for place in places]
        write_rows(tmp_path, "parts", rows, part)
    found = describe("parts", cmd_line=[f"--data_path={tmp_path}", "--benchmark_filename=['train', 'valid', 'test']"])
    assert found.passport["counts"]["targets"] == {"valid": 8, "test": 8} and found.per_user.tolist() == [6] * 8
    assert need(found, "SASRec").missing == "" and found.cold_targets == 0


def test_a_column_that_is_no_title_is_named(tmp_path: Path) -> None:
    found = describe("books", cmd_line=[library(tmp_path, ITEMS.replace("name:", "caption:"))])
    assert found.no_titles.endswith("books.item; its columns are item_id, caption, shelf")
    with pytest.raises(ValueError, match="title_field: there is no column 'titel' in .*; its columns are item_id, caption"):
        describe("books", cmd_line=[f"--data_path={tmp_path}", "--title_field=titel"])


def test_nobody_can_be_evaluated(tmp_path: Path) -> None:
    write_rows(tmp_path, "two", [("u1", "a", 1.0), ("u1", "b", 2.0), ("u2", "a", 3.0)])
    found = describe("two", cmd_line=[f"--data_path={tmp_path}"])
    assert found.cold_targets is None and "0 of validation, 0 of test" in in_words(found)


def test_every_model_belongs_to_one_family(data_path: Path) -> None:
    found = describe("tiny", cmd_line=[f"--data_path={data_path}"])
    named = [model for one in found.needs for model in one.models]
    assert len(named) == len(set(named))
    assert set(registry.MODELS) - set(named) == {"Imported"}  # which needs a file of predictions
    for name in set(named) - set(registry.MODELS):
        registry.check_name(name)


def test_the_command_prints_and_draws(
    data_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    cli.main(["data", "describe", "tiny", f"--data_path={data_path}", "--picture=tiny.png"])
    out = capsys.readouterr().out
    assert os.environ["MPLBACKEND"] == "agg"
    assert out.startswith("tiny: 60 users, 40 items") and out.endswith("tiny.png\n")
    assert "2001-09-09 to 2001-09-09 (UTC)" in out and "title: title, year: year" in out
    assert Path("tiny.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):  # before anything is read
        cli.main(["data", "describe", "nosuch", f"--data_path={data_path}", "--picture=tiny.jpg"])
    assert "give a name such as tiny.png" in capsys.readouterr().err


def test_a_picture_without_times_and_titles(tmp_path: Path) -> None:
    from recbole_llm.describe.picture import draw

    path = library(tmp_path, items="")
    found = describe("books", cmd_line=[path])
    draw(found, tmp_path / "a.png")
    object.__setattr__(found, "times", None)
    object.__setattr__(found, "per_item", np.array([], dtype=np.int64))
    draw(found, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000 < (tmp_path / "b.png").stat().st_size
