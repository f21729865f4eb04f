"""Views are datasets of their own, without an item in common, on which any model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_llm import cli
from recbole_llm.config import LLMConfig
from recbole_llm.data import domains, views
from recbole_llm.data.loading import create_dataset
from recbole_llm.quick_start import run_recbole_llm

ITEMS = {  # `a` has five items, `b` three and `c` two
    "i0": "a",
    "i1": "a",
    "i2": "a b",
    "i3": "a b",
    "i4": "a c",
    "i5": "b c",
    "i6": "",
    "i7": "d",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Eight users who saw the eight items in turn; a column of ratings, quotes and a Windows line end."""
    folder = tmp_path / "data" / "small"
    folder.mkdir(parents=True)
    rows = [f'{item}\tThe "{item}\t{kinds}' for item, kinds in ITEMS.items()]
    (folder / "small.item").write_text("\n".join(["item_id:token\tname:token_seq\tkind:token_seq", *rows]) + "\r\n")
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(8):
        lines += [f"u{user}\ti{(user + step) % 8}\t{step}.5\t{100 * user + step}" for step in range(8)]
    (folder / "small.inter").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def config(data: Path, **changes: Any) -> LLMConfig:
    given = {"title_field": "name", "category_field": "kind", "noun": "film", "domain_min_users": 1, "domain_max_views": 3}
    return LLMConfig("WeaveRec", "small", config_dict={"data_path": str(data), **given, **changes})


def written(data: Path, out: Path, **changes: Any) -> dict[str, list[list[str]]]:
    """Lines of the .inter file of each view, as cells."""
    ours = config(data, **changes)
    folders = views.write_views(ours, create_dataset(ours), out)
    return {f.name: [line.split("\t") for line in (f / f"{f.name}.inter").read_text().splitlines()] for f in folders}


def test_each_item_is_in_one_view_the_smallest_of_its_categories(small: Path, tmp_path: Path) -> None:
    found = written(small, tmp_path / "views")
    items = {name: {row[1] for row in rows[1:]} for name, rows in found.items()}
    assert items == {"small-a": {"i0", "i1"}, "small-b": {"i2", "i3"}, "small-c": {"i4", "i5"}}
    texts = (tmp_path / "views" / "small-b" / "small-b.item").read_text().splitlines()
    assert texts == ["item_id:token\tname:token_seq\tkind:token_seq", 'i2\tThe "i2\ta b', 'i3\tThe "i3\ta b']


def test_a_category_whose_items_are_all_in_smaller_ones_is_left_out(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = small / "small" / "small.item"
    file.write_text(file.read_text().replace('i0\tThe "i0\ta', 'i0\tThe "i0\ta c'))  # `a` keeps i1 alone
    found = written(small, tmp_path / "views")
    assert {name: {row[1] for row in rows[1:]} for name, rows in found.items()} == {
        "small-b": {"i2", "i3", "i5"},
        "small-c": {"i0", "i4"},
    }
    assert "view small-a: left out, 0 users have two of the items that no smaller view takes" in caplog.text


def test_lines_are_the_datasets_own_less_what_its_filters_leave_out(small: Path, tmp_path: Path) -> None:
    original = (small / "small" / "small.inter").read_text().splitlines()
    found = written(small, tmp_path / "whole")
    assert {"\t".join(row) for rows in found.values() for row in rows} <= set(original)
    assert all(rows[0] == original[0].split("\t") for rows in found.values())
    load = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    fewer = written(small, tmp_path / "fewer", val_interval={"rating": "[3,inf)"}, load_col=load)
    assert all(float(row[2]) >= 3 for rows in fewer.values() for row in rows[1:])


def test_no_view_trains_on_what_another_holds_out(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leave-one-out of each view, by user and item; of views that shared items this would not hold."""
    given = ["data_path", "category_field", "year_field", "domain_min_users"]
    cli.main(["views", *(f"--{key}={settings[key]}" for key in given), "--dataset=tiny", f"--out={tmp_path / 'views'}"])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "views" / name) for name in ("tiny-comedy", "tiny-drama")]
    trained, held_out = [], []
    for name in ("tiny-comedy", "tiny-drama"):
        view = LLMConfig("Pop", name, config_dict={"data_path": str(tmp_path / "views")})
        histories = create_dataset(view).histories
        of_user = {token: user for user, token in enumerate(histories.user_ids) if user}
        token = histories.item_ids
        trained.append({(u, token[i]) for u, user in of_user.items() for i in histories.train(user)})
        held_out.append({(u, token[i]) for u, user in of_user.items() for i in histories.items[user][-2:]})
    assert trained[0] and held_out[0] and not trained[0] & held_out[1] and not trained[1] & held_out[0]


def test_any_model_runs_on_a_view_and_reads_its_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    ours = LLMConfig("WeaveRec", "tiny", config_dict={**settings, "noun": "film"})
    views.write_views(ours, create_dataset(ours), tmp_path / "views")
    plain = {"data_path": str(tmp_path / "views"), "checkpoint_dir": settings["checkpoint_dir"], "show_progress": False}
    config = LLMConfig("SASRec", "tiny-drama", config_dict=plain)
    dataset = create_dataset(config)
    view = domains.of_dataset(config, dataset)
    assert view.noun == "film" and config["category_field"] == "genre" and view.items.titles[1].startswith("The ")
    assert all("drama" in kinds for kinds in view.items.fields["genre"][1:])
    result = run_recbole_llm("Pop", "tiny-drama", config_dict={**plain, "candidates": {"num_negatives": 5}})
    assert 0 < result["test_result"]["hit@5"] <= 1


def test_a_view_that_is_there_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    written(small, tmp_path / "views")
    with pytest.raises(FileExistsError, match="--out=.*small-a exists"):
        written(small, tmp_path / "views")


def test_two_categories_of_one_file_name_are_refused(small: Path, tmp_path: Path) -> None:
    file = small / "small" / "small.item"
    file.write_text(file.read_text().replace("a b", "x/y x.y").replace("a c", "x/y").replace("b c", "x/y"))
    with pytest.raises(FileExistsError, match="small-x_y exists"):
        written(small, tmp_path / "views")
    assert not (tmp_path / "views").exists()
