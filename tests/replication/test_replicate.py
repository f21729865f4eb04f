"""From a file of claims and run records to results and their page."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import recbole_llm
from recbole_llm import cli
from recbole_llm.leaderboard import runner
from recbole_llm.leaderboard.plan import read_plan
from recbole_llm.replication.claims import read_board, read_boards
from recbole_llm.replication.digest import BEGIN, END, digest, with_digest
from recbole_llm.replication.judged import judge
from recbole_llm.replication.measure import NotMeasuredError, _Runs
from recbole_llm.replication.page import page
from recbole_llm.replication.picture import rows
from recbole_llm.replication.replicate import replicate
from recbole_llm.replication.results import add, read_results
from recbole_llm.replication.verdicts import users_needed
from tests.replication.conftest import CLAIM, PASSPORT, USERS, ranks

ROOT = Path(recbole_llm.__file__).parents[1]
Write = Callable[..., Any]


def shown(file: Path, out: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The result of the claim ``better`` of a file, whose runs have their records, and its line of the page."""
    replicate([str(file)], changes, out=out, show=True)
    results = json.loads((out / "replication.json").read_text())["boards"].get(file.stem, {})
    (line,) = [line for line in (out / "replication.md").read_text().splitlines() if line.startswith("| **better.**")]
    return results.get("better", {}), line


def test_the_page_of_the_documentation_is_what_results_and_claims_render_to() -> None:
    results, boards = read_results(ROOT / "docs" / "replication.json"), read_boards()
    found = (ROOT / "docs" / "replication.md").read_text(encoding="utf-8")
    assert found.splitlines() == page(judge(results, boards), results, boards).splitlines()  # a diff of texts takes minutes


def test_the_table_of_the_readme_is_what_results_and_claims_render_to() -> None:
    results, readme = read_results(ROOT / "docs" / "replication.json"), (ROOT / "README.md").read_text(encoding="utf-8")
    judged = judge(results, read_boards())
    assert BEGIN in readme and END in readme and readme == with_digest(readme, judged, "docs/replication.md")


def test_a_readme_beside_the_folder_gets_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, unmarked = tmp_path / "README.md", f"Before\n{END}\n{BEGIN}\n"
    monkeypatch.setattr("recbole_llm.replication.replicate.read_boards", lambda names=(): read_boards(["zero-shot-ml-100k"]))
    for text, kept in ((f"Before\n{BEGIN}\nold\n{END}\nafter\n", False), (unmarked, True)):
        readme.write_text(text)
        replicate([], {}, out=tmp_path / "docs", show=True)
        assert (readme.read_text() == text) == kept
        head = "**4 claims**. 4 of our own, such as controls: 4 not run."
        assert readme.read_text().startswith("Before\n") and head in readme.read_text() or kept


def test_a_digest_names_the_decided_claims_of_each_paper_and_counts_others(board: Write, finish: Write, tmp_path: Path) -> None:
    models = {label: {"model": model} for label, model in (("new", "SASRec"), ("old", "GRU4Rec"), ("third", "BPR"))}
    claims = {
        "fails": {**CLAIM, "compare": {"better": "old", "worse": "new"}},
        "holds": {**CLAIM, "compare": {"better": "new", "worse": ["third", "old"]}},
        "holds|too": {**CLAIM, "own": True, "compare": {"better": "new", "worse": "third"}},
        "not run": {**CLAIM, "compare": {"better": "new", "worse": "old"}, "metric": "MRR@7"},
    }
    claims = {name: {**claim, "paper": "A paper (arXiv 1234.5)"} for name, claim in claims.items()}
    file = board({"models": models, "claims": claims})
    finish(file, {"new": 0.5, "old": 0.3, "third": 0.1})
    replicate([str(file)], {}, out=tmp_path, show=True)
    results, boards = read_results(tmp_path / "replication.json"), read_boards([str(file)])
    head, _, names, _, row = digest(judge(results, boards), "docs/page.md").splitlines()
    assert head == "**4 claims**. 3 of the papers: 1 holds, 1 does not hold, 1 not run. 1 of our own, such as controls: 1 holds."
    assert names == "| paper | measured on | holds | does not hold | others |"
    assert row == "| [A paper](docs/page.md#a-paper-arxiv-12345) | ml-100k | holds<br>*holds\\|too* | fails | 1 not run |"
    drawn = rows(judge(read_results(tmp_path / "replication.json"), read_boards([str(file)])))
    assert [(name, said, round(value, 6)) for name, said, value, _ in drawn["mine"]] == [
        ("fails", "does not hold", -0.2),
        ("holds", "holds", 0.2),
        ("holds|too", "holds", 0.4),
    ]
    assert "](replication.png)" in (tmp_path / "replication.md").read_text() and imread(tmp_path / "replication.png").ndim == 3


