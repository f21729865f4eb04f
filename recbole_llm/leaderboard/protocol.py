"""How the targets of a table were ranked, read from the run records and put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.leaderboard.comparable import candidates, mode
from recbole_llm.leaderboard.table import Table


def measured(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The protocol of comparable runs, as the first of their records tells it.

    Returns:
        ``protocol`` of the record, with ``candidates``, their number for each user (None for those of a file, and after a full
        ranking), ``mode``, RecBole's at test, and ``split``, what is known about the split; empty without records.
    """
    if not records:
        return {}
    record = records[0]
    drawn = (record.get("config") or {}).get("candidates") or {}
    passport = record.get("passport") or {}
    counted = candidates(record) and drawn.get("num_negatives") and drawn.get("source") != "file"
    return {
        **(record.get("protocol") or {}),
        "candidates": drawn["num_negatives"] + 1 if counted else None,
        "mode": mode(record),
        "split": {key: passport.get(key) for key in ("verdict", "recognised", "nearest", "targets_differ")},
    }


def protocol_words(table: Table) -> list[str]:
    """Users, what is ranked for them, repeats, ties of time, and the split if it is known."""
    facts = [f"{table.users:,} users"] if table.users else []
    if table.measured:
        facts += [_ranked(table), *_targets(table.measured), *_repeats(table.measured), *_ties(table.measured)]
        facts += _split(table.measured)
    return facts


def _ranked(table: Table) -> str:
    number = table.measured["candidates"]
    if table.candidates:
        which = "others for each seed" if table.candidates_differ else f"SHA-256 {table.candidates[:12]}"
        return (f"{number:,} candidates each" if number else "candidates") + f" ({which})"
    masked = table.measured.get("mask_history")
    if masked is None:
        return f"mode {table.measured.get('mode')}, negatives drawn anew for each row"
    because = table.measured.get("unmasked_because")
    return "full ranking, history " + ("masked" if masked else "not masked" + (f" ({because})" if because else ""))


def _targets(facts: Mapping[str, Any]) -> list[str]:
    several = facts.get("targets")
    return [] if several in (None, "one") else [f"several targets per user, ranked {several}"]


def _repeats(facts: Mapping[str, Any]) -> list[str]:
    """The rule of repeated interactions; nothing is to be said of data without any."""
    repeats = facts.get("repeats") or {}
    rule, dropped, share = repeats.get("rm_dup_inter"), repeats.get("dropped"), _test(repeats.get("repeated_targets"))
    if rule and dropped:
        return [f"of repeated interactions the {rule} is kept ({dropped:,} dropped)"]
    return [f"repeats are kept: {_percent(share)} of the test targets are in the history"] if not rule and share else []


def _ties(facts: Mapping[str, Any]) -> list[str]:
    ties = facts.get("ties") or {}
    share = _test(ties.get("tied_targets"))
    return (
        [] if share is None else [f"ties of time decide {_percent(share)} of the test targets (tie_order: {ties['tie_order']})"]
    )


def _split(facts: Mapping[str, Any]) -> list[str]:
    split = facts["split"]
    known = split.get("recognised") or split.get("nearest")
    return [f"split {split['verdict']}".replace("; ", ", ")] if known else []


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _test(shares: Mapping[str, float | None] | None) -> float | None:
    return (shares or {}).get("test")
