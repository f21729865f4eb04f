"""The page of claims, made of ``replication.json`` and the claims' files alone: one row a claim."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recbole_llm.config.values import plain
from recbole_llm.leaderboard.digits import duration, p_value, significant
from recbole_llm.replication.claims import BETTER, EQUAL, NOT_WORSE, Board, Claim
from recbole_llm.replication.judged import CHANGED, NOT_RUN, Judged, tally
from recbole_llm.replication.picture import rows
from recbole_llm.replication.results import Results
from recbole_llm.replication.verdicts import ALPHA, FAILS, HOLDS, OPEN, interval, users_needed, verdict

PICTURE = "replication.png"

_MARGINS = {BETTER: "margin", EQUAL: "equal within", NOT_WORSE: "not worse by"}
_HEAD = f"""# Do the papers' claims replicate?

This page is written by `recbole-llm replicate` from [replication.json](replication.json) and the files of
[properties/claims](../properties/README.md); nothing in it is typed by hand. A claim, its test and its margin are in such a
file before it is run. A claim that was changed after its run is marked, and its earlier form stays on the page.

- **Test.** The difference of two rows, user by user and averaged over seeds, with a 95 % bootstrap interval over users, given
  the trained models; if fewer than five users have another difference than most (0, mostly), it is wider by the share of users
  who may differ unseen. The p-values of paired permutation tests are adjusted over the whole page (Benjamini-Hochberg). A row is
  compared with chance, a number or a formula by an exact binomial test of its hits, or by a t test.
- **Verdict.** *{HOLDS}*: the interval lies above 0, and the adjusted p-value is below {ALPHA:g}. *{FAILS}*: the interval lies
  below the margin, the smallest difference that would support the claim; intervals are not adjusted for the number of claims.
  *{OPEN}*: anything else, also if neither row is above a random ranking (*both at chance*), since models that have learnt
  nothing do not differ. The number of users that would decide is that of a test with a power of 80 % to detect a difference of
  the margin in all comparisons that are open. If the dataset has fewer, the command beside it, which takes a larger model and an
  accelerator, decides only if that model shows a larger difference.
- **Several comparisons.** A claim holds if all of its comparisons do, and does not hold if one does not. A claim that two sides
  are equal holds if the interval lies within the margin on both sides of 0, and does not hold if it lies outside. A claim that a
  row is not worse holds if the interval lies above minus the margin, and does not hold if it lies below.
