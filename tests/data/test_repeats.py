"""Repeats: which rows stay, that the rest of the order is that of the file, and what is drawn if they are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from recbole_llm.config import LLMConfig
from recbole_llm.data import domains, negatives
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.domains import Domain
from recbole_llm.data.histories import Histories
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.data.repeats import repeated_targets, repeats_kept
from recbole_llm.data.split_facts import split_facts, split_lines
from recbole_llm.data.views import write_views
from tests.conftest import write_rows

Row = tuple[str, str, float]
ITEMS = 120


@pytest.fixture(scope="module")
def baskets() -> list[Row]:
    """Users who buy baskets, a quarter of it bought before; a basket has one time, and the file is in no order of time."""
    rng, rows = np.random.default_rng(0), []
    for user in range(80):
        known: list[int] = []
        for basket in range(int(rng.integers(3, 6))):
            for _ in range(int(rng.integers(2, 12))):
                again = bool(known) and rng.random() < 0.25
                known.append(int(rng.choice(known)) if again else int(rng.integers(ITEMS)))
                rows.append((f"u{user}", f"i{known[-1]}", 1_600_000_000 + 10 * basket))
    return [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]


def doubled(rows: list[Row]) -> list[Row]:
    return [row for row in rows for _ in range(2)]


def apart(rows: list[Row]) -> list[Row]:
    """Each user's rows without repeats, a second apart, in their order."""
    return [(user, item, second) for second, (user, item) in enumerate(dict.fromkeys(row[:2] for row in rows))]


def stay(rows: list[Row], rule: str | None) -> list[Row]:
    """The rule, spelled out: rows in time order, of a pair the first or last one; then the order of the file again."""
    in_time = sorted(range(len(rows)), key=lambda place: (rows[place][2], place))
    of_pair: dict[Any, list[int]] = {}
    for place in in_time:
        of_pair.setdefault(rows[place][:2], []).append(place)
    kept = {"first": lambda places: places[:1], "last": lambda places: places[-1:], None: lambda places: places}[rule]
    return [rows[place] for place in sorted(place for places in of_pair.values() for place in kept(places))]