def test_the_result_is_the_paired_difference_over_users_averaged_over_seeds(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board()
    finish(file, {"new": 0.5, "old": 0.2})
    found, line = shown(file, tmp_path)
    (test,) = found["tests"]
    first, second = (np.mean([ranks(share, seed) == 1 for seed in (1, 2)], axis=0) for share in (0.5, 0.2))
    assert test["means"] == pytest.approx([first.mean(), second.mean()]) and test["users"] == USERS
    assert test["difference"] == pytest.approx(0.3) and test["interval"][0] > 0.2 and test["p_value"] < 1e-6
    assert found["seeds"] == [1, 2] and found["runs"] == 4 and found["seconds"] == 160
    assert "**holds**" in line and "new 0.500, old 0.200: +0.300" in line and "p < .001, n=200" in line


def test_a_name_may_be_a_number_or_have_a_bar_in_it(board: Write, tmp_path: Path) -> None:
    replicate([str(board({"claims": {"a|b": CLAIM, 7: CLAIM}}))], {}, out=tmp_path, show=True)
    text = (tmp_path / "replication.md").read_text()
    assert "| **7.** The new" in text and "| **a\\|b.** The new" in text and "'--claim=a\\|b'" in text


def test_a_note_is_shown_and_neither_it_nor_own_is_a_change_of_the_claim(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board()
    finish(file, {"new": 0.5, "old": 0.2})
    before, _ = shown(file, tmp_path)
    after, line = shown(board(note="Another | model.", own=True), tmp_path)
    assert after["fingerprint"] == before["fingerprint"] and "earlier" not in after
    assert "| .9 against .1<br>*Note:* Another \\| model. |" in line and "**holds**" in line


def test_one_seed_is_said_at_the_top(board: Write, finish: Write, tmp_path: Path) -> None:
    for seeds in ([1], [1, 2]):
        file = board({"seeds": seeds})
        finish(file, {"new": 0.5, "old": 0.2})
        shown(file, tmp_path / str(len(seeds)))
    (one, two) = ((tmp_path / folder / "replication.md").read_text() for folder in "12")
    assert "- **One seed.**" in one and "- **One seed.**" not in two


def test_a_remark_stands_with_its_board(board: Write, tmp_path: Path) -> None:
    replicate([str(board({"remark": "Known | before."}))], {}, out=tmp_path, show=True)
    assert "- mine: Known \\| before.\n" in (tmp_path / "replication.md").read_text()


def test_there_is_nothing_of_a_single_user(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board(slice="cold")
    finish(file, {"new": 0.5, "old": 0.2})
    shown(file, tmp_path)
    assert not [user for user in range(USERS) if f'"u{user}"' in (tmp_path / "replication.json").read_text()]


@pytest.mark.parametrize(
    ("shares", "said"),
    [((0.2, 0.5), "does not hold"), ((0.3, 0.3), "does not hold"), ((0.31, 0.3), "not decidable here")],
)
def test_verdicts(shares: tuple[float, float], said: str, board: Write, finish: Write, tmp_path: Path) -> None:
    file = board(margin=0.02)
    finish(file, dict(zip(("new", "old"), shares, strict=True)))
    line, command = shown(file, tmp_path)[1], "recbole-llm replicate mine --claim=better --train_batch_size=64"
    assert f"**{said}**" in line
    assert (command in line) == ("not dec" in said) and "users would decide" not in line  # the interval is wide, as few differ


@pytest.mark.parametrize("ranking", ["candidates", "full"])
def test_rows_at_chance_decide_nothing(ranking: str, board: Write, finish: Write, tmp_path: Path) -> None:
    """Both have one hit of 200, and 20 candidates or a catalogue of 20 items: less than the .05 of a random ranking."""
    facts = {"candidates_sha256": {}, "passport": PASSPORT | {"counts": {"items": 20}}} if ranking == "full" else {}
    file = board(margin=0.2)
    finish(file, {"new": 0.005, "old": 0.005}, **facts)
    found, line = shown(file, tmp_path)
    assert found["tests"][0]["at_chance"] and "both at chance" in line
    assert "**not decidable here**" in line and "would decide" not in line
    finish(file, {"old": 0.5}, **facts)  # one that has learnt something
    found, line = shown(file, tmp_path)
    assert not found["tests"][0]["at_chance"] and "at chance" not in line and "**does not hold**" in line


def test_a_slice_is_tested_on_its_own_users(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board(slice="cold")
    finish(file, {"new": 0.5, "old": 0.2})
    test = shown(file, tmp_path)[0]["tests"][0]
    assert test["users"] == USERS // 4 and test["means"] == pytest.approx([1.0, 0.8])
    finish(file, {"new": 0.5, "old": 0.2}, slice_users={"cold": ["u0", "u199"]})  # not the users whose mean is recorded
    (tmp_path / "replication.json").unlink()
    assert shown(file, tmp_path)[0] == {}


def test_chance_and_numbers(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board(compare={"better": "new", "worse": "chance"})
    finish(file, {"new": 0.5, "old": 0.0})
    test = shown(file, tmp_path)[0]["tests"][0]
    assert test["means"] == pytest.approx([0.5, 0.05]) and test["interval"][0] > 0.35
    # no hit among 200 is below .05, but no exact 0: the interval of a proportion, not that of equal values
    file = board({"seeds": [1]}, compare={"better": "chance", "worse": "old"})
    test = shown(file, tmp_path)[0]["tests"][0]
    assert test["interval"][0] == pytest.approx(0.05 - 0.0183, abs=1e-3) and test["interval"][1] == 0.05
    assert 0.95**USERS <= test["p_value"] < 1e-4
    file = board(compare={"better": "new", "worse": 0.6})
    assert shown(file, tmp_path)[0]["tests"][0]["difference"] == pytest.approx(-0.1)


def test_places_after_the_first_are_compared_with_a_random_order(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board(compare={"equal": ["new", {"random_after_first": "new"}]}, metric="NDCG@3", margin=0.05)
    finish(file, {"new": 0.4})  # ranks after the first are random
    found, line = shown(file, tmp_path)
    tail = (1 / np.log2(3) + 1 / np.log2(4)) / 19
    assert found["tests"][0]["means"][1] == pytest.approx(0.4 + 0.6 * tail)
    assert "**holds**" in line and "equal within 0.05" in line


def test_a_claim_against_several_rows(board: Write, finish: Write, tmp_path: Path) -> None:
    models = {"new": {"model": "SASRec"}, "old": {"model": "GRU4Rec"}, "third": {"model": "BPR"}}
    file = board({"models": models}, compare={"better": "new", "worse": ["old", "third"]})
    finish(file, {"new": 0.5, "old": 0.2, "third": 0.6})
    found, line = shown(file, tmp_path)
    assert [test["worse"] for test in found["tests"]] == ["old", "third"] and "**does not hold**" in line
    line = shown(board({"models": models}, compare={"not_worse": "third", "than": ["new", "old"]}), tmp_path)[1]
    assert "**holds**" in line and "not worse by 0.02" in line


def test_facts_are_read_from_the_records(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board(facts={"weight": ["new", "merge", "weights", "a|b"], "none": ["new", "merge", "nothing"]})
    finish(file, {"new": 0.5, "old": 0.2}, merge={"weights": {"a|b": 0.875}})
    assert "<br>weight: 0.875 |" in shown(file, tmp_path)[1]


def test_a_measurement_of_the_record_is_compared_with_a_number(board: Write, finish: Write, tmp_path: Path) -> None:
    path = ["new", "merge", "report", "correlation"]
    file = board(compare={"better": 0, "worse": {"recorded": path}}, margin=0.3)
    finish(file, {"new": 0.5}, merge={"report": {"correlation": {"value": -0.8, "interval": [-0.9, -0.2]}}})
    found, line = shown(file, tmp_path)
    test = found["tests"][0]
    assert test["difference"] == 0.8 and test["interval"] == [0.2, 0.9] and test["means"] == [0.0, -0.8]
    assert "**holds**" in line and "report correlation of new -0.800: +0.800 [+0.200, +0.900]" in line and "n=" not in line
    file = board(compare={"better": {"recorded": path}, "worse": 0}, margin=0.3)
    assert shown(file, tmp_path)[0]["tests"][0]["interval"] == [-0.9, -0.2]
    finish(file, {"new": 0.5}, merge={"report": {}})
    (tmp_path / "replication.json").unlink()
    assert shown(file, tmp_path)[0] == {}


def test_records_of_other_code_are_judged_and_named(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board()
    finish(file, {"new": 0.5, "old": 0.2})
    assert "other_code" not in shown(file, tmp_path)[0] and "another version" not in (tmp_path / "replication.md").read_text()
    finish(file, {"new": 0.5}, seeds=(2,), code="0" * 64)
    found, line = shown(file, tmp_path)
    assert found["other_code"] == ["new"] and "**holds**" in line
    assert "\n- mine: another version of the code wrote the records of new\n" in (tmp_path / "replication.md").read_text()


def test_a_claim_without_records_keeps_its_row_and_its_result(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board()
    assert "**not run**<br>`recbole-llm replicate mine --claim=better --train_batch_size=64" in shown(file, tmp_path)[1]
    finish(file, {"new": 0.5, "old": 0.2})
    before = shown(file, tmp_path)[0]
    for record in Path("saved/runs").glob("*/record.json"):
        record.unlink()
    assert shown(file, tmp_path)[0] == before
    text = (tmp_path / "replication.md").read_text()
    assert replicate([], {}, out=tmp_path, show=True)[1] == 0  # the file is not named: its measured claim stays on the page
    assert "## Measured, of files that were not named" in (tmp_path / "replication.md").read_text() and "not named" not in text
    board({"claims": {"best": CLAIM}})
    replicate([str(file)], {}, out=tmp_path, show=True)  # the file has another claim in place of the measured one
    assert "## Measured and withdrawn" in (tmp_path / "replication.md").read_text() and "withdrawn" not in text


def test_with_some_seeds_the_page_says_which(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board()
    finish(file, {"new": 0.5, "old": 0.2}, seeds=(1,))
    finish(file, {"new": 0.5}, seeds=(2,))
    assert shown(file, tmp_path)[0]["seeds"] == [1]


def test_rows_without_a_common_seed_are_told_with_their_seeds(
    board: Write, finish: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"new": {"model": "SASRec"}, "old": {"model": "GRU4Rec", "seeds": [3, 4]}}
    file = board({"models": models})
    finish(file, {"new": 0.5, "old": 0.2}, seeds=(1, 2, 3, 4))
    assert shown(file, tmp_path)[0] == {}
    assert "its rows have no finished seed in common (new: 1, 2; old: 3, 4)" in caplog.text


@pytest.mark.parametrize("changes", [{"margin": 0.4}, {"metric": "NDCG@3"}, {"claim": "It is hardly worse."}])
def test_a_claim_that_is_changed_after_its_run_is_marked(
    changes: dict[str, Any], board: Write, finish: Write, tmp_path: Path
) -> None:
    file = board()
    finish(file, {"new": 0.5, "old": 0.2})
    replicate([str(file)], {}, out=tmp_path, show=True)
    results = read_results(tmp_path / "replication.json")
    file = board(**changes)
    assert "**changed after its run**" in page(judge(results, [read_board(file)]), results, [read_board(file)])
    found, line = shown(file, tmp_path)  # and measured again, the earlier form stays
    assert "changed after" not in line and found["earlier"][0]["claim"]["margin"] == CLAIM["margin"]
    assert "before it was changed: The new model is better." in (tmp_path / "replication.md").read_text()


def test_the_rows_are_part_of_the_claim_and_other_rows_are_not(board: Write) -> None:
    def identity(file: Path) -> str:
        own = read_board(file)
        return own.fingerprint(own.claims[0])

    before = identity(board())
    models = {"new": {"model": "SASRec"}, "old": {"model": "GRU4Rec"}}
    assert identity(board({"models": {**models, "more": {"model": "BPR"}}})) == before
    assert identity(board({"models": {**models, "old": {"model": "GRU4Rec", "settings": {"epochs": 1}}}})) != before
    assert identity(board({"seeds": [1, 2, 3]})) != before


def test_so_is_what_stands_in_their_files_of_settings(board: Write, tmp_path: Path) -> None:
    tuned, found = tmp_path / "tuned.yaml", []
    for text in ("epochs: 3\n", "epochs: 3  # of a search\n", "epochs: 4\n"):
        tuned.write_text(text)
        models = {"new": {"model": "SASRec", "config_files": str(tuned)}, "old": {"model": "GRU4Rec"}}
        own = read_board(board({"models": models}))
        found.append(own.fingerprint(own.claims[0]))
    assert found[0] == found[1] != found[2]


def test_keys_of_the_command_line_are_shown_with_the_result(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board({"settings": {"epochs": 3}})
    finish(file, {"new": 0.5, "old": 0.2})
    file = board()
    found, line = shown(file, tmp_path, epochs=3, show_progress=False)
    assert found["changes"] == {"epochs": 3} and "with `--epochs=3`" in line and "**holds**" in line


def test_a_result_of_other_settings_or_fewer_seeds_does_not_replace_one(board: Write, finish: Write, tmp_path: Path) -> None:
    file = board()
    finish(file, {"new": 0.5, "old": 0.2})
    whole, _ = shown(file, tmp_path)
    file = board({"settings": {"epochs": 3}})
    finish(file, {"new": 0.3, "old": 0.2})
    other, _ = shown(board(), tmp_path, epochs=3)
    assert other["changes"] == {"epochs": 3} and other["earlier"] == [whole]
    assert "an earlier result (seeds 1, 2): new 0.500, old 0.200: " in (tmp_path / "replication.md").read_text()
    again, _ = shown(board(), tmp_path)
    assert again["tests"] == whole["tests"] and "with `--epochs=3`" in (tmp_path / "replication.md").read_text()
    two, one = {**whole, "seeds": [1, 2]}, {**whole, "seeds": [1]}
    results: dict[str, Any] = {}
    for found in (one, two, one):
        add(results, "mine", "better", found)
    assert results["mine"]["better"]["earlier"] == [two]
    add(results, "mine", "better", {**one, "commits": ["another"]})
    assert results["mine"]["better"]["earlier"] == [two, one]


@pytest.mark.parametrize("source", ["retriever", "file"])
def test_chance_is_unknown_where_a_target_may_be_missing(source: str, board: Write, finish: Write, tmp_path: Path) -> None:
    file = board({"settings": {"candidates": {"source": source}}}, compare={"better": "new", "worse": "chance"})
    cell = SimpleNamespace(
        record={"config": {"candidates": {"source": source, "num_negatives": 19}}, "candidates_sha256": {"test": "a"}}
    )
    runs = _Runs(read_board(file).claims[0], {"new": {1: cell}}, (1,))  # type: ignore[dict-item]
    with pytest.raises(NotMeasuredError, match="chance is known for drawn candidates alone"):
        runs.expected(1)


def test_a_row_of_one_seed_is_compared_whatever_seed_has_failed_beside_it(board: Write, finish: Write, tmp_path: Path) -> None:
    """The others have seed 2 alone; a shortcut has the first one, 1, and here other candidates."""
    file = board({"shortcuts": True, "models": {"new": {"model": "SASRec"}}}, compare={"better": "new", "worse": "RecentPop"})
    finish(file, {"new": 0.5}, seeds=(2,))
    for candidates, measured in (("c" * 64, True), ("other", False)):
        finish(file, {"RecentPop": 0.2}, seeds=(1,), candidates_sha256={"test": candidates}, shortcut=True)
        (tmp_path / "replication.json").unlink(missing_ok=True)
        assert bool(shown(file, tmp_path)[0]) == measured


def test_a_row_of_one_seed_is_not_compared_with_seeds_that_have_other_targets(
    board: Write, finish: Write, tmp_path: Path
) -> None:
    file = board({"shortcuts": True, "models": {"new": {"model": "SASRec"}}}, compare={"better": "new", "worse": "RecentPop"})
    for label, seeds in (("new", (1, 2)), ("RecentPop", (1,))):
        for seed in seeds:  # a random split of each seed, ranked in full
            split = {"filters": {"seed": seed}, "sha256": dict.fromkeys(("interactions", "valid", "test"), str(seed))}
            full = {"candidates_sha256": {}, "protocol": {"mask_history": True}, "passport": split}
            finish(file, {label: 0.5}, seeds=(seed,), **full)
    assert shown(file, tmp_path)[0] == {}


def test_a_fact_of_a_run_without_a_sound_record_is_not_shown(
    board: Write, finish: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"new": {"model": "SASRec"}, "old": {"model": "GRU4Rec"}, "third": {"model": "BPR"}}
    file = board({"models": models}, facts={"time": ["third", "seconds", "train"]})
    finish(file, {"new": 0.5, "old": 0.2, "third": 0.1})
    assert "<br>time: 30.0 |" in shown(file, tmp_path)[1]
    finish(file, {"third": 0.1}, code="of another state")
    monkeypatch.setattr(runner, "run_process", lambda *_: "out of memory")
    replicate([str(file)], {}, out=tmp_path)
    assert read_results(tmp_path / "replication.json")["mine"]["better"]["facts"] == {"time": None}
    for task in read_plan(file, {}):
        task.record.write_text(
            task.record.read_text().replace("30.0", "31.0") if task.label == "third" else task.record.read_text()
        )
    assert "time:" not in shown(file, tmp_path)[1]


def test_the_users_that_decide_are_those_of_the_comparisons_that_are_open(board: Write, finish: Write, tmp_path: Path) -> None:
    models = {"new": {"model": "SASRec"}, "old": {"model": "GRU4Rec"}, "third": {"model": "BPR"}}
    compared = {"better": "new", "worse": ["third", "old"]}
    file = board({"models": models, "seeds": [1]}, compare=compared, margin=0.01)
    finish(file, {"new": 0.51, "old": 0.5, "third": 0.1})
    found, line = shown(file, tmp_path)
    decided, still_open = (users_needed(test, 0.01) for test in found["tests"])
    assert decided > still_open > USERS and f"{still_open:,} users would decide" in line
    file = board({"models": models, "seeds": [1]}, compare=compared, margin=0.9)  # fewer than there are
    few = {"users": 4, "differing": 4, "interval": [1.0, 1.0], "p_value": 0.125, "difference": 1.0, "deviation": 0.0}
    finish(file, {"new": 0.5, "old": 0.2, "third": 0.1})
    shown(file, tmp_path)
    results = read_results(tmp_path / "replication.json")
    results["mine"]["better"]["tests"] = [{"better": "new", "worse": worse, "means": [1, 0], **few} for worse in ("third", "old")]
    text = page(judge(results, [read_board(file)]), results, [read_board(file)])
    assert "**not decidable here**<br>`" in text


def test_a_board_of_the_package_that_is_given_by_its_file_is_the_same_board(tmp_path: Path) -> None:
    known = read_boards(["zero-shot-ml-100k"])
    given = os.path.relpath(known[0].file)
    assert read_boards([given]) == read_boards([given, "zero-shot-ml-100k"]) == known
    (tmp_path / known[0].file.name).write_text(known[0].file.read_text())
    with pytest.raises(ValueError, match=f"replicate: {tmp_path}.* has the name of .* rename it"):
        read_boards([str(tmp_path / known[0].file.name)])


def test_runs_are_made_once_and_failures_are_counted(board: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(runner, "run_process", lambda arguments, *_: started.append(arguments) or "out of memory")
    files, missing = replicate([str(board())], {}, out=tmp_path)
    assert len(started) == 4 and missing == 1 and [file.name for file in files] == ["replication.json", "replication.md"]


def test_one_claim_needs_the_runs_that_it_reads(
    board: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = {
        label: {"model": model} for label, model in (("new", "SASRec"), ("old", "GRU4Rec"), ("third", "BPR"), ("no", "Pop"))
    }
    claims = {"better": CLAIM, "other": {**CLAIM, "compare": {"better": "third", "worse": "old"}}}
    file = board({"models": models, "claims": claims, "seeds": [1]})
    started: list[list[str]] = []
    monkeypatch.setattr(runner, "run_process", lambda arguments, *_: started.append(arguments) or "out of memory")
    (command,) = [line for line in shown(file, tmp_path)[1].split("`") if line.startswith("recbole-llm")]
    _, name, given, *_ = shlex.split(command)[1:]
    assert (name, given) == ("mine", "--claim=better")

    with pytest.raises(SystemExit, match="1"):
        cli.main(["replicate", str(file), given, f"--out={tmp_path}"])
    assert sorted(arguments[0] for arguments in started) == ["--model=GRU4Rec", "--model=SASRec"]
    assert "**other.**" in (tmp_path / "replication.md").read_text()  # the page has all claims
    started.clear()
    replicate([str(file)], {}, out=tmp_path)
    assert sorted(arguments[0] for arguments in started) == ["--model=BPR", "--model=GRU4Rec", "--model=SASRec"]
    assert [line for line in caplog.messages if "measured" in line][-2:] == [
        "mine: not measured: better: new, seed 1: out of memory",
        "mine: not measured: other: old, seed 1: out of memory",
    ]
    with pytest.raises(ValueError, match="--claim='bitter' is not a claim of mine; nearest: better; other"):
        replicate([str(file)], {}, claims=["bitter"], out=tmp_path)


def test_runs_of_real_models_give_a_result(
    settings: dict[str, Any], board: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inside(arguments: list[str], *_: Any) -> None:
        cli.main(["run", *arguments])

    monkeypatch.setattr(runner, "run_process", inside)
    models = {"new": {"model": "TransitionGraph"}, "old": {"model": "Pop"}}
    given = {key: settings[key] for key in ("data_path", "checkpoint_dir", "candidates", "topk", "valid_metric", "eval_args")}
    file = board({"dataset": "tiny", "seeds": [2020], "models": models}, slice="warm", decide_on=None)
    assert replicate([str(file)], given, out=tmp_path)[1] == 0
    (test,) = read_results(tmp_path / "replication.json")["mine"]["better"]["tests"]
    assert test["difference"] > 0.1 and 5 < test["users"] < 60  # the next item mostly follows the last one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {"better": "new", "worse": "odl"}}, r"`better`: compare: there is no row 'odl' in models; known: new, old"),
        ({"compare": {"better": "new"}}, "is neither {better: ROW, worse: ROW}, {not_worse: ROW, than: ROW} nor {equal"),
        ({"compare": {"better": "chance", "worse": 0.5}}, "one side must be a row"),
        ({"compare": {"better": "chance", "worse": {"recorded": ["new", "a"]}}}, "one recorded and the other a number"),
        ({"compare": {"better": {"recorded": ["new"]}, "worse": 1}}, "is neither a row, a number, chance"),
        ({"compare": {"better": "new", "worse": []}}, "compare: worse: the list is empty"),
        ({"compare": {"better": "new", "worse": 50}}, "compare: 50 is no value of Hit@1, which lies between 0 and 1"),
        ({"margin": 2}, "margin: 2 is no difference of Hit@1; give one below 1"),
        ({"metric": "AUC"}, "metric: AUC does not follow from a target's rank"),
        ({"margin": None}, "`margin` is missing"),
        ({"margin": 0}, "margin: 0 is not"),
        ({"protocol": "full"}, "protocol: 'full' is not one of candidates"),
        ({"facts": {"weight": ["odd", "merge"]}}, "facts: weight: there is no row 'odd'"),
        ({"because": "x"}, "unknown key `because`"),
    ],
)
def test_a_wrong_claim_is_refused_by_name(changes: dict[str, Any], message: str, board: Write) -> None:
    with pytest.raises(ValueError, match="mine.yaml.*" + message):
        read_board(board(**changes))


def test_an_unknown_board_and_a_damaged_file_of_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no claims 'nothing'; known: .*reccocktail-ml-100k"):
        read_boards(["nothing"])
    (tmp_path / "replication.json").write_text("{}")
    with pytest.raises(ValueError, match="replication.json is not a file of results"):
        replicate([], {}, out=tmp_path, show=True)
