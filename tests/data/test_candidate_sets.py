"""The candidates of a run by source: what they hold, what they depend on, and when they are regenerated."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data import candidate_sets as module
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.loading import create_dataset
from tests.conftest import dealt_anew


def both(settings: dict[str, Any], retrieve: Any = None, model: str = "Pop", **values: Any) -> dict[str, CandidateSet]:
    config = LLMConfig(model, "tiny", config_dict={**settings, **values})
    return candidate_sets(config, create_dataset(config), retrieve)


def candidates(settings: dict[str, Any], phase: str = "test", **values: Any) -> CandidateSet:
    modes = {other: "candidates" if other == phase else "full" for other in ("valid", "test")}
    return both(settings, **{"eval_args": {"mode": modes}, **values})[phase]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "candidates").glob("*.candidates"))


def test_neither_seed_nor_model_nor_batch_size_changes_them(settings: dict[str, Any], tmp_path: Path) -> None:
    shas = {
        candidates(settings, checkpoint_dir=str(tmp_path / str(number)), **values).sha256
        for number, values in enumerate(
            [{}, {"seed": 1}, {"model": "SASRec"}, {"train_batch_size": 7}, {"eval_batch_size": 7}, {"worker": 2}]
        )
    }
    assert len(shas) == 1
    assert candidates(settings, candidates={"num_negatives": 9, "seed": 1}).sha256 not in shas


def test_candidates_hold_the_target_and_nothing_known(settings: dict[str, Any]) -> None:
    config = LLMConfig("Pop", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    for phase in ("valid", "test"):
        found = candidate_sets(config, dataset)[phase]
        assert found.items.shape == (60, 10)
        for user, target, row in zip(found.users.tolist(), found.targets.tolist(), found.items.tolist(), strict=True):
            assert target in row and len(set(row)) == 10
            assert target == dataset.histories.target(user, phase)
            assert not set(row) - {target} & set(dataset.histories.before(user, phase).tolist())


def test_validation_does_not_know_the_test_items(settings: dict[str, Any], data_path: Path, tmp_path: Path) -> None:
    """With the test items of all users dealt out anew, the validation candidates are the same bytes."""
    header, *rows = [line.split("\t") for line in (data_path / "tiny" / "tiny.inter").read_text().splitlines()]
    last = {user: item for user, item, _ in rows}  # the file is in time order within a user
    changed = dealt_anew(rows, last)
    assert changed != rows
    folder = tmp_path / "shuffled" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.inter").write_text("\n".join("\t".join(row) for row in [header, *changed]) + "\n")
    (folder / "tiny.item").write_text((data_path / "tiny" / "tiny.item").read_text())

    other = {**settings, "data_path": str(folder.parent), "checkpoint_dir": str(tmp_path / "other")}
    for source in ("uniform", "popularity"):
        for phase in ("valid", "test"):
            shas = [candidates(s, phase, candidates={"num_negatives": 9, "source": source}).sha256 for s in (settings, other)]
            assert (shas[0] == shas[1]) == (phase == "valid")


def test_popularity_prefers_popular_items(settings: dict[str, Any]) -> None:
    config = LLMConfig("Pop", "tiny", config_dict=settings)
    histories = create_dataset(config).histories
    counts = np.bincount(np.concatenate([histories.train(user) for user in range(1, 61)]), minlength=41)

    def popularity(source: str) -> float:
        found = candidates(settings, candidates={"num_negatives": 3, "source": source})
        others = found.items[found.items != found.targets[:, None]]
        return float(counts[others].mean())

    assert popularity("popularity") > popularity("uniform")  # the same draws, were the weights not read


def test_candidates_from_files(settings: dict[str, Any], tmp_path: Path) -> None:
    for phase in ("valid", "test"):
        candidates(settings, phase)
    own = {phase: str(file) for phase, file in zip(("test", "valid"), files(tmp_path / "saved"), strict=True)}
    source = {"source": "file", "file": own}
    found = candidates({**settings, "candidates": source})
    assert torch.equal(found.items, candidates(settings).items) and found.sha256 == candidates(settings).sha256

    lines = Path(own["test"]).read_text().splitlines(keepends=True)
    Path(own["test"]).write_text("".join(lines[:11]))  # ten users: only they are evaluated
    assert len(candidates({**settings, "candidates": source}).users) == 10

    with pytest.raises(ValueError, match=r"needs file: \{'valid': PATH, 'test': PATH\}, not None"):
        candidates({**settings, "candidates": {"source": "file"}})
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere"):
        candidates({**settings, "candidates": {"source": "file", "file": {"test": "nowhere"}}})
    swapped = {"source": "file", "file": {"test": own["valid"]}}
    with pytest.raises(ValueError, match="is the file of another split"):
        candidates({**settings, "candidates": swapped})


def test_users_of_a_file_who_are_not_evaluated_are_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """Such as those of a file of the whole split, in a scenario that holds them out of early stopping."""
    candidates(settings, "valid")
    (own,) = files(tmp_path / "saved")
    values = {"cold_users": 0.3, "candidates": {"source": "file", "file": {"valid": str(own)}}}
    config = LLMConfig("Pop", "tiny", config_dict={**settings, **values})
    evaluated = create_dataset(config).histories.evaluated("valid").tolist()
    assert 0 < len(evaluated) < 60
    assert sorted(candidates(settings, "valid", **values).users.tolist()) == sorted(evaluated)


def test_lines_of_another_phase_are_left_out_so_that_validation_knows_no_test_item(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    for phase in ("valid", "test"):
        candidates(settings, phase)
    test, valid = (file.read_text().splitlines(keepends=True) for file in files(tmp_path / "saved"))
    both = tmp_path / "both.candidates"
    both.write_text("".join([*valid, *test[1:]]))
    source = {"source": "file", "file": dict.fromkeys(("valid", "test"), str(both))}
    for phase in ("valid", "test"):
        drawn, found = candidates(settings, phase), candidates({**settings, "candidates": source}, phase)
        assert sorted(zip(found.users.tolist(), found.targets.tolist(), strict=True)) == sorted(
            zip(drawn.users.tolist(), drawn.targets.tolist(), strict=True)
        )


def test_unknown_source(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="candidates.source: 'bm25' in .* is not one of uniform, popularity, retriever, file"):
        candidates({**settings, "candidates": {"source": "bm25"}})


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("\ti1", "\tx1", 1)])
def test_a_damaged_file_is_named_and_drawn_anew(
    damage: Callable[[str], str], settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = candidates(settings)
    (file,) = files(tmp_path / "saved")
    content = file.read_text()
    file.write_text(damage(content))
    assert candidates(settings).sha256 == whole.sha256
    assert file.read_text() == content
    assert re.search(rf"{re.escape(file.name)} is regenerated: .*line \d+", caplog.text)


def test_a_dataset_without_four_interactions_a_user(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    rows = [f"u{user}\ti{user + step}\t{step}" for user in range(9) for step in range(3)]
    (folder / "tiny.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    with pytest.raises(ValueError, match="no user of tiny has the four interactions"):
        candidates({**settings, "data_path": str(folder.parent)})


# -- the phases and users of a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "phases"),
    [("candidates", ["valid", "test"]), ("full", []), ({"valid": "candidates", "test": "full"}, ["valid"])],
)
def test_the_phases_that_the_configuration_asks_for(mode: Any, phases: list[str], settings: dict[str, Any]) -> None:
    assert [*both(settings, eval_args={"mode": mode})] == phases


def test_a_subset_of_users(settings: dict[str, Any]) -> None:
    whole, some = candidates(settings), candidates(settings, eval_users=7)
    assert len(some.users) == 7 and some.sha256 == whole.sha256 == whole.identity != some.identity
    assert torch.equal(some.items, whole.lookup(some.users, some.targets))
    assert candidates(settings, eval_users=60).identity == whole.identity
    assert candidates(settings, eval_users=7).identity == some.identity != candidates(settings, eval_users=8).identity


def test_nothing_is_put_on_the_dataset(settings: dict[str, Any]) -> None:
    config = LLMConfig("Pop", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    before = set(vars(dataset))
    candidate_sets(config, dataset)
    assert set(vars(dataset)) == before


# -- regenerated where what they were drawn from has changed ------------------------------------------------------------


def edit(folder: Path, suffix: str, change: Callable[[list[list[str]]], None]) -> None:
    file = folder / "tiny" / f"tiny.{suffix}"
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("\n".join(map("\t".join, lines)) + "\n")


def a_title(lines: list[list[str]]) -> None:
    lines[1][1] = lines[2][1]


def a_history(lines: list[list[str]]) -> None:
    """The first item of the first user becomes one that the user has not met."""
    user = lines[1][0]
    known = {line[1] for line in lines[1:] if line[0] == user}
    lines[1][1] = min({line[1] for line in lines[1:]} - known)


def the_catalogue(lines: list[list[str]]) -> None:
    """Another item takes the place of one: as many items as before."""
    gone = lines[1][1]
    for line in lines[1:]:
        line[1] = "i999" if line[1] == gone else line[1]


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("item", a_title, "has changed: titles$"),
        ("inter", a_history, "has changed: histories$"),
        ("inter", the_catalogue, "has changed: item ids, histories, titles$"),
    ],
)
def test_changed_data(
    suffix: str,
    change: Callable[[list[list[str]]], None],
    message: str,
    settings: dict[str, Any],
    data_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is drawn after the change is what a folder without candidates gives."""
    folder = tmp_path / "own"
    shutil.copytree(data_path, folder)
    own = {**settings, "data_path": str(folder)}
    candidates(own)
    edit(folder, suffix, change)
    caplog.clear()
    again = candidates(own)
    lines = [record.getMessage() for record in caplog.records if "regenerated" in record.getMessage()]
    assert len(lines) == 1 and re.search(message, lines[0]) and files(tmp_path / "saved")[0].name in lines[0]
    assert again.sha256 == candidates({**own, "checkpoint_dir": str(tmp_path / "elsewhere")}).sha256
    caplog.clear()
    assert candidates(own).sha256 == again.sha256 and "regenerated" not in caplog.text


