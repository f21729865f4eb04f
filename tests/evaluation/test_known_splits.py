"""A split is recognised under other ids, another order of rows and another separator, and a changed target is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from recbole_llm import cli, logs
from recbole_llm.config import LLMConfig
from recbole_llm.config.property_files import properties_folder
from recbole_llm.data.passport import differences, identity
from recbole_llm.evaluation.known_splits import describe, known_splits, recognise, write_passport
from recbole_llm.quick_start import run_recbole_llm

COLUMNS = ["user_id:token", "item_id:token", "timestamp:float"]


def made(users: int = 80, items: int = 60, *, tied: bool = False, seed: int = 0) -> pd.DataFrame:
    """Histories of popular and rare items at times of their own, or with every two items at the same time."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, items + 1)
    rows = []
    for user in range(users):
        chosen = rng.choice(items, int(rng.integers(5, 15)), replace=False, p=weights / weights.sum())
        rows += [(f"u{user}", f"i{item}", 1000 * user + (place // 2 if tied else place)) for place, item in enumerate(chosen)]
    return pd.DataFrame(rows, columns=COLUMNS)


def renamed(frame: pd.DataFrame) -> pd.DataFrame:
    """Other ids, whose alphabetical order is another one."""
    rng = np.random.default_rng(1)
    columns = {}
    for column in COLUMNS[:2]:
        own = frame[column].unique()
        columns[column] = frame[column].map({token: f"x{new}" for token, new in zip(own, rng.permutation(len(own)), strict=True)})
    return frame.assign(**columns)


def shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sample(frac=1, random_state=2)


@pytest.fixture
def passport(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes a frame as a dataset and returns its passport, without what a known list says."""

    def of(frame: pd.DataFrame, **changes: Any) -> dict[str, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "made").mkdir(parents=True)
        separator = changes.get("field_separator", "\t")
        frame.to_csv(folder / "made" / "made.inter", sep=separator, index=False)
        settings = {"data_path": str(folder), "checkpoint_dir": str(folder / "saved"), **changes}
        return write_passport(LLMConfig("Pop", "made", config_dict=settings))[0]

    return of


def known(passport: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"made": {"about": "a made dataset", **passport}}


def test_recognised_under_other_ids_rows_and_separators(passport: Callable[..., dict[str, Any]]) -> None:
    frame = made()
    one = passport(frame)
    other = passport(shuffled(renamed(frame)), field_separator=",")
    assert one["sha256"]["interactions"] != other["sha256"]["interactions"] and one["sha256"]["test"] != other["sha256"]["test"]
    assert all(one["sha256"][name] == other["sha256"][name] for name in ("histories", "targets"))
    found = recognise(other, known(one))
    assert found["recognised"] == found["nearest"] == "made" and found["targets_differ"] == 0
    assert found["verdict"] == "recognised: made, a made dataset; ids or the order of equal times differ"
    assert recognise(passport(shuffled(frame)), known(one))["verdict"] == "recognised: made, a made dataset"


def test_the_order_of_ties_is_told_but_does_not_hide_a_split(passport: Callable[..., dict[str, Any]]) -> None:
    frame = made(tied=True)
    one, other = passport(frame), passport(shuffled(renamed(frame)))
    found = recognise(other, known(one))
    assert found["recognised"] == "made" and 0.1 < found["targets_differ"] < 0.5  # half of the users end in a tie
    assert (
        f"{found['targets_differ']:.0%}".replace("%", " %") + " of the test targets are other items of the same time"
        in found["verdict"]
    )
    assert one["ties"]["tied_targets"]["test"] == pytest.approx((frame.groupby(COLUMNS[0]).size() % 2 == 0).mean())


@pytest.mark.parametrize("disguise", [lambda frame: frame, renamed], ids=["same ids", "other ids"])
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_one_changed_target_is_noticed(
    tied: bool, disguise: Callable[[pd.DataFrame], pd.DataFrame], passport: Callable[..., dict[str, Any]]
) -> None:
    frame = made(tied=tied)
    one = passport(frame)
    changed = frame.copy()
    last = frame.index[frame[COLUMNS[0]] == "u7"][-1]
    changed.loc[last, COLUMNS[1]] = next(
        f"i{item}" for item in range(60) if f"i{item}" not in set(frame.loc[frame[COLUMNS[0]] == "u7", COLUMNS[1]])
    )
    found = recognise(passport(disguise(changed)), known(one))
    assert found["recognised"] is None and found["nearest"] == "made" and found["verdict"].startswith("nearest known: made; ")
    if disguise is not renamed:
        assert found["targets_differ"] == pytest.approx(1 / 80)


def test_the_share_of_other_targets(passport: Callable[..., dict[str, Any]]) -> None:
    """The last two items of a quarter of the users change places."""
    frame = made()
    one = passport(frame)
    swapped = frame.copy()
    for _, rows in list(frame.groupby(COLUMNS[0]).groups.items())[:20]:
        swapped.loc[rows[-2:], COLUMNS[1]] = frame.loc[rows[-2:], COLUMNS[1]].to_numpy()[::-1]
    found = recognise(passport(swapped), known(one))
    assert found["targets_differ"] == pytest.approx(0.25) and found["recognised"] is None
    assert found["verdict"] == "nearest known: made; about 25 % of the targets differ"
    hidden = recognise(passport(renamed(swapped)), known(one))  # some swapped items are equally popular
    assert 0.2 <= hidden["targets_differ"] <= 0.25 and hidden["nearest"] == "made"


def test_fewer_users_are_near_and_other_data_is_not_known(passport: Callable[..., dict[str, Any]]) -> None:
    frame = made(users=300)
    one = passport(frame)
    fewer = passport(frame[~frame[COLUMNS[0]].isin(["u1", "u2", "u3"])])
    found = recognise(fewer, known(one))
    assert found["nearest"] == "made" and found["targets_differ"] < 0.02
    assert "297 users against 300" in found["verdict"] and "297 test targets against 300" in found["verdict"]
    hidden = recognise(passport(renamed(frame[frame[COLUMNS[0]] != "u1"])), known(one))
    assert hidden["nearest"] == "made" and "estimated from rounded popularities" in hidden["verdict"]
    unknown = recognise(passport(renamed(made(users=300, seed=5))), known(one))
    assert (unknown["recognised"], unknown["nearest"], unknown["targets_differ"]) == (None, None, None)
    few = recognise(passport(renamed(made(users=20, seed=5))), known(one))  # whose popularities all occur in the large split
    assert (few["recognised"], few["nearest"]) == (None, None)
    assert unknown["verdict"].startswith("not known") and recognise(one, {})["verdict"].startswith("not known")


def test_another_split_of_known_interactions(passport: Callable[..., dict[str, Any]]) -> None:
    frame = made()
    one = passport(frame)
    ratio = {"split": {"RS": [0.6, 0.2, 0.2]}, "mode": "full"}
    by_time, random = (passport(renamed(frame), eval_args={**ratio, "order": order}) for order in ("TO", "RO"))
    for other in (by_time, random):
        found = recognise(other, known(one))
        assert found["recognised"] is None and found["verdict"].startswith("another split of the interactions of made; ")
    assert by_time["counts"]["targets"]["test"] > 80 and "seed" in random["filters"] and "seed" not in by_time["filters"]
    again = passport(shuffled(frame), eval_args={**ratio, "order": "TO"})
    assert again["sha256"]["targets"] == by_time["sha256"]["targets"], "a ratio split by time survives a shuffle"
    assert random["sha256"]["targets"] != by_time["sha256"]["targets"]


def test_counts_before_and_after_the_filters(passport: Callable[..., dict[str, Any]]) -> None:
    frame = made()
    core = passport(frame, item_inter_num_interval="[5,inf)", user_inter_num_interval="[5,inf)")
    assert core["read"] == {"users": 80, "items": frame[COLUMNS[1]].nunique(), "interactions": len(frame)}
    counts = core["counts"]
    assert counts["items"] < core["read"]["items"] and counts["interactions"] < len(frame)
    assert counts["density"] == pytest.approx(counts["interactions"] / counts["users"] / counts["items"])
    assert core["filters"]["item_inter_num_interval"] == "[5,inf)"
    parts = differences(core, passport(frame))
    assert any(part.startswith("item_inter_num_interval [5,inf) against ") for part in parts)
    assert f"{counts['items']} items against {core['read']['items']}" in parts


def test_differences_name_what_differs(passport: Callable[..., dict[str, Any]]) -> None:
    frame = made()
    one = passport(frame)
    earlier = frame.copy()
    rows = frame.index[frame[COLUMNS[0]] == "u7"]
    earlier.loc[rows[:2], COLUMNS[1]] = frame.loc[rows[:2], COLUMNS[1]].to_numpy()[::-1]
    assert differences(passport(earlier), one) == ["the targets are the same, the interactions before them differ"]
    swapped = frame.copy()
    swapped.loc[rows[-3:-1], COLUMNS[1]] = frame.loc[rows[-3:-1], COLUMNS[1]].to_numpy()[::-1]
    assert differences(passport(swapped), one) == ["the validation targets differ, the test targets do not"]
    assert identity(one) == identity(passport(frame)) != identity(passport(swapped))


def test_the_passport_of_a_run_is_that_of_the_command(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {key: settings[key] for key in ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "epochs")}
    records = [
        json.loads(Path(run_recbole_llm(model, "tiny", config_dict=given)["record"]).read_text()) for model in ("Pop", "SASRec")
    ]
    monkeypatch.setattr(logs, "init_console", lambda **_: None)  # its handler would write to pytest's closed standard error
    cli.main(["data", "passport", "--dataset=tiny", *(f"--{key}={settings[key]}" for key in ("data_path", "checkpoint_dir"))])
    shown, (file,) = capsys.readouterr().out, (tmp_path / "saved" / "passports").iterdir()
    content = json.loads(file.read_text())
    facts = {name: content.pop(name) for name in ("repeats", "ties")}
    assert content == records[0]["passport"] == records[1]["passport"] and facts.items() <= records[0]["protocol"].items()
    assert shown.strip().endswith(str(file)) and records[0]["passport"]["sha256"]["targets"] in shown
    assert describe({**content, **facts}) in shown


def test_the_shipped_list_has_facts_and_no_data() -> None:
    splits = known_splits()
    assert {"ml-100k", "ml-1m", "amazon-beauty"} <= set(splits)
    for name, known in splits.items():
        assert set(known) == {"about", "sources", "read", "counts", "filters", "sha256", "sketches"}, name
        assert known["sources"] and all(len(digest) == 64 for digest in known["sha256"].values())
        assert all(len(bytes.fromhex(text)) == 1024 for text in known["sketches"].values())
        assert (properties_folder() / "splits" / f"{name}.yaml").stat().st_size < 12_000
        assert recognise({**known}, splits)["recognised"] == name


def test_the_split_of_ml_100k_is_recognised() -> None:
    found, _ = write_passport(LLMConfig("Pop", "ml-100k"))
    assert found["recognised"] == "ml-100k" and found["targets_differ"] == 0
    assert found["sha256"] == known_splits()["ml-100k"]["sha256"]