- **Scale.** A verdict is about the backbone, the data and the budget of its board, not about the paper's own runs.
"""


def page(judged: Sequence[Judged], results: Results, boards: Sequence[Board]) -> str:
    """The page of judged claims as Markdown, with the boards that all results belong to."""
    parts = [_HEAD + _seeds(judged), f"{tally(judged)}\n"]
    parts += [f"![Differences of the measured claims, with their intervals]({PICTURE})\n"] if rows(judged) else []
    for paper in dict.fromkeys(one.claim.paper for one in judged):
        own = [one for one in judged if one.claim.paper == paper]
        parts.append(f"## {_cell(paper)}\n\n{_table(own)}")
        notes = [line for one in own for line in _notes(one)]
        parts += ["\n".join(notes) + "\n"] if notes else []
    parts.append(_boards(judged, boards))
    parts += _withdrawn(results, boards)
    return "\n".join(parts)


def _seeds(judged: Sequence[Judged]) -> str:
    """A line if each result has a single seed: its interval does not know of other trainings."""
    if {len(one.result["seeds"]) for one in judged if one.result} != {1}:
        return ""
    return (
        "- **One seed.** Each result is that of one training of its rows, and its interval is about users. Another seed may\n"
        "  change a row by more, so a small difference that holds here may not hold after another training.\n"
    )


def _table(own: Sequence[Judged]) -> str:
    head = ["claim", "published", "our test", "our result", "verdict"]
    rows = [[_claim(one), _published(one), _how(one), _outcome(one), _said(one)] for one in own]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def _claim(one: Judged) -> str:
    return f"**{_cell(one.claim.name)}.** {_cell(one.claim.claim)}"


def _published(one: Judged) -> str:
    return _cell(one.claim.published + (f"<br>*Note:* {one.claim.note}" if one.claim.note else ""))


def _how(one: Judged) -> str:
    claim = one.claim
    where = "".join(f", {part}" for part in (claim.slice and f"{claim.slice} targets", claim.protocol) if part)
    margin = f"{_MARGINS[claim.kind]} {claim.margin:g}"
    return f"{_cell(claim.test)} ({_cell(claim.metric)}{_cell(where)}; {margin}; [{one.board.name}](#boards))"


def _outcome(one: Judged) -> str:
    if one.result is None:
        return ""
    lines = [_pair(test, p) for test, p in zip(one.result["tests"], one.p_values, strict=True)]
    lines += [f"{name}: {_value(value)}" for name, value in one.result["facts"].items() if value is not None]
    if one.result["changes"]:
        lines.append(f"with {_keys(one.result['changes'])}")
    return "<br>".join(map(_cell, lines))


def _pair(test: Mapping[str, Any], p: float | None) -> str:
    low, high = interval(test)
    first, second = map(significant, test["means"])
    shown = "" if p is None else f", p {p_value(p)}"
    difference = f"{test['difference']:+.3f} [{low:+.3f}, {high:+.3f}]{shown}"
    users = "" if test["users"] is None else f", n={test['users']:,}"
    floor = ", both at chance" * bool(test.get("at_chance"))
    return f"{test['better']} {first}, {test['worse']} {second}: {difference}{users}{floor}"


def _said(one: Judged) -> str:
    said = f"**{one.verdict}**"
    if one.verdict == OPEN and one.result:
        needed = _needed(one, one.result["tests"])
        said += f"; {max(needed):,} users would decide" if needed else ""
    if one.verdict in (OPEN, NOT_RUN, CHANGED):
        said += f"<br>`{_cell(command(one.board, one.claim))}`"
    return said


def _needed(one: Judged, tests: Sequence[Mapping[str, Any]]) -> list[int]:
    """The users that each comparison needs which is not decided yet; a number that did not decide it is none."""
    rows = [(test, p) for test, p in zip(tests, one.p_values, strict=True) if test["users"] and not test.get("at_chance")]
    is_open = [test for test, p in rows if verdict([test], one.claim.margin, one.claim.kind, [p]) == OPEN]
    return [number for test in is_open if (number := users_needed(test, one.claim.margin)) > test["users"]]


def command(board: Board, claim: Claim) -> str:
    """The one command that decides a claim on an accelerator."""
    keys = {"data_path": "DIR", **claim.decide_on} if board.dataset != "ml-100k" else claim.decide_on
    given = [f"--{key}={_text(value)}" for key, value in keys.items()]
    own = [board.name, f"--claim={claim.name}"]
    return shlex.join(["recbole-llm", "replicate", *own, *given, *([f"--out=replication-{board.name}"] if given else [])])


def _notes(one: Judged) -> list[str]:
    """A line for each earlier result of a claim, and for each earlier form of it that has a result."""
    lines = []
    for before in one.result.get("earlier", []) if one.result else []:
        same = one.result is not None and before["fingerprint"] == one.result["fingerprint"]
        what = f"an earlier result ({_run(before)}): {_measured(before)}" if same else f"before it was changed: {_before(before)}"
        lines.append(f"- *{one.claim.name}*, {what}")
    if one.verdict == CHANGED and one.result:
        lines.append(f"- *{one.claim.name}* was changed after its run, which tested: {_before(one.result)}")
    return [_cell(line) for line in lines]


def _before(result: Mapping[str, Any]) -> str:
    """An earlier form of a claim, its test and its outcome."""
    claim = result["claim"]
    how = f"{claim['test']} ({claim['metric']}, margin {claim['margin']:g}, {_run(result)})"
    return f"{claim['claim']} {how}: {_measured(result)}"


def _run(result: Mapping[str, Any]) -> str:
    return f"seeds {_list(result['seeds'])}" + (f", with {_keys(result['changes'])}" if result.get("changes") else "")


def _measured(result: Mapping[str, Any]) -> str:
    claim = result["claim"]
    said = verdict(result["tests"], claim["margin"], claim["kind"], [test["p_value"] for test in result["tests"]])
    return f"{'; '.join(_pair(test, None) for test in result['tests'])}; {said}, not adjusted"


def _boards(judged: Sequence[Judged], boards: Sequence[Board]) -> str:
    lines = [
        "## Boards",
        "",
        "| board | command | dataset | seeds | measured | time of the longest claim, cached parts excluded |",
        "|---|---|---|---|---|---|",
    ]
    remarks = []
    for board in boards:
        found = [one.result for one in judged if one.board is board and one.result]
        measured = cost = ""
        if found:
            last = max(found, key=lambda result: result["written"])
            commits = sorted({commit[:12] for result in found for commit in result["commits"]})
            lm = f", {last['backbone']}" if last["backbone"] else ""
            digest = f", candidates `{last['candidates'][:12]}`" if last["candidates"] else ""
            measured = f"{last['written'][:10]}{lm}{digest}, seeds {_list(last['seeds'])}, commit {_list(commits)}"
            longest = max(found, key=lambda result: result["seconds"])
            more = "≥ " if longest["seconds_at_least"] else ""
            cost = f"{more}{duration(longest['seconds'])}, {longest['runs']} {'run' if longest['runs'] == 1 else 'runs'}"
        data = "" if board.dataset == "ml-100k" else " --data_path=DIR"
        file = f"[{board.name}](../properties/claims/{board.file.name})"
        row = (file, f"`recbole-llm replicate {board.name}{data}`", board.dataset, _list(board.seeds), measured, cost)
        lines.append("| " + " | ".join(row) + " |")
        remarks += [f"- {board.name}: {_cell(board.remark)}"] if board.remark else []
        if other := sorted({label for result in found for label in result.get("other_code", ())}):
            remarks.append(f"- {board.name}: another version of the code wrote the records of {_cell(', '.join(other))}")
    return "\n".join([*lines, *([""] if remarks else []), *remarks]) + "\n"


def _withdrawn(results: Results, boards: Sequence[Board]) -> list[str]:
    """Measured claims that their file does not have any more, or whose file was not named: they stay on the page."""
    listed, read = {(board.name, claim.name) for board in boards for claim in board.claims}, {board.name for board in boards}
    gone: dict[bool, list[str]] = {True: [], False: []}
    for board, own in sorted(results.items()):
        for name, result in sorted(own.items()):
            if (board, name) not in listed:
                gone[board in read].append(f"- {_cell(f'{board}: *{name}*: {_before(result)}')}")
    titles = {True: "Measured and withdrawn", False: "Measured, of files that were not named"}
    return [part for known, lines in gone.items() if lines for part in (f"## {titles[known]}\n", "\n".join(lines) + "\n")]


def _keys(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`--{key}={_text(value)}`" for key, value in values.items())


def _text(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else str(plain(value))


def _value(value: Any) -> str:
    return significant(value) if isinstance(value, float) else str(value)


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _cell(text: str) -> str:
    """Text in a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")