def test_changed_code_of_the_draw(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = candidates(settings)
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "code_fingerprint", lambda *names: (calls.append(names), "changed")[1])
    assert candidates(settings).sha256 == whole.sha256
    assert re.search("test.*is regenerated: what it was drawn from has changed: code of the draw$", caplog.text, re.M)
    assert calls == [("recbole_llm.data.candidates",)]


def test_a_flipped_digit(settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file is sound line by line: the digit makes another item of the catalogue."""
    whole = candidates(settings)
    (file,) = files(tmp_path / "saved")
    content = file.read_text()
    lines = content.split("\n")
    user, target, items = lines[1].split("\t")
    row = items.split(" ")
    place = next(place for place, item in enumerate(row) if item != target)
    row[place] = next(f"i{item}" for item in range(1, 41) if f"i{item}" not in row)
    lines[1] = "\t".join([user, target, " ".join(row)])
    file.write_text("\n".join(lines))
    assert candidates(settings).sha256 == whole.sha256 and file.read_text() == content
    assert f"{file.name} is regenerated: it is damaged, its SHA-256 is not the one in {file.name}.json" in caplog.text


@pytest.mark.parametrize("source", ["uniform", "popularity"])
def test_unchanged_data_is_not_drawn_again_whatever_its_internal_ids(
    source: str,
    settings: dict[str, Any],
    data_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {**settings, "candidates": {"num_negatives": 9, "source": source}}
    whole = both(settings)
    shuffled = tmp_path / "shuffled"
    shutil.copytree(data_path, shuffled)
    edit(shuffled, "inter", lambda lines: lines.__setitem__(slice(1, None), lines[:0:-1]))
    monkeypatch.setattr(module, "draw", lambda *_, **__: pytest.fail("drawn again"))
    for other in ({}, {"model": "SASRec", "seed": 3}, {"data_path": str(shuffled)}):
        assert {phase: found.sha256 for phase, found in both(settings | {}, **other).items()} == {
            phase: found.sha256 for phase, found in whole.items()
        }
    assert "regenerated" not in caplog.text


# -- a retriever -------------------------------------------------------------------------------------------------------


class FakeRetriever:
    """Ranks items by their internal id, the history left out."""

    stage: Any = None

    def __init__(self, histories: Any, identity: str = "Fake-0123456789ab") -> None:
        self.histories, self.identity = histories, identity
        self.calls: list[tuple[str, int]] = []

    def top(self, phase: str, number: int) -> dict[int, list[int]]:
        self.calls.append((phase, number))
        every = range(1, len(self.histories.item_ids))
        known = {user: set(self.histories.before(user, phase).tolist()) for user in range(1, 61)}
        return {user: [item for item in every if item not in known[user]][:number] for user in known}


@pytest.fixture
def retrieved(settings: dict[str, Any]) -> Callable[..., tuple[FakeRetriever, dict[str, CandidateSet]]]:
    def make(identity: str = "Fake-0123456789ab", **values: Any) -> tuple[FakeRetriever, dict[str, CandidateSet]]:
        chosen = {"source": "retriever", "num_negatives": 9, **values.pop("candidates", {})}
        config = LLMConfig("Pop", "tiny", config_dict={**settings, **values, "candidates": chosen})
        dataset = create_dataset(config)
        retriever = FakeRetriever(dataset.histories, identity)
        return retriever, candidate_sets(config, dataset, retriever)

    return make


Retrieved = Callable[..., tuple[FakeRetriever, dict[str, CandidateSet]]]


def test_a_retriever_is_asked_when_items_are_read_and_not_where_they_are_on_disk(
    retrieved: Retrieved, settings: dict[str, Any], tmp_path: Path
) -> None:
    retriever, found = retrieved()
    test = found["test"]
    assert len(test.users) == 60 and test.covers(test.users).all() and test.identity != found["valid"].identity
    assert not retriever.calls and not files(tmp_path / "saved")
    assert test.items.shape == (60, 10) and retriever.calls == [("test", 10)]
    assert [file.name for file in files(tmp_path / "saved")] == ["tiny.test.Fake-01234567-9-2020.candidates"]
    top = retriever.top("test", 10)
    for user, row in zip(test.users.tolist(), test.items.tolist(), strict=True):
        assert sorted(row) == top[user]
    again, other = retrieved()
    assert torch.equal(other["test"].items, test.items) and torch.equal(other["test"].users, test.users)
    assert other["test"].sha256 == test.sha256 and not again.calls
    tokens = [retriever.histories.user_ids[user] for user in test.users.tolist()]
    assert (
        tokens == sorted(tokens) == [line.split("\t")[0] for line in files(tmp_path / "saved")[0].read_text().split("\n")[1:-1]]
    )


def test_the_identity_of_retrieved_candidates(retrieved: Retrieved) -> None:
    retriever, found = retrieved()
    test = found["test"]
    assert len(test.identity) == 64 and test.identity == retrieved()[1]["test"].identity
    others = [{"identity": "Fake-1"}, {"candidates": {"seed": 1}}, {"candidates": {"num_negatives": 8}}, {"eval_users": 7}]
    assert len({test.identity, *(retrieved(**other)[1]["test"].identity for other in others)}) == 5


def test_another_retriever_behind_the_same_file_name_is_asked_anew(
    retrieved: Retrieved, caplog: pytest.LogCaptureFixture
) -> None:
    _ = retrieved("Fake-0123456789ab")[1]["test"].items
    retriever, found = retrieved("Fake-01234567zzzz")
    assert found["test"].items.shape == (60, 10) and retriever.calls == [("test", 10)]
    assert "is regenerated: what it was drawn from has changed: retriever" in caplog.text


def test_a_retriever_has_to_be_given(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="source retriever needs a retriever, and none was given"):
        candidates({**settings, "candidates": {"source": "retriever"}})
