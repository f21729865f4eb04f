"""The shortcuts: each rule against a few lines that say the same, without a history, with ties, and on doubled data."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer

from recbole_llm.evaluation.ranks import target_ranks
from recbole_llm.model import shortcut
from recbole_llm.model.nearesttitles import title_vectors
from recbole_llm.model.recentpop import counts_between
from recbole_llm.model.shortcut import LatestItems
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import SHORTCUTS
from tests.conftest import write_dataset
from tests.contract.forms import THREE, files, inter


@pytest.fixture
def fitted(assemble: Any, settings: dict[str, Any]) -> Any:
    """A shortcut after ``fit``, with the first batch of test users."""

    def fit(name: str, **changes: Any) -> SimpleNamespace:
        made = assemble(name, settings, **changes)
        made.trainer.fit(made.train, made.valid)
        made.batch = next(iter(made.test))[0]
        made.users = made.batch["user_id"].tolist()
        made.histories = made.test._dataset.histories
        return made

    return fit


def history_of(made: SimpleNamespace, user: int) -> list[int]:
    return made.histories.before(user, "test").tolist()


def popularity(made: SimpleNamespace) -> np.ndarray:
    counts = made.histories.train_counts
    return counts / (counts.max() + 1)


@pytest.mark.parametrize("name", [name for name in SHORTCUTS if name != "RecentPop"])
def test_without_a_history_items_are_in_the_order_of_popularity(name: str, fitted: Any) -> None:
    made = fitted(name)
    scores, counts = made.model.full_sort_predict(empty(made))[0, 1:], torch.from_numpy(made.histories.train_counts)[1:]
    assert torch.equal(scores.argsort(descending=True, stable=True), counts.argsort(descending=True, stable=True))
    assert scores.dtype == torch.float32 and torch.unique(scores).numel() == torch.unique(counts).numel()


def empty(made: SimpleNamespace) -> Interaction:
    """A user without a history."""
    return Interaction({key: torch.zeros_like(value) for key, value in made.batch[:1].interaction.items()})


def test_without_a_history_the_end_of_training_is_the_recent_past(fitted: Any) -> None:
    model = (made := fitted("RecentPop", recent_share=0.1)).model
    recent = np.bincount(model.items[-round(0.1 * len(model.items)) :], minlength=model.n_items)
    assert np.floor(model.full_sort_predict(empty(made))[0].numpy()).tolist() == recent.tolist()


@pytest.mark.parametrize("name", SHORTCUTS)
def test_predict_scores_the_item_of_the_row(name: str, fitted: Any) -> None:
    made = fitted(name)
    rows, scores = made.batch[:5], made.model.full_sort_predict(made.batch[:5])
    assert torch.equal(made.model.predict(rows), scores[torch.arange(5), rows["item_id"]])


@pytest.mark.parametrize("name", SHORTCUTS)
def test_candidates_have_exactly_the_scores_of_the_catalogue(name: str, fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several parts, and for a user without a history."""
    made = fitted(name)
    for batch in (made.batch, empty(made)):
        listed = torch.stack([torch.randperm(made.model.n_items - 1)[:10] + 1 for _ in range(len(batch))])
        whole = made.model.full_sort_predict(batch).gather(1, listed)
        assert torch.equal(made.model.score_candidates(batch, listed), whole)
        monkeypatch.setattr(shortcut, "SCORES", 3 * made.model.n_items)
        torch.testing.assert_close(made.model.score_candidates(batch, listed), whole, atol=1e-6, rtol=0)


def test_the_repeat_rule_has_the_latest_item_first_then_popularity(fitted: Any) -> None:
    made = fitted("RepeatRule")
    for user, scores in zip(made.users, made.model.full_sort_predict(made.batch).numpy(), strict=True):
        history = history_of(made, user)
        expected = popularity(made).astype(np.float32)
        for place, item in enumerate(history, start=1):
            expected[item] = place
        assert np.array_equal(scores, expected) and scores.argmax() == history[-1]


