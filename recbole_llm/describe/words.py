"""The description of a dataset in words: facts, then what each family of models would need."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
from tabulate import tabulate

from recbole_llm.data.times import dates, odd_times
from recbole_llm.describe.facts import Description

_WIDTH = 110
_COLUMNS = (36, 30, 60)
_PHASES = {"valid": "validation", "test": "test"}


def in_words(found: Description) -> str:
    """The description as plain text."""
    counts = found.passport["counts"]
    sizes = ", ".join(f"{counts[name]:,} {name}" for name in ("users", "items", "interactions"))
    folder = os.path.normpath(found.folder)
    heading = f"{found.passport['dataset']}: {sizes} (density {counts['density']:.2%}), read from {folder}"
    rows = [[name, textwrap.fill(text, _WIDTH)] for name, text in _facts(found)]
    return "\n\n".join([heading, tabulate(rows, tablefmt="plain", disable_numparse=True), _needs(found)])


def _facts(found: Description) -> Iterator[tuple[str, str]]:
    read, counts = found.passport["read"], found.passport["counts"]
    yield "split", found.passport["verdict"]
    targets = counts["targets"]
    yield "targets", ", ".join(f"{targets[phase]:,} of {name}" for phase, name in _PHASES.items())
    if any(read[name] != counts[name] for name in read):
        yield "read", ", ".join(f"{read[name]:,} {name}" for name in read) + " before filters and dropped repeats"
    for name, values in (("per user", found.per_user), ("per item", found.per_item)):
        yield name, f"{_spread(values)} interactions"
    yield "times", _times(found)
    for odd in odd_times(found.times) if found.times is not None else ():
        yield "", f"{odd}; they order the histories wrongly"
    if found.tied is not None:
        yield "ties", _ties(found)
    yield "repeats", _repeats(found)
    yield "cold items", _cold(found)
    yield from _titles(found)


def _spread(values: np.ndarray) -> str:
    """Least, median, mean and most of counts."""
    if not len(values):
        return "no"
    return f"{values.min():,} to {values.max():,}, median {np.median(values):,.0f}, mean {values.mean():,.1f}"


def _times(found: Description) -> str:
    times = found.times
    if times is None or not len(times):
        return "no column of times"
    moments = dates(times)
    if moments is None:
        return f"{times.min():g} to {times.max():g}, which are no dates"
    first, last = (datetime.fromtimestamp(float(moment), UTC) for moment in (moments.min(), moments.max()))
    return f"{first:%Y-%m-%d} to {last:%Y-%m-%d} (UTC), {(last - first).days:,} days"


def _ties(found: Description) -> str:
    if not found.tied:
        return "none: no user has two interactions at one time"
    text = f"{found.tied:.1%} of the interactions have the time of another one of the same user"
    shares = found.passport["ties"]["tied_targets"]
    decided = ", ".join(f"{shares[phase]:.1%} of {name} targets" for phase, name in _PHASES.items() if shares[phase] is not None)
    return f"{text}; their order (tie_order: {found.passport['ties']['tie_order']}) decides {decided}" if decided else text


def _repeats(found: Description) -> str:
    facts = found.passport["repeats"]
    equal = f"{found.equal_rows:,} rows repeat the time, too" if found.equal_rows else ""
    if found.repeats_kept:
        shares = facts["repeated_targets"]
        known = [f"{shares[phase]:.1%} of {name} targets" for phase, name in _PHASES.items() if shares[phase] is not None]
        return "; ".join(filter(None, ["kept (rm_dup_inter: ~)", f"users knew {', '.join(known)}" if known else "", equal]))
    if not facts["dropped"]:
        return "none: no user has an item twice"
    return "; ".join(filter(None, [f"{facts['dropped']:,} dropped (rm_dup_inter: {facts['rm_dup_inter']})", equal]))


def _cold(found: Description) -> str:
    text = f"{found.cold_items:,} of {len(found.per_item):,} items have no training interaction"
    return text if found.cold_targets is None else f"{text}; they are the target of {found.cold_targets:.1%} of the test users"


def _titles(found: Description) -> Iterator[tuple[str, str]]:
    titles = found.titles
    if titles is None:
        yield "titles", f"none: {found.no_titles}"
        return
    yield "texts", ", ".join(f"{key.removesuffix('_field')}: {name}" for key, name in titles.columns.items())
    missing = f"{titles.untitled:,} missing" if titles.untitled else "none missing"
    missing += f" ({titles.without_row:,} items have no row in .item)" if titles.without_row else ""
    shared = f"{titles.shared:,} items share theirs with another one, and prompts tell them apart"
    yield "titles", f"{missing}; {shared if titles.shared else 'no two are equal'}"
    longer = int((titles.tokens > titles.limit).sum())
    cut = (
        f"{longer:,} above max_title_tokens, {titles.limit}, are cut"
        if longer
        else f"none above max_title_tokens, {titles.limit}"
    )
    if len(titles.tokens):
        spread = f"{_spread(titles.tokens)}, 95 % up to {np.quantile(titles.tokens, 0.95):.0f}"
        yield "title tokens", f"{spread}; {cut} (tokenizer: {titles.tokenizer})"


def _needs(found: Description) -> str:
    rows = []
    for need in found.needs:
        here = f"no: {need.missing}" if need.missing else f"yes{f': {need.found}' if need.found else ''}"
        cells = zip((", ".join(need.models), need.needs, here), _COLUMNS, strict=True)
        rows.append([textwrap.fill(text, width) for text, width in cells])
    return tabulate(rows, headers=["models", "need", "here"], disable_numparse=True)