def by_user(rows: list[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        found.setdefault(user, []).append(item)
    return found


def load(folder: Path, model: str = "BPR", name: str = "shop", **values: Any) -> tuple[LLMConfig, Any]:
    given = {"data_path": str(folder), "candidates": {"num_negatives": 9}, "topk": [1, 5], "valid_metric": "NDCG@5", **values}
    config = LLMConfig(model, name, config_dict=given)
    return config, create_dataset(config)


def tokens(histories: Histories) -> dict[str, list[str]]:
    named = zip(histories.user_ids, histories.items, strict=True)
    return {user: [histories.item_ids[item] for item in items] for user, items in named if user != "[PAD]"}


# -- what stays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["first", "last", None])
@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_the_rows_that_stay_and_their_order(model: str, rule: str | None, baskets: list[Row], tmp_path: Path) -> None:
    config, dataset = load(write_rows(tmp_path, "shop", baskets), model, rm_dup_inter=rule)
    left = stay(baskets, rule)
    assert 0.1 * len(baskets) < len(baskets) - len(stay(baskets, "first")) < 0.5 * len(baskets)
    assert dataset.repeats_dropped == len(baskets) - len(left) and repeats_kept(dataset) == (rule is None)
    truth = by_user(left)
    assert tokens(dataset.histories) == truth
    for phase, loader, place in zip(("valid", "test"), data_preparation(config, dataset)[1:], (-2, -1), strict=True):
        data = loader._dataset
        pairs = (data.id2token(field, data.inter_feat[field]) for field in ("user_id", "item_id"))
        assert repeats_kept(data) == (rule is None)
        for user, item in zip(*pairs, strict=True):
            assert item == truth[user][place], phase


def test_repeats_are_dropped_by_default_and_counted(baskets: list[Row], tmp_path: Path) -> None:
    config, dataset = load(write_rows(tmp_path, "shop", doubled(baskets)))
    dropped = 2 * len(baskets) - len(stay(baskets, "first"))
    facts = split_facts(config, dataset)["repeats"]
    assert facts == {"rm_dup_inter": "first", "dropped": dropped, "repeated_targets": {"valid": 0.0, "test": 0.0}}
    assert split_lines(config, dataset)[0] == (
        f"shop: {dropped:,} repeated interactions are dropped (rm_dup_inter: first; ~ keeps them)"
    )


def test_the_share_of_repeated_targets(baskets: list[Row], tmp_path: Path) -> None:
    config, dataset = load(write_rows(tmp_path, "shop", baskets), rm_dup_inter=None)
    truth = [items for items in by_user(baskets).values() if len(items) >= 4]
    shares = {phase: np.mean([items[end] in items[:end] for items in truth]) for phase, end in (("valid", -2), ("test", -1))}
    assert split_facts(config, dataset)["repeats"] == {"rm_dup_inter": None, "dropped": 0, "repeated_targets": shares}
    assert 0.1 < shares["test"] < 0.9
    assert f"repeated targets: validation {shares['valid']:.1%}, test {shares['test']:.1%}" in split_lines(config, dataset)[0]


def test_an_unknown_rule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rm_dup_inter: 'once' .*is not one of first, last or ~"):
        load(write_rows(tmp_path, "shop", [("u", "i", 1)]), rm_dup_inter="once")


def test_without_a_time_column_the_first_row_of_the_file_stays(tmp_path: Path) -> None:
    rows = [("u", "a", 3), ("u", "b", 2), ("u", "a", 1), ("v", "a", 0)]
    random = {
        "eval_args": {"order": "RO", "split": {"RS": [8, 1, 1]}, "mode": "full"},
        "load_col": {"inter": ["user_id", "item_id"]},
    }
    for rule, places in (("first", [0, 1, 3]), ("last", [1, 2, 3]), (None, [0, 1, 2, 3])):
        config, dataset = load(write_rows(tmp_path, "shop", rows), rm_dup_inter=rule, **random)
        frame = dataset.inter_feat
        pairs = (dataset.id2token(field, frame[field].to_numpy()) for field in ("user_id", "item_id"))
        assert list(zip(*pairs, strict=True)) == [rows[place][:2] for place in places]
        facts = split_facts(config, dataset)
        assert facts["repeats"]["dropped"] == 4 - len(places) and facts["ties"]["tied_targets"] == {"valid": None, "test": None}


# -- candidates --------------------------------------------------------------------------------------------------------


def sets(folder: Path, out: Path, **values: Any) -> tuple[dict[str, CandidateSet], Histories]:
    config, dataset = load(folder, checkpoint_dir=str(out), **values)
    return candidate_sets(config, dataset), dataset.histories


def repeat_rule(found: CandidateSet, histories: Histories, phase: str) -> float:
    """Hit@1 of "the candidate that the user chose last"; without one in the history, the first candidate."""
    hits = []
    for user, target, row in zip(found.users.tolist(), found.targets.tolist(), found.items.tolist(), strict=True):
        recency = {item: place for place, item in enumerate(histories.before(user, phase).tolist())}
        scores = [recency.get(item, -1) for item in row]
        hits.append(row[scores.index(max(scores))] == target)
    return float(np.mean(hits))


@pytest.mark.parametrize("source", ["uniform", "popularity"])
def test_with_repeats_kept_negatives_may_come_from_the_history(source: str, baskets: list[Row], tmp_path: Path) -> None:
    values = {"candidates": {"num_negatives": 9, "source": source}}
    folder = write_rows(tmp_path, "shop", baskets)
    for rule in ("first", None):
        found, histories = sets(folder, tmp_path / "saved", rm_dup_inter=rule, **values)
        for phase, own in found.items():
            known = 0
            for user, target, row in zip(own.users.tolist(), own.targets.tolist(), own.items.tolist(), strict=True):
                assert row.count(target) == 1 and len(set(row)) == 10
                known += len({*row} - {target} & {*histories.before(user, phase).tolist()} - {target})
                known -= len({*row} - {target} - {*histories.before(user, phase).tolist()})
            assert (known > -9 * len(own.users)) == (rule is None)


def test_with_repeats_kept_a_retriever_may_give_items_of_the_history(baskets: list[Row], tmp_path: Path) -> None:
    from recbole_llm.classical.retriever import Retriever
    from recbole_llm.store.stages import StageCache

    folder = write_rows(tmp_path, "shop", baskets)
    for rule in ("first", None):
        source = {"source": "retriever", "num_negatives": 9}
        values = {"candidates": source, "retriever": "Pop", "checkpoint_dir": str(tmp_path / "saved")}
        config, dataset = load(folder, rm_dup_inter=rule, **values)
        retriever = Retriever(config)
        assert retriever.histories.fingerprint == dataset.histories.fingerprint
        retriever.load(StageCache(tmp_path / "stages", seed=1).run(retriever.stage))
        top = retriever.top("test", 10)
        known = [set(items) & set(dataset.histories.before(user, "test").tolist()) for user, items in top.items()]
        assert any(known) == (rule is None)
        if rule is None:
            counts = retriever.model.item_cnt.flatten()  # [I]
            assert len({tuple(counts[items].tolist()) for items in top.values()}) == 1  # Pop's list but for ties, for everybody


def test_keeping_repeats_changes_nothing_where_there_are_none(baskets: list[Row], tmp_path: Path, caplog: Any) -> None:
    folder = write_rows(tmp_path, "shop", apart(baskets))
    dropped, _ = sets(folder, tmp_path / "saved", rm_dup_inter="first")
    kept, histories = sets(folder, tmp_path / "saved", rm_dup_inter=None)
    assert {phase: own.sha256 for phase, own in kept.items()} == {phase: own.sha256 for phase, own in dropped.items()}
    assert not histories.repeats_kept and "regenerated" not in caplog.text


def test_candidates_of_the_other_rule_are_not_reused(baskets: list[Row], tmp_path: Path, caplog: Any) -> None:
    folder = write_rows(tmp_path, "shop", baskets)
    fresh = {rule: sets(folder, tmp_path / str(rule), rm_dup_inter=rule)[0]["test"].sha256 for rule in ("first", None)}
    for rule in ("first", None, "first"):
        assert sets(folder, tmp_path / "saved", rm_dup_inter=rule)[0]["test"].sha256 == fresh[rule]
    assert caplog.text.count("has changed: histories, repeats") == 4  # two phases, twice


def test_the_identity_of_a_retrievers_candidates_tells_the_rule(baskets: list[Row], tmp_path: Path) -> None:
    """Also where the rule changes neither users nor targets: u0 repeats an early item."""
    rows = apart(baskets)
    again = [*rows[:2], (rows[0][0], rows[0][1], 0.5), *rows[2:]]
    source = {"candidates": {"source": "retriever", "num_negatives": 9}, "rm_dup_inter": None}

    class Fixed:
        identity, stage = "Pop-0123", None

    found = {}
    for name, own in (("none", rows), ("one", again)):
        config, dataset = load(write_rows(tmp_path / name, "shop", own), **source)
        found[name] = candidate_sets(config, dataset, Fixed())["test"]  # type: ignore[arg-type]
    assert found["none"].targets.equal(found["one"].targets) and found["none"].identity != found["one"].identity


# -- the repeat rule ---------------------------------------------------------------------------------------------------


def test_every_row_doubled_rewards_the_repeat_rule_no_longer(baskets: list[Row], tmp_path: Path) -> None:
    rows = apart(baskets)
    found, histories = sets(write_rows(tmp_path / "b", "shop", doubled(rows)), tmp_path / "saved")
    single, _ = sets(write_rows(tmp_path / "a", "shop", rows), tmp_path / "saved")
    for phase in ("valid", "test"):
        assert found[phase].sha256 == single[phase].sha256  # the data set without doubles
        assert repeat_rule(found[phase], histories, phase) < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 80)


def test_the_repeat_rule_gets_no_more_than_the_share_of_the_data(baskets: list[Row], tmp_path: Path) -> None:
    folder, chance = write_rows(tmp_path, "shop", baskets), 0.1
    found, histories = sets(folder, tmp_path / "saved", rm_dup_inter=None)
    for phase in ("valid", "test"):
        share = repeated_targets(histories, phase)
        assert repeat_rule(found[phase], histories, phase) <= share + (1 - share) * chance
    found, histories = sets(folder, tmp_path / "saved", rm_dup_inter="first")
    for phase in ("valid", "test"):
        assert repeat_rule(found[phase], histories, phase) < chance + 3 * np.sqrt(chance * (1 - chance) / 80)


# -- training ----------------------------------------------------------------------------------------------------------


def test_negatives_of_training_exclude_the_target_alone_if_repeats_are_kept() -> None:
    history = np.array([1, 2, 3, 2])
    for kept in (False, True):
        domain = Domain("d", None, [history], "item", "chosen", repeats_kept=kept)  # type: ignore[arg-type]
        excluded = domain.excluded(history, 2)
        assert excluded == ({2} if kept else {1, 2, 3})
        rng, pool = np.random.default_rng(0), np.arange(1, 8)
        drawn = {item for _ in range(50) for item in negatives.with_target(rng, 2, excluded, pool, 3)}
        assert drawn == ({1, 2, 3, 4, 5, 6, 7} if kept else {2, 4, 5, 6, 7})


def test_the_rule_is_part_of_a_domain(settings: dict[str, Any], data_path: Path, tmp_path: Path) -> None:
    """Other datasets of a run follow the rule of the run, and views that of their dataset."""
    folder = shutil.copytree(data_path, tmp_path / "data")
    for name in ("tiny", "other"):
        file = folder / name / f"{name}.inter"
        header, *rows = file.read_text().splitlines()
        file.write_text("\n".join([header, *(row for row in rows for _ in range(2)), ""]))
    loaded = {}
    for rule in ("first", None):
        values = {**settings, "data_path": str(folder), "rm_dup_inter": rule}
        config = LLMConfig("LoRACocktail", "tiny", config_dict=values)
        dataset = create_dataset(config)
        own = domains.of_dataset(config, dataset)
        (other,) = domains.load(["other"], config, (own, dataset.histories))
        view = domains.views(own, "genre", at_least=2, at_most=1, key="general_datasets")[0]
        loaded[rule] = own, other, view
        assert {domain.repeats_kept for domain in loaded[rule]} == {rule is None}
        lengths = [len(history) - len(set(history.tolist())) for domain in loaded[rule] for history in domain.histories]
        assert any(lengths) == (rule is None)
        written = write_views(config, dataset, tmp_path / str(rule))
        file = written[0] / f"{written[0].name}.yaml"
        assert yaml.safe_load(file.read_text())["rm_dup_inter"] == rule
        again = LLMConfig("Pop", written[0].name, config_dict={"data_path": str(tmp_path / str(rule))})
        assert repeats_kept(create_dataset(again)) == (rule is None)
    for with_repeats, without in zip(loaded[None], loaded["first"], strict=True):
        assert with_repeats.fingerprint != without.fingerprint


def test_united_datasets_follow_the_rule(settings: dict[str, Any], baskets: list[Row], tmp_path: Path) -> None:
    mall = doubled(baskets[:-40])
    folder = write_rows(write_rows(tmp_path, "shop", baskets), "mall", mall)
    for rule in ("first", None):
        config, dataset = load(folder, train_dataset="mall", rm_dup_inter=rule)
        facts = split_facts(config, dataset)["repeats"]
        assert facts["rm_dup_inter"] == rule and repeats_kept(dataset) == (rule is None)
        dropped = sum(len(rows) - len(stay(rows, "first")) for rows in (baskets, mall))
        assert facts["dropped"] == (0 if rule is None else dropped)
        alone = [split_facts(*load(folder, name=name, rm_dup_inter=rule))["repeats"] for name in ("mall", "shop")]
        valid, test = (own["repeated_targets"][phase] for own, phase in zip(alone, ("valid", "test"), strict=True))
        assert facts["repeated_targets"] == {"valid": valid, "test": test}


def test_samplers_of_recbole_draw_from_the_history_if_repeats_are_kept(baskets: list[Row], tmp_path: Path) -> None:
    """``uniN`` of general models, whose sampler would leave out the history; their full ranking has no history to mask."""
    folder = write_rows(tmp_path, "shop", baskets)
    for rule in ("first", None):
        config, dataset = load(folder, rm_dup_inter=rule, eval_args={"mode": "uni50"})
        histories, test = dataset.histories, data_preparation(config, dataset)[2]
        shared = 0
        for interaction, rows, _, _ in test:
            users = test.uid_list[rows] if hasattr(test, "uid_list") else None
            for user, item in zip(interaction["user_id"].tolist(), interaction["item_id"].tolist(), strict=True):
                shared += item in histories.before(user, "test") and item != histories.target(user, "test")
            assert users is None or len(users)
        assert (shared > 0) == (rule is None)
        full, dataset = load(folder, rm_dup_inter=rule, eval_args={"mode": "full"})
        known = data_preparation(full, dataset)[2]._dataset.known_items
        assert (known is None) == (rule is None)


# -- files that are split already --------------------------------------------------------------------------------------


@pytest.fixture
def split_files(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Leave-one-out files of 10 users with 6 items; ``more`` rows are added to a file."""

    def make(**more: list[Row]) -> dict[str, Any]:
        rows = [[(f"u{user}", f"i{(user + step) % 30}", step) for step in range(6)] for user in range(10)]
        parts = {"train": slice(0, 4), "valid": slice(4, 5), "test": slice(5, 6)}
        for name, part in parts.items():
            own = [row for history in rows for row in history[part]]
            write_rows(tmp_path, "shop", [*own, *more.get(name, [])], name)
        return {"folder": tmp_path, "benchmark_filename": list(parts), "candidates": {"num_negatives": 5}}

    return make


def test_repeats_within_one_file_are_dropped_and_the_others_keep_their_file(split_files: Callable[..., dict[str, Any]]) -> None:
    given = split_files(train=[("u0", "i0", 0.5), ("u3", "i4", 0.5)], test=[("u1", "i6", 5)])
    config, dataset = load(**given)
    assert dataset.repeats_dropped == 3 and dataset.file_size_list == [40, 10, 10]
    assert [len(split.inter_feat) for split in dataset.build()] == [40, 10, 10]
    assert split_facts(config, dataset)["ties"]["tied_targets"] == {"valid": None, "test": None}  # the files decide


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_a_target_that_another_file_has_is_dropped_or_kept_by_the_same_rule(
    model: str, split_files: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = {
        **split_files(train=[("u1", "i6", 0.5)]),
        "model": model,
        "checkpoint_dir": str(tmp_path / "saved"),
    }  # u1's test item
    for rule, dropped, sizes in (("first", 1, [41, 10, 9]), ("last", 1, [40, 10, 10]), (None, 0, [41, 10, 10])):
        config, dataset = load(**given, rm_dup_inter=rule)
        assert (dataset.repeats_dropped, dataset.file_size_list) == (dropped, sizes)
        asked = candidate_sets(config, dataset)
        assert [len(asked[phase].users) for phase in ("valid", "test")] == sizes[1:]
        shares = {"valid": 0.0, "test": 0.1 if rule is None else 0.0}
        assert repeats_kept(dataset) == (rule is None)
        assert split_facts(config, dataset)["repeats"]["repeated_targets"] == shares
        tested = data_preparation(config, dataset)[2]._dataset
        assert set(tested.inter_feat["user_id"].tolist()) == set(asked["test"].users.tolist())


def test_repeats_in_rows_with_whole_histories_are_kept_or_refused(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for name, length in (("train", 3), ("valid", 4), ("test", 5)):
        lines = [f"u{u}\t{' '.join(f'i{(u + k) % 30}' for k in range(length))}\ti{(u + length) % 30}" for u in range(10)]
        if name == "train":
            lines[0] = "u0\ti0 i1 i2\ti1"
        else:
            lines[0] = lines[0].replace("i0 i1 i2 i3", "i0 i1 i2 i1")
        (tmp_path / "shop" / f"shop.{name}.inter").write_text("\n".join([header, *lines, ""]))
    given = {"benchmark_filename": ["train", "valid", "test"], "load_col": None, "eval_args": {"mode": "full"}}
    with pytest.raises(ValueError, match=r"rm_dup_inter: first cannot drop repeats from rows that contain whole histories; give"):
        load(tmp_path, "SASRec", **given)
    assert repeats_kept(load(tmp_path, "SASRec", **given, rm_dup_inter=None)[1])


def test_a_file_of_repeats_alone(split_files: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    given = split_files()
    (tmp_path / "shop" / "shop.test.inter").write_text((tmp_path / "shop" / "shop.valid.inter").read_text())
    with pytest.raises(
        ValueError, match="benchmark_filename: every row of test repeats one of another file; give rm_dup_inter: ~"
    ):
        load(**given, eval_args={"mode": "full"})