def test_an_item_of_several_places_has_its_last_one(fitted: Any) -> None:
    model = fitted("RepeatRule").model
    row = Interaction({"item_id_list": torch.tensor([[3, 4, 3, 5, 0, 0]]), "item_length": torch.tensor([4])})
    scores = model.full_sort_predict(row)[0]
    assert scores[[3, 4, 5]].tolist() == [3, 2, 4] and (scores[6:] < 1).all()


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_recent_popularity_is_that_before_the_latest_known_item(
    share: float, fitted: Any, data_path: Path, tmp_path: Path
) -> None:
    """The times of ``tiny`` are made unique, so that the last interactions before a moment are certain."""
    folder = Path(shutil.copytree(data_path / "tiny", tmp_path / "data" / "tiny"))
    head, *lines = (folder / "tiny.inter").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    steps = Counter[str]()
    by_user: dict[str, list[tuple[int, str]]] = {}
    for user, item, _ in rows:
        steps[user] += 1
        by_user.setdefault(user, []).append((1000 * steps[user] + 37 * int(user[1:]) % 61 + 1_500_000_000, item))
    lines = [f"{user}\t{item}\t{time}" for user, own in by_user.items() for time, item in own]
    (folder / "tiny.inter").write_text("\n".join([head, *lines]) + "\n")

    made = fitted("RecentPop", data_path=str(folder.parent), recent_share=share)
    trained = sorted(event for own in by_user.values() for event in own[:-2])
    assert len({time for time, _ in trained}) == len(trained)
    tokens = made.histories.item_ids
    for user, scores in zip(made.users, made.model.full_sort_predict(made.batch).numpy(), strict=True):
        now = by_user[made.histories.user_ids[user]][-2][0]  # the validation item is known at test
        past = [item for time, item in trained if time <= now][-round(share * len(trained)) :]
        counts = Counter(past)
        assert np.floor(scores[1:]).tolist() == [counts[token] for token in tokens[1:]]
        np.testing.assert_allclose(scores % 1, popularity(made), atol=1e-4)


def test_a_sliding_window_counts_like_each_range_alone() -> None:
    rng = np.random.default_rng(0)
    items, ends = rng.integers(0, 7, 200), rng.integers(0, 201, 30)
    starts = np.maximum(ends - 20, 0)
    expected = [np.bincount(items[start:end], minlength=7) for start, end in zip(starts, ends, strict=True)]
    assert counts_between(items, starts, ends, 7).tolist() == np.array(expected).tolist()
    assert counts_between(items, starts[:0], ends[:0], 7).shape == (0, 7)


def test_without_times_all_of_training_is_recent(
    fitted: Any, caplog: pytest.LogCaptureFixture, assemble: Any, settings: Any
) -> None:
    made = assemble("RecentPop", settings)
    for split in (made.train, made.test):
        for field in ("timestamp", "timestamp_list"):
            split._dataset.inter_feat.drop(field)
    made.trainer.fit(made.train, None)
    scores = made.model.full_sort_predict(next(iter(made.test))[0])
    counts = made.test._dataset.histories.train_counts
    assert torch.equal(scores.floor(), torch.from_numpy(counts).float().expand_as(scores)) and "has no times" in caplog.text


def test_nearest_titles_are_those_of_tf_idf(fitted: Any) -> None:
    made = fitted("NearestTitles", last_items=3, recency=1.0)
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit_transform(made.test._dataset.item_texts.titles).toarray()
    weights = np.array([1, 1 / 2, 1 / 3]) / (1 + 1 / 2 + 1 / 3)
    for user, scores in zip(made.users, made.model.full_sort_predict(made.batch).numpy(), strict=True):
        latest = history_of(made, user)[::-1][:3]
        expected = sum(weight * vectors @ vectors[item] for weight, item in zip(weights, latest, strict=False))
        np.testing.assert_allclose(scores, expected + 1e-4 * popularity(made), atol=1e-6)


def test_nearest_texts_are_those_of_the_text_encoder(fitted: Any) -> None:
    made = fitted("NearestTexts", last_items=1)
    vectors = made.model.text.vectors(made.model.text.load(made.trainer.cache)).numpy()
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    latest = [history_of(made, user)[-1] for user in made.users]
    expected = unit[latest] @ unit.T + 1e-4 * popularity(made)
    np.testing.assert_allclose(made.model.full_sort_predict(made.batch).numpy(), expected, atol=1e-5)
    facts = made.model.facts()
    assert facts.backbone == "builtin 0.0M" and facts.builtin == ("text_encoder",) and facts.backbone_identity


def test_recency_weighs_the_latest_items() -> None:
    items, lengths = torch.tensor([[4, 5, 6, 5, 0], [7, 0, 0, 0, 0]]), torch.tensor([4, 1])
    matrix = LatestItems(3, 1.0).matrix(items, lengths, 9).toarray() * (1 + 1 / 2 + 1 / 3)
    assert matrix[0] == pytest.approx([0, 0, 0, 0, 0, 1 + 1 / 3, 1 / 2, 0, 0])
    assert matrix[1] == pytest.approx([1 / 2 + 1 / 3, 0, 0, 0, 0, 0, 0, 1, 0])  # the padding item for what is missing
    assert LatestItems(2, 0.0).weights.tolist() == [0.5, 0.5]


