"""What the log and the run record say about a split: repeats and ties of time."""

from __future__ import annotations

from typing import Any

from recbole_llm.data import forms
from recbole_llm.data.repeats import repeated_targets
from recbole_llm.data.ties import tied_targets

PHASES = ("valid", "test")
_WORDS = {"valid": "validation", "test": "test"}


def split_facts(config: Any, dataset: Any) -> dict[str, Any]:
    """The fields ``repeats`` and ``ties`` of a record's ``protocol``.

    Shares are None where a user has several targets; shares of ties also where a target is not the last interaction in time.

    Args:
        dataset: of the run, or one of its splits.
    """
    histories, by_time = dataset.histories, forms.leaves_one_out(config)
    repeated = {phase: repeated_targets(histories, phase) if histories.one_target(phase) else None for phase in PHASES}
    tied = {phase: tied_targets(dataset.histories, phase) if by_time else None for phase in PHASES}
    return {
        "repeats": {"rm_dup_inter": config["rm_dup_inter"], "dropped": dataset.repeats_dropped, "repeated_targets": repeated},
        "ties": {"tie_order": config["tie_order"] or "file", "tied_targets": tied},
    }


def split_lines(config: Any, dataset: Any) -> list[str]:
    """The same for the log; nothing about a dataset without repeats and ties."""
    facts = split_facts(config, dataset)
    repeats, ties, name, lines = facts["repeats"], facts["ties"], config["dataset"], []
    if repeats["dropped"]:
        rule = f"rm_dup_inter: {repeats['rm_dup_inter']}"
        lines.append(f"{name}: {repeats['dropped']:,} repeated interactions are dropped ({rule}; ~ keeps them)")
    if dataset.repeats_kept:
        shares = _shares(repeats["repeated_targets"])
        lines.append(
            f"{name}: repeats are kept (rm_dup_inter: ~), so negatives may come from the history; repeated targets: {shares}"
        )
    if any(ties["tied_targets"].values()):
        shares = _shares(ties["tied_targets"])
        lines.append(
            f"{name}: ties of time, ordered by tie_order: {ties['tie_order']}, decide the targets of some users: {shares}"
        )
    return lines


def _shares(shares: dict[str, float | None]) -> str:
    known = [f"{_WORDS[phase]} {share:.1%}" for phase, share in shares.items() if share is not None]
    return ", ".join(known) or "not counted in this split"
