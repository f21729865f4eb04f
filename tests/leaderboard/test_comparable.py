"""Rows of one table were measured alike: a refusal names the runs, says how they differ, and what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from recbole_llm.data.sketches import sketch
from recbole_llm.leaderboard.comparable import candidates, check, same_items, same_users
from recbole_llm.leaderboard.table import Cell


def passport(users: int = 943, other_targets: int = 0, **filters: Any) -> dict[str, Any]:
    """A passport whose first ``other_targets`` targets are other items."""
    targets = [f"u{user}\t{'other' if user < other_targets else 'own'}" for user in range(users)]
    digest = f"{users}-{other_targets}"
    return {
        "counts": {
            "users": users,
            "items": 1682,
            "interactions": 100 * users,
            "targets": {"valid": users, "test": users},
        },
        "filters": {"tie_order": "file", "rm_dup_inter": "first", **filters},
        "sha256": {"interactions": digest, "valid": digest, "test": digest, "histories": digest, "targets": digest},
        "sketches": {"tokens": sketch(targets)},
    }


def cell(label: str, *, seed: int = 2020, mask: bool | None = True, **facts: Any) -> Cell:
    record = {"passport": passport(), "protocol": {"mask_history": mask}, **facts}
    return Cell(label, label, seed, "full", f"run --model={label}", record)


def refusal(*cells: Cell) -> str:
    with pytest.raises(ValueError, match=r"^leaderboard: full: ") as error:
        check("leaderboard: full", cells)
    return str(error.value).removeprefix("leaderboard: full: ")


def test_runs_that_were_measured_alike_pass() -> None:
    check("leaderboard: full", [cell("BPR"), cell("SASRec"), cell("SASRec", seed=1)])
    check(
        "leaderboard: full",
        [cell("BPR"), Cell("Broken", "Broken", 1, "full", "run", error="no memory"), Cell("Later", "Later", 1, "full", "run")],
    )
    check("leaderboard: full", [])


@pytest.mark.parametrize(
    ("filters", "drawn"), [({"seed": 1}, {"source": "uniform"}), ({}, {"source": "retriever"})], ids=["order: RO", "retriever"]
)
def test_candidates_that_depend_on_the_seed_are_compared_seed_by_seed(filters: dict[str, Any], drawn: dict[str, Any]) -> None:
    def run(label: str, seed: int, digest: str) -> Cell:
        own = {**filters, "seed": seed} if filters else {}
        facts = {"candidates_sha256": {"test": digest}, "config": {"candidates": drawn}, "passport": passport(**own)}
        return cell(label, seed=seed, mask=None, **facts)

    alike = [run(label, seed, f"of seed {seed}") for label in ("TALLRec", "LlamaRec") for seed in (1, 2)]
    check("leaderboard: full", alike)
    assert "ranked the candidates other" in refusal(*alike, run("BPR", 2, "other"))
    with pytest.raises(
        ValueError, match="TALLRec and Pop ranked other targets or candidates, since these depend on the seed; compare the same"
    ):
        same_items("leaderboard: full", {"TALLRec": [("of seed 1",), ("of seed 2",)], "Pop": [("of seed 1",)]})
    same_items("leaderboard: full", {"TALLRec": [("one",), ("one",)], "Pop": [("one",)]})


def test_a_retriever_s_candidates_are_not_those_of_a_draw() -> None:
    runs = [
        cell(label, mask=None, candidates_sha256={"test": digest}, config={"candidates": {"source": digest}})
        for label, digest in (("TALLRec", "retriever"), ("BPR", "uniform"))
    ]
    assert "ranked the candidates" in refusal(*runs)


def test_other_counts_and_filters_are_named() -> None:
    odd = cell("SASRec", passport=passport(942, rm_dup_inter=None, tie_order="random"))
    assert refusal(cell("BPR"), odd, cell("Pop")) == (
        "the split of SASRec (seed 2020) is not that of BPR (seed 2020), Pop (seed 2020): 942 users against 943; 94,200 "
        "interactions against 94,300; 942 valid targets against 943; 942 test targets against 943; tie_order random against "
        "file; rm_dup_inter None against first; less than 1 % of the test targets differ; run them on the same data with the "
        "same filters, or run them under another protocol"
    )


def test_the_share_of_other_targets_is_named() -> None:
    found = refusal(cell("BPR"), cell("Pop"), cell("SASRec", passport=passport(other_targets=236)))
    (share,) = [part for part in found.split("; ") if "of the test targets differ" in part]
    assert abs(int(share.split("about ")[1].split(" %")[0]) - 25) <= 8


def test_the_same_targets_after_other_interactions_are_another_split() -> None:
    other = copy.deepcopy(passport())
    other["sha256"]["interactions"] = "x"
    assert "the interactions before them differ" in refusal(cell("BPR"), cell("SASRec", passport=other))


def test_random_splits_are_compared_within_a_seed() -> None:
    first, second = passport(order="RO", seed=1), passport(other_targets=9, order="RO", seed=2)
    runs = [cell(label, seed=seed, passport=own) for label in ("BPR", "Pop") for seed, own in ((1, first), (2, second))]
    check("leaderboard: full", runs)
    assert "Odd (seed 1)" in refusal(*runs, cell("Odd", seed=1, passport=passport(other_targets=30, order="RO", seed=1)))


def test_masked_and_unmasked_histories_never_share_a_table() -> None:
    found = refusal(cell("BPR"), cell("Pop"), cell("SASRec", mask=False))
    assert found == (
        "SASRec (seed 2020) did not mask the users' histories (mask_history: false), but BPR (seed 2020), Pop (seed 2020) masked "
        "the users' histories (mask_history: true); set mask_history to one value for all models, or run them under another "
        "protocol"
    )
    found = refusal(cell("BPR"), cell("Pop"), cell("TALLRec", mask=None))
    assert "TALLRec (seed 2020) ranked drawn candidates, but BPR" in found and "the same mode in eval_args" in found


def test_other_candidates_are_refused_where_there_are_any() -> None:
    one, other = ({"candidates_sha256": {"test": digit * 64}} for digit in "ab")
    assert "ranked the candidates bbb" in refusal(cell("A", **one), cell("B", **one), cell("Odd", **other))
    assert candidates(cell("A", **one).record) == "a" * 64 and candidates(None) is candidates({"candidates_sha256": None}) is None


def test_drawn_anew_and_drawn_once_or_other_numbers_are_no_table() -> None:
    def drawn(label: str, mode: str) -> Cell:
        return cell(label, mask=None, config={"eval_args": {"mode": {"valid": mode, "test": mode}}})

    once = cell("TALLRec", mask=None, candidates_sha256={"test": "a" * 64}, config={"eval_args": {"mode": {"test": "full"}}})
    check("leaderboard: full", [drawn("A", "uni100"), drawn("B", "uni100")])
    found = refusal(drawn("A", "uni100"), drawn("B", "uni100"), once)
    assert found.startswith(
        f"TALLRec (seed 2020) ranked the candidates {'a' * 64}, but A (seed 2020), B (seed 2020) ranked the items"
    )
    assert "Odd (seed 2020) ranked the items of mode uni20, but A" in refusal(
        drawn("A", "uni99"), drawn("B", "uni99"), drawn("Odd", "uni20")
    )


def test_other_users_are_named_before_their_slices() -> None:
    def of(label: str, users: int | None, cold: int, dataset: str = "tiny") -> Cell:
        slices = {label: {"cold": {"users": cold}}}
        return cell(label, slices=slices, config={"eval_users": users, "dataset": dataset})

    check("leaderboard: full", [of("A", None, 10), of("B", 943, 10), of("C", 1000, 10)])
    found = refusal(of("A", None, 10), of("B", 943, 10), of("Odd", 20, 3))
    assert found.startswith(
        "Odd (seed 2020) evaluated 20 users, and A (seed 2020), B (seed 2020) 943; give all models the same eval_users"
    )
    other = of("Odd", None, 10, dataset="songs")
    assert other.record is not None
    other.record["passport"] = passport(users=50)
    assert refusal(of("A", None, 10), of("B", None, 10), other).startswith(
        "Odd (seed 2020) is a run on songs, and A (seed 2020), B"
    )


def test_slices_of_different_sizes_are_no_column() -> None:
    def sliced(label: str, **users: int) -> Cell:
        return cell(label, slices={label: {name: {"users": number} for name, number in users.items()}})

    check("leaderboard: full", [sliced("A", cold=10, warm=20), sliced("B", cold=10), sliced("C"), cell("D", slices=None)])
    found = refusal(sliced("A", cold=10), sliced("B", cold=10), sliced("Odd", cold=12))
    assert found.startswith(
        "the slice cold has 12 users for Odd (seed 2020), and 10 for A (seed 2020), B (seed 2020); give all models"
    )


def test_many_runs_are_counted_not_listed() -> None:
    runs = [cell(f"M{number}") for number in range(9)]
    assert "M0 (seed 2020), M1 (seed 2020), M2 (seed 2020), 6 more" in refusal(*runs, cell("Odd", mask=False))


def test_the_same_users() -> None:
    assert same_users("full", {}) is None and same_users("full", {"A": ("u1", "u2"), "B": ("u1", "u2")}) == 2
    with pytest.raises(ValueError, match=r"full: A .2 users. and B .1 users. have different users .'u2' is in one only."):
        same_users("full", {"A": ("u1", "u2"), "B": ("u1",)})


def test_several_targets_ranked_together_and_one_by_one_are_no_table() -> None:
    ranked = {how: {"mask_history": True, "targets": how} for how in ("together", "one by one")}
    check("leaderboard: full", [cell("BPR", protocol=ranked["together"]), cell("Pop", protocol=ranked["together"])])
    odd = cell("SASRec", protocol=ranked["one by one"])
    assert refusal(cell("BPR", protocol=ranked["together"]), cell("Pop", protocol=ranked["together"]), odd).startswith(
        "users have several test items, which SASRec (seed 2020) ranked one by one, and BPR (seed 2020), Pop (seed 2020) ranked "
        "together"
    )
