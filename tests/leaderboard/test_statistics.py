"""Cells -> rows: means over seeds, paired tests, costs, and records that lack something or do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recbole_llm.evaluation import metrics
from recbole_llm.leaderboard.captions import caption
from recbole_llm.leaderboard.statistics import build
from recbole_llm.leaderboard.table import Cell, Leaderboard, Row

METRICS = ("hit@1", "hit@5", "ndcg@5")
DIGEST = "a" * 64
SPLIT = {"filters": {}, "sha256": dict.fromkeys(("interactions", "valid", "test"), "d" * 64)}
MEASURED = {"passport": SPLIT, "protocol": {"mask_history": None}}


def ranks_of(share: float, seed: int, users: int = 400) -> list[int]:
    """Ranks of 20 candidates, the first with probability ``share``."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(users) < share, 1, rng.integers(2, 21, users)).tolist()


def record(model: str, ranks: Sequence[int], facts: dict[str, Any]) -> dict[str, Any]:
    cold = list(ranks[: len(ranks) // 4])
    part = {"users": len(cold), **metrics.metrics(cold, METRICS), "half_width_95": metrics.half_widths(cold, METRICS)}
    return {
        "model": model,
        "results": {model: metrics.metrics(ranks, METRICS), "control": {"hit@1": 0.0}},
        "ranks": {model: {f"u{user}": rank for user, rank in enumerate(ranks)}},
        "slices": {model: {"cold": part}},
        "candidates_sha256": {"valid": "b" * 64, "test": DIGEST},
        **MEASURED,
        "stage_seconds": {},
        "seconds": {"train": 10.0, "evaluate": 1.0},
    } | facts


def cell(label: str, ranks: Sequence[int] | None = None, *, seed: int = 2020, protocol: str = "sampled", **changes: Any) -> Cell:
    fields: dict[str, Any] = {"model": label, "command": f"run --model={label} --seed={seed}", "commit": "0123abc"}
    if ranks is not None:
        fields["record"] = record(label, ranks, changes.pop("facts", {}))
    return Cell(label=label, seed=seed, protocol=protocol, **fields | changes)


def row(board: Leaderboard, label: str, table: int = 0) -> Row:
    return next(row for row in board.tables[table].rows if row.label == label)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    """Good and Close are near each other, Poor is far below; Good has three seeds."""
    cells = [cell("Poor", ranks_of(0.1, 9)), cell("Close", ranks_of(0.5, 8))]
    cells += [cell("Good", ranks_of(0.52, seed), seed=seed, facts={"backbone": "builtin 2M"}) for seed in (1, 2, 3)]
    return build(cells)


def test_rows_are_sorted_by_the_first_metric_and_marked(board: Leaderboard) -> None:
    (table,) = board.tables
    assert [row.label for row in table.rows] == ["Good", "Close", "Poor"] and table.metric == "hit@1"
    assert [row.mark for row in table.rows] == ["a", "b", "c"] and table.metrics == list(METRICS)
    assert table.users == 400 and table.candidates == DIGEST and board.tests == 3


def test_means_and_t_intervals_over_seeds(board: Leaderboard) -> None:
    values = [float(np.mean(np.array(ranks_of(0.52, seed)) == 1)) for seed in (1, 2, 3)]
    good = row(board, "Good")
    assert good.metrics["hit@1"] == pytest.approx(np.mean(values)) and good.seeds == [1, 2, 3]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert good.half_width["hit@1"] == pytest.approx((high - low) / 2)
    assert row(board, "Close").half_width["hit@1"] is None  # one seed
    same = build([cell("Same", ranks_of(0.3, 1), seed=seed) for seed in (1, 2)])
    assert row(same, "Same").half_width["hit@1"] is None, "nothing depends on the seed"
    assert good.interval is not None and good.interval[0] < good.metrics["hit@1"] < good.interval[1]
    assert [cell.metrics["hit@1"] for cell in good.cells] == pytest.approx(values)


def test_only_significant_wins_are_named_and_what_is_not_worse_is_best(board: Leaderboard) -> None:
    good, close, poor = (row(board, label) for label in ("Good", "Close", "Poor"))
    assert good.beats == ["c"] and close.beats == ["c"] and poor.beats == []
    assert (good.best, close.best, poor.best) == (True, True, False)
    assert good.p_values["Poor"] == poor.p_values["Good"] < 0.001 and good.p_values["Close"] > 0.05
    assert set(good.p_values) == {"Close", "Poor"}


def test_p_values_are_adjusted_over_the_whole_leaderboard() -> None:
    first = [1] * 12 + [2] * 100
    second = [2] * 12 + [1] * 2 + [2] * 98  # 12 against 2 discordant users
    raw = stats.binomtest(12, 14).pvalue
    one = build([cell("A", first), cell("B", second)])
    assert row(one, "A").p_values["B"] == pytest.approx(raw) and row(one, "A").beats == ["b"]
    same = [cell(name, first, protocol="other") for name in ("C", "D", "E", "F")]  # six tests with p = 1
    both = build([cell("A", first), cell("B", second), *same])
    assert row(both, "A").p_values["B"] == pytest.approx(7 * raw) and row(both, "A").beats == []
    assert both.tests == 7 and all(row(both, name, 1).p_values == dict.fromkeys(set("CDEF") - {name}, 1.0) for name in "CDEF")
    assert all(row(both, name, 1).best for name in "CDEF")


def test_the_detectable_difference_is_that_of_the_pairs_with_the_best() -> None:
    first, second = [1] * 60 + [2] * 240, [2] * 30 + [1] * 30 + [2] * 240  # 30 of 300 users differ
    table = build([cell("A", first), cell("B", second)]).tables[0]
    differences = np.repeat([1, 0], [30, 270])
    assert table.detectable == pytest.approx(2.8016 * differences.std() / np.sqrt(300), rel=1e-3)


def test_users_are_paired_by_token_not_by_place() -> None:
    ranks = ranks_of(0.4, 1)
    shuffled = cell("B", ranks)
    assert shuffled.record is not None
    shuffled.record["ranks"]["B"] = dict(reversed(shuffled.record["ranks"]["B"].items()))
    assert row(build([cell("A", ranks), shuffled]), "A").p_values == {"B": 1.0}


def test_failed_and_waiting_cells_are_rows_with_their_reason() -> None:
    board = build(
        [
            cell("A", [1, 2, 3]),
            cell("A", seed=2, error="killed by signal 9"),
            cell("B", error="CUDA out of memory"),
            cell("C"),
        ]
    )
    assert row(board, "A").troubles == ["seed 2 failed: killed by signal 9"] and row(board, "A").half_width["hit@1"] is None
    told = caption(board, board.tables[0])
    assert "with the seeds that have a result, in the tests too: A (1 of 2)" in told
    complete = build([cell("A", [1, 2, 3])])
    assert "seeds that" not in caption(complete, complete.tables[0])
    assert row(board, "B").troubles == ["seed 2020 failed: CUDA out of memory"] and row(board, "B").metrics == {}
    assert row(board, "C").troubles == ["seed 2020 has not run"] and row(board, "C").mark == "" and not row(board, "C").best
    assert [row.label for row in board.tables[0].rows] == ["A", "B", "C"]


def test_a_failed_cell_does_not_lend_its_record() -> None:
    assert row(build([cell("A", [1, 1], error="damaged")]), "A").metrics == {}


@pytest.mark.parametrize(
    "facts",
    [
        *({key: None} for key in record("A", [1], {}) if key not in (*MEASURED, "candidates_sha256")),
        {"results": {}},
        {"ranks": {"A": {"u0": None}}},
        {"slices": {"A": {"cold": None}}},
        {"stage_seconds": {"x": None}},
        {"results": {"A": {"hit@1": float("nan"), "hit@5": "much"}}},
        {"ranks": {"A": {}}},
        {"seconds": {}},
    ],
)
def test_a_record_that_lacks_something_has_empty_cells(facts: dict[str, Any]) -> None:
    board = build([cell("A", [1, 2, 9, 1], facts=facts), cell("B", [2, 2, 3, 1])])
    assert {row.label for row in board.tables[0].rows} == {"A", "B"} and row(board, "B").metrics["hit@1"] == 0.25
    empty = Cell("A", "A", 1, "sampled", "run", record=MEASURED)
    assert row(build([empty]), "A").metrics == {} and build([]).tables == []


def test_seeds_with_their_own_candidates_are_tested_on_those_that_both_rows_have() -> None:
    def own(label: str, ranks: Sequence[int], seed: int) -> Cell:
        facts = {"candidates_sha256": {"test": f"of {seed}"}, "config": {"candidates": {"source": "retriever"}}}
        return cell(label, ranks, seed=seed, facts=facts)

    both = [own("A", [1] * 9, 1), own("A", [2] * 9, 2)]
    board = build([*both, own("B", [2] * 9, 1)])
    assert board.tests == 1 and board.tables[0].candidates == "of 1, of 2"
    assert row(board, "A").p_values["B"] == pytest.approx(2 / 2**9), "of seed 1, where A has all hits"
    assert build([*both, own("B", [2] * 9, 3)]).tests == 0
    assert "candidates (others for each seed)" in caption(board, board.tables[0])


def test_seeds_with_their_own_targets_are_tested_on_those_that_both_rows_have() -> None:
    """A random split of each seed, ranked in full; one seed of the second row has failed."""

    def own(seed: int) -> dict[str, Any]:
        split = {"filters": {"seed": seed}, "sha256": dict.fromkeys(SPLIT["sha256"], str(seed))}
        return {"candidates_sha256": {}, "passport": split, "protocol": {"mask_history": True}}

    cells = [cell("First", ranks_of(0.2 * seed, seed), seed=seed, facts=own(seed)) for seed in (1, 2)]
    board = build([*cells, cell("Second", ranks_of(0.3, 7), seed=1, facts=own(1))])
    alone = build([cells[0], cell("Second", ranks_of(0.3, 7), seed=1, facts=own(1))])
    assert row(board, "Second").p_values == row(alone, "Second").p_values


def test_metrics_that_are_rounded_to_two_places_are_those_of_their_ranks() -> None:
    ranks = [1, 2, 2, 2, 2, 2, 2]  # hit@1 is .142857
    facts = {"results": {"A": {"hit@1": 0.14}}, "config": {"metric_decimal_place": 2}}
    assert build([cell("A", ranks, facts=facts), cell("B", [2] * 7)]).tests == 1


def test_ranks_that_do_not_give_the_metric_are_not_tested_and_nothing_is_bold() -> None:
    several = cell("A", [1, 2, 3], facts={"results": {"A": {"hit@1": 0.9}}})  # users with several targets, say
    board = build([several, cell("B", [2, 2, 3])])
    assert row(board, "A").metrics == {"hit@1": 0.9} and board.tests == 0
    assert (
        not row(board, "A").best and not row(board, "B").best and "the best row is not tested" in caption(board, board.tables[0])
    )
    assert row(build([several]), "A").best, "alone it is the best"


def test_a_missed_target_is_a_user_without_gain() -> None:
    missed = cell("A", [1, 2, 999, 1])
    assert missed.record is not None
    missed.record["ranks"]["A"]["u2"] = None
    board = build([missed, cell("B", [1, 1, 1, 2])])
    assert board.tables[0].users == 4 and board.tests == 1 and row(board, "B").p_values["A"] == pytest.approx(1)


def test_rows_that_never_differ_say_nothing_about_what_could_be_detected() -> None:
    same = [cell(name, [1, 2, 3, 2]) for name in ("A", "B", "C")]
    assert build(same).tables[0].detectable is None is build([cell("A", [2]), cell("B", [1])]).tables[0].detectable
    other = cell("D", [2, 2, 3, 2])
    assert build([*same, other]).tables[0].detectable == build([same[0], other]).tables[0].detectable > 0


def test_the_smallest_value_is_the_best_of_some_metrics() -> None:
    facts = {
        label: {"results": {label: {"logloss": value, "auc": 1 - value}}, "ranks": {}}
        for label, value in (("A", 0.7), ("B", 0.3))
    }
    shortcut = {"results": {"C": {"logloss": 0.4}}, "ranks": {}, "shortcut": True}
    board = build([*(cell(label, [1], facts=own) for label, own in facts.items()), cell("C", [1], facts=shortcut)])
    assert [row.label for row in board.tables[0].rows] == ["B", "C", "A"] and board.tables[0].metric == "logloss"
    assert row(board, "B").headroom == pytest.approx(0.1) and row(board, "A").headroom == pytest.approx(-0.3)
    assert "headroom: that of the best shortcut, C, less logloss" in caption(board, board.tables[0])


def test_other_candidates_are_refused_with_both_hashes() -> None:
    facts = {"candidates_sha256": {"test": "c" * 64}}
    cells = [cell("A", [1, 2]), cell("B", [1, 2]), cell("Odd", [1, 2], facts=facts)]
    with pytest.raises(
        ValueError, match=f"Odd .seed 2020. ranked the candidates {'c' * 64}, but A .* ranked the candidates {DIGEST}"
    ):
        build(cells)
    apart = build([*cells[:2], cell("Odd", [1, 2], protocol="other", facts=facts)])
    assert [table.candidates for table in apart.tables] == [DIGEST, "c" * 64] and apart.tests == 1


def test_other_users_doubled_cells_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="A .3 users. and B .2 users. .*'u2'"):
        build([cell("A", [1, 2, 3]), cell("B", [1, 2])])
    with pytest.raises(ValueError, match="seed 1 .3 users. and seed 2 .2 users."):
        build([cell("A", [1, 2, 3], seed=1), cell("A", [1, 2], seed=2)])
    with pytest.raises(ValueError, match="'A', sampled, seed 2020 is given twice"):
        build([cell("A", [1]), cell("A", [1])])
    with pytest.raises(ValueError, match="'A' stands for A and B"):
        build([cell("A", [1]), cell("A", [1], seed=2, model="B")])


def test_slices_and_costs() -> None:
    facts = {"trained_parameters": 1200, "users_per_second": 50, "peak_memory_bytes": 2e9, "backbone_fingerprint": "f" * 64}
    board = build([cell("A", ranks_of(0.3, seed), seed=seed, facts=facts, note="lr in {1e-3, 1e-4}") for seed in (1, 2)])
    found = row(board, "A")
    assert board.tables[0].slices == ["cold"] and found.slices["cold"].users == 100
    expected = np.mean([np.mean(np.array(ranks_of(0.3, seed)[:100]) == 1) for seed in (1, 2)])
    assert found.slices["cold"].metrics["hit@1"] == pytest.approx(expected) and found.slices["cold"].half_width["hit@1"] > 0
    assert set(found.slices["cold"].metrics) == set(METRICS), "the number of users is no metric"
    assert (found.trained_parameters, found.users_per_second, found.peak_memory_bytes) == (1200, 50, 2e9)
    assert found.training_seconds == 10 and not found.training_at_least and found.note == "lr in {1e-3, 1e-4}"


def test_a_cached_stage_costs_what_it_once_took() -> None:
    def stages(folder: str, seconds: float, train: float) -> dict[str, Any]:
        return {"stages": {"lm": folder}, "stage_seconds": {"lm": seconds}, "seconds": {"train": train}}

    board = build(
        [
            cell("A", [1, 2], facts=stages("lm-1", 100.0, 105.0)),
            cell("B", [1, 2], facts=stages("lm-1", 0.0, 7.0)),
            cell("C", [1, 2], facts=stages("lm-2", 0.0, 3.0)),
            cell("D", [1, 2], facts={"seconds": None, "stage_seconds": {"lm": 4.0}}),
        ]
    )
    told = {row.label: (row.training_seconds, row.training_at_least) for row in board.tables[0].rows}
    assert told == {"A": (105, False), "B": (107, False), "C": (3, True), "D": (4, False)}


def test_another_metric_can_be_the_first_and_marks_continue_after_z() -> None:
    board = build([cell(f"M{place:02}", [1, 2 + place]) for place in range(28)], metric="ndcg@5")
    assert board.tables[0].metric == "ndcg@5" and [row.mark for row in board.tables[0].rows][25:] == ["z", "aa", "ab"]
