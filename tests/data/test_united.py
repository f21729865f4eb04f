"""Two datasets are read as one, each through its own columns and filters."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.config.property_files import properties_folder
from recbole_llm.quick_start import run_recbole_llm
from tests.data.scenario_runs import build, own_data


def united(folder: Path) -> Path:
    (found,) = (path for path in (folder / "saved" / "datasets").iterdir() if path.is_dir())
    return found


def test_two_datasets_are_written_as_one_once(settings: dict[str, Any], data_path: Path, tmp_path: Path) -> None:
    built = build("SASRec", settings, train_dataset="other")
    folder = united(tmp_path)
    assert re.fullmatch(r"other\+tiny-[0-9a-f]{12}", folder.name)
    texts = (folder / "other+tiny.item").read_text().splitlines()
    assert texts[0] == "item_id:token\ttitle:token\tyear:token\tbrand:token\tcategory:token_seq\tdescription:token"
    assert "tiny/i3\tThe old river\t1983\t\tdrama|film\t" in texts  # year and category fields were given for this run
    assert "other/i3\tThe old river\t1983\t\tdrama|film\t" in texts  # of the other one, its columns have known names
    rows = [line.split("\t") for line in (folder / "other+tiny.inter").read_text().splitlines()[1:]]
    for dataset in ("other", "tiny"):
        source = [line.split("\t")[:2] for line in (data_path / dataset / f"{dataset}.inter").read_text().splitlines()[1:]]
        assert [[cell.removeprefix(f"{dataset}/") for cell in row[:2]] for row in rows if row[0].startswith(dataset)] == source
    names = built.splits[0].item_texts.names
    assert names[built.histories.item_ids.index("tiny/i3")] == "The old river (1983) (tiny/i3)"

    written = (folder / "MANIFEST.json").stat().st_mtime_ns
    build("BPR", settings, train_dataset="other", seed=3)
    assert (folder / "MANIFEST.json").stat().st_mtime_ns == written and united(tmp_path) == folder
    whole = (folder / "other+tiny.item").read_text()
    (folder / "other+tiny.item").write_text(whole[:99])
    build("BPR", settings, train_dataset="other")
    assert (folder / "other+tiny.item").read_text() == whole


def test_each_dataset_goes_through_its_own_filters(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(properties_folder(), tmp_path / "properties")
    monkeypatch.setattr("recbole_llm.config.property_files.properties_folder", lambda: tmp_path / "properties")
    (tmp_path / "properties" / "dataset" / "tiny.yaml").write_text("user_inter_num_interval: '[8,inf)'\n")
    filtered = build("Pop", settings).histories.user_ids[1:]
    users = build("Pop", settings, train_dataset="other").histories.user_ids[1:]
    assert len(filtered) < 60 and users == [f"other/u{user}" for user in range(60)] + [f"tiny/{user}" for user in filtered]


def test_a_dataset_without_titles_will_do_for_classical_models(
    settings: dict[str, Any], data_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = own_data(data_path, tmp_path / "bare", lambda rows: rows)
    (Path(folder) / "other" / "other.item").unlink()
    bare = {**settings, "data_path": folder, "train_dataset": "other"}
    assert len(build("Pop", bare).candidates["test"].users) == 60
    assert re.search(r"other\+tiny has no titles, because other has none: .*other\.item", caplog.text)
    with pytest.raises(FileNotFoundError, match=r"the file of item texts, .*other\+tiny\.item, does not exist"):
        run_recbole_llm("TALLRec", "tiny", config_dict=bare)


def test_a_category_of_several_words_stays_one(settings: dict[str, Any], data_path: Path, tmp_path: Path) -> None:
    folder = Path(own_data(data_path, tmp_path / "own", lambda rows: rows))
    for name in ("tiny", "other"):
        file = folder / name / f"{name}.item"
        file.write_text(file.read_text().replace("drama film", "drama|film noir"))
        (folder / name / f"{name}.yaml").write_text("seq_separator: '|'\n")
    texts = build("SASRec", {**settings, "data_path": str(folder)}, train_dataset="other").splits[0].item_texts
    found = {value for values in texts.values("category") for value in values}
    assert "film noir" in found and not any("," in value or value == "noir" for value in found)