def test_titles_without_words_are_refused() -> None:
    assert title_vectors(["", "A b", "a"]).toarray()[2].tolist() == [1, 0]  # words of one letter count
    with pytest.raises(ValueError, match="title_field: no title has a word"):
        title_vectors(["", "?", "--"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("TransitionGraph", {"smoothing": 0.0}, "smoothing: 0.0 in .* is not a number above 0"),
        ("NearestTitles", {"recency": -1.0}, "recency: -1.0 in .* is not a number of at least 0"),
        ("RecentPop", {"recent_share": 0.0}, r"recent_share: 0.0 in .* is not a number in \(0, 1\]"),
        ("RecentPop", {"recent_share": 1.5}, r"recent_share: 1.5 in .* is not a number in \(0, 1\]"),
        ("NearestTitles", {"title_field": "name"}, "title_field: there is no column 'name'"),
        ("NearestTexts", {"title_field": "name"}, "title_field: there is no column 'name'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    name: str, changes: dict[str, Any], message: str, assemble: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(name, settings, **changes)


def test_on_doubled_data_the_repeat_rule_is_never_wrong_and_without_repeats_it_is_popularity(
    data_path: Path, tmp_path: Path, settings: dict[str, Any], fitted: Any
) -> None:
    folder = Path(shutil.copytree(data_path / "tiny", tmp_path / "data" / "tiny"))
    head, *lines = (folder / "tiny.inter").read_text().splitlines()
    (folder / "tiny.inter").write_text("\n".join([head, *(line for line in lines for _ in range(2))]) + "\n")
    doubled = {**settings, "data_path": str(folder.parent)}
    kept = run_recbole_llm("RepeatRule", "tiny", config_dict={**doubled, "rm_dup_inter": None})
    assert kept["test_result"]["hit@1"] == 1 > kept["best_valid_result"]["hit@1"]  # the last row but one is no repeat
    dropped = fitted("RepeatRule", data_path=str(folder.parent), rm_dup_inter="first")
    dropped.trainer.evaluate(dropped.test)
    listed, counts = dropped.candidates["test"], torch.from_numpy(dropped.histories.train_counts)
    slots = (listed.items == listed.targets[:, None]).int().argmax(1)
    expected = dict(zip(listed.users.tolist(), target_ranks(counts[listed.items], slots)[0].tolist(), strict=True))
    assert dict(zip(dropped.trainer.ranks.users, dropped.trainer.ranks.ranks, strict=True)) == expected


@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_whole_catalogue_is_ranked(name: str, settings: dict[str, Any]) -> None:
    full = {"eval_args": {"mode": "full"}, "metrics": ["Hit", "NDCG"], "topk": [10], "valid_metric": "NDCG@10"}
    result = run_recbole_llm(name, "tiny", config_dict={**settings, **full})
    assert 0 < result["test_result"]["hit@10"] < 1


def test_transitions_find_the_next_item_of_tiny(settings: dict[str, Any]) -> None:
    """In ``tiny``, item i is mostly followed by item i + 1."""
    hits = {
        name: run_recbole_llm(name, "tiny", config_dict=settings)["test_result"]["hit@1"]
        for name in ("TransitionGraph", "RepeatRule")
    }
    assert hits["TransitionGraph"] > 0.5 > hits["RepeatRule"]


@pytest.mark.parametrize("form", ["three files", "three files, first", "ratio", "time"])
def test_the_recent_past_is_one_of_times_that_users_have_in_common(
    form: str, assemble: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    _, rows = inter(write_dataset(tmp_path) / "tiny")
    times = {(user, item): float(time) for user, item, time, *_ in rows}
    if form.startswith("three files"):
        files(1, 1, first=form.endswith("first"))(tmp_path / "tiny")
    split = {"ratio": {"RS": [0.7, 0.1, 0.2]}, "time": {"TS": [0.8, 0.1, 0.1]}}.get(form)
    given: dict[str, Any] = THREE if form.startswith("three files") else {}
    given = {**given, "data_path": str(tmp_path)} | ({"eval_args": {"split": split, "mode": "full"}} if split else {})
    train = assemble("RecentPop", settings, **given).train._dataset
    tokens = [train.id2token(name, train.inter_feat[name].tolist()) for name in ("user_id", "item_id")]
    expected = [times[user, item] for user, item in zip(*tokens, strict=True)]
    assert rankdata(train.inter_feat["timestamp"].numpy()).tolist() == rankdata(expected).tolist()
    lists, lengths = train.inter_feat["timestamp_list"], train.inter_feat["item_length"].tolist()
    assert all((own[:length].diff() >= 0).all() for own, length in zip(lists, lengths, strict=True))
