"""Claims of a property file: a leaderboard file (:mod:`recbole_llm.leaderboard.plan`) with one more key::

    claims:
      the cocktail is above its ingredient:
        paper: RecCocktail (arXiv 2502.08271 v2)
        claim: The merged adapter ranks better than the ingredient alone.
        published: "NDCG@1 .4132 against .4079 (Beauty, Table 1)"
        test: NDCG@10 of 500 users, paired
        compare: {better: LoRACocktail, worse: ingredient}   # labels of models; worse may be a list, and all must be worse
        metric: NDCG@10
        slice: cold                       # optional
        protocol: candidates              # optional, the first of the file
        margin: 0.01                      # smallest difference that would support the claim
        facts:                            # optional: numbers of the run record that are shown beside the result
          weight of the base spirit: [LoRACocktail, merge, weights, base spirit]

``compare: {equal: [ONE, OTHER]}`` claims that two are equal up to the margin, and ``{not_worse: ROW, than: OTHER}`` that one is
at most the margin below another, or below each of a list. Beside the label of a row, each side may be a number, ``chance`` (the
expected value of the metric for a random order of the candidates), or ``{random_after_first: LABEL}`` (the expected value if the
row's first place stays and all others are a random order). Instead of a metric of users, a number can be compared with a
measurement that stands in the run record with its interval: ``{recorded: [LABEL, merge, report, ...]}``.
``decide_on`` of the file, or of a claim, has the keys that an accelerator changes, such as ``{llm: qwen2-7b}``. ``remark`` of
the file is shown with its board. Two more keys may be added to a claim after its run, since they change no test: ``own: True``,
if it is not a claim of the paper, such as a control, and ``note``, shown beside the published figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from recbole_llm.config.property_files import properties_folder, property_file, read_yaml
from recbole_llm.config.values import plain
from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.published import in_recbole
from recbole_llm.leaderboard.plan import check_form, read_plan
from recbole_llm.leaderboard.task import Task
from recbole_llm.store.files import fingerprint

CHANCE, AFTER_FIRST, RECORDED = "chance", "random_after_first", "recorded"
BETTER, EQUAL, NOT_WORSE = "better", "equal", "not worse"
_FORM = {
    "paper": "(str)",
    "claim": "(str)",
    "published": "(str)",
    "test": "(str)",
    "compare": "(dict)",
    "metric": "(str)",
    "slice": "(str in cold, warm)",
    "protocol": "(str)",
    "margin": "(float > 0)",
    "decide_on": "(settings)",
    "facts": "(dict of list)",
    "own": "(bool)",
    "note": "(str)",
}
_UNTESTED = ("name", "decide_on", "facts", "own", "note")  # neither the claim nor its test
_NEEDED = ("paper", "claim", "published", "test", "compare", "metric", "margin")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the values of a row, of a row with random other places, a number, chance, or a measurement.

    Attributes:
        path: keys of a measurement in the run record of the row, which has ``value`` and ``interval``.
    """

    label: str | None = None
    number: float | None = None
    after_first: bool = False
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.label is None:
            return CHANCE if self.number is None else f"{self.number:g}"
        if self.path:
            return f"{' '.join(self.path[-2:]).replace('_', ' ')} of {self.label}"
        return f"{self.label}, random after the first place" if self.after_first else self.label

    @property
    def is_row(self) -> bool:
        """Whether users have values of their own that a model ranked."""
        return self.label is not None and not self.after_first and not self.path


@dataclass(frozen=True)
class Claim:
    """A claim and its test.

    Attributes:
        pairs: the comparisons, which must all turn out as claimed: the better and the worse side.
        kind: what is claimed of each pair, :data:`BETTER`, :data:`EQUAL` or :data:`NOT_WORSE`.
        metric: as in a run record, such as ``ndcg@10``.
        facts: what is shown -> label and keys of the run record.
        own: whether it is this package's and not the paper's, such as a control.
        note: what the reader has to know of the published figure or of the test.
    """

    name: str
    paper: str
    claim: str
    published: str
    test: str
    pairs: tuple[tuple[Side, Side], ...]
    kind: str
    metric: str
    slice: str | None
    protocol: str
    margin: float
    decide_on: Mapping[str, Any]
    facts: Mapping[str, Sequence[str]]
    own: bool = False
    note: str | None = None

    @property
    def labels(self) -> list[str]:
        """Labels of all rows that the test compares."""
        return list(dict.fromkeys(side.label for pair in self.pairs for side in pair if side.label is not None))

    def reads(self, task: Task) -> bool:
        """Whether a run is compared or quoted."""
        return task.protocol == self.protocol and task.label in {*self.labels, *(path[0] for path in self.facts.values())}

    def as_dict(self) -> dict[str, Any]:
        """What was claimed and how it is tested, as JSON-able data."""
        parts = {key: value for key, value in asdict(self).items() if key not in _UNTESTED}
        return plain(parts | {"pairs": [[str(better), str(worse)] for better, worse in self.pairs]})


@dataclass(frozen=True)
class Board:
    """The claims of one file and the runs that decide them."""

    name: str
    file: Path
    dataset: str
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    remark: str | None = None

    def tasks(self, changes: Mapping[str, Any] | None = None) -> list[Task]:
        """The runs that the claims read, with ``changes`` as in :func:`recbole_llm.leaderboard.plan.read_plan`."""
        return [task for task in read_plan(self.file, changes) if any(claim.reads(task) for claim in self.claims)]

    @cached_property
    def _own(self) -> list[Task]:
        return self.tasks()

    def fingerprint(self, claim: Claim) -> str:
        """SHA-256 of the claim, its test, and the runs of its rows as the file has them, with the content of their files."""
        own = [task for task in self._own if task.label in claim.labels and task.protocol == claim.protocol]
        runs = [[*task.arguments, task.row, *(read_yaml(property_file(file)) for file in task.config_files)] for task in own]
        return fingerprint({"claim": claim.as_dict(), "runs": runs})


def claim_files() -> list[Path]:
    """The files of ``properties/claims``, by name."""
    return sorted((properties_folder() / "claims").glob("*.yaml"))


def read_boards(names: Iterable[str] = ()) -> list[Board]:
    """The boards of ``names``, stems of ``properties/claims`` or paths of files; all without names.

    Raises:
        ValueError, FileNotFoundError: as :func:`read_board`, there is no such name, or two files have one name.
    """
    known = {file.stem: file for file in claim_files()}
    files: dict[str, Path] = {}
    for name in names:
        if name not in known and not name.endswith((".yaml", ".yml")):
            raise ValueError(f"replicate: there are no claims {name!r}; known: {', '.join(known)}, or give a .yaml file")
        file = known[name] if name in known else property_file(name, "replicate")
        same = files.setdefault(file.stem, known.get(file.stem, file))
        if same.resolve() != file.resolve():
            raise ValueError(f"replicate: {file} has the name of {same}, under which its results would be stored; rename it")
    return [read_board(file) for file in (files or known).values()]


def with_claims(boards: Sequence[Board], names: Sequence[str]) -> list[Board]:
    """The boards that have claims of these names, with these claims alone; all as they are without names.

    Raises:
        ValueError: no board has such a claim; names the nearest ones.
    """
    if not names:
        return list(boards)
    known = {claim.name for board in boards for claim in board.claims}
    for name in names:
        if name not in known:
            near = "; ".join(get_close_matches(name, known, n=3, cutoff=0))
            where = ", ".join(board.name for board in boards)
            raise ValueError(f"replicate: --claim={name!r} is not a claim of {where}; nearest: {near}")
    found = [replace(board, claims=tuple(claim for claim in board.claims if claim.name in names)) for board in boards]
    return [board for board in found if board.claims]


def read_board(file: Path) -> Board:
    """The claims of a file.

    Raises:
        ValueError: a key is missing, unknown or has a wrong value; names the file and the claim.
    """
    content, tasks = read_yaml(file), read_plan(file)
    claims = content.get("claims") or {}
    if not claims:
        raise ValueError(f"{file}: `claims` is missing or empty")
    rows: dict[str, list[str]] = {}
    for task in tasks:
        rows.setdefault(task.protocol, [])
        rows[task.protocol] += [] if task.label in rows[task.protocol] else [task.label]
    found = tuple(_claim(f"{file}: claims: `{name}`", str(name), given, rows, content) for name, given in claims.items())
    return Board(file.stem, file, content["dataset"], tuple(content["seeds"]), found, content.get("remark"))


def _claim(where: str, name: str, given: Any, rows: Mapping[str, Sequence[str]], content: Mapping[str, Any]) -> Claim:
    check_form(where, given, _FORM, _NEEDED)
    protocol = given.get("protocol") or next(iter(rows))
    if protocol not in rows:
        raise ValueError(f"{where}: protocol: {protocol!r} is not one of {', '.join(rows)}")
    if not metrics.metrics([1], [in_recbole(given["metric"].lower())]):
        raise ValueError(f"{where}: metric: {given['metric']} does not follow from a target's rank; such as NDCG@10")
    pairs, kind = _pairs(where, given["compare"])
    for label in [side.label for pair in pairs for side in pair if side.label is not None]:
        _check_label(f"{where}: compare", label, rows[protocol])
    for pair in pairs:
        numbers = [side.number for side in pair if side.number is not None]
        measured = any(side.path for side in pair)
        if not any(side.is_row for side in pair) and not (measured and numbers):
            raise ValueError(f"{where}: compare: one side must be a row of models, or one {RECORDED} and the other a number")
        for number in [] if measured else numbers:
            if not 0 <= number <= 1:
                raise ValueError(f"{where}: compare: {number:g} is no value of {given['metric']}, which lies between 0 and 1")
        if not measured and given["margin"] >= 1:
            raise ValueError(f"{where}: margin: {given['margin']:g} is no difference of {given['metric']}; give one below 1")
    facts = given.get("facts") or {}
    for fact, path in facts.items():
        _check_label(f"{where}: facts: {fact}", path[0] if path else None, rows[protocol])
    return Claim(
        name,
        given["paper"],
        given["claim"],
        given["published"],
        given["test"],
        pairs=pairs,
        kind=kind,
        metric=given["metric"].lower(),
        slice=given.get("slice"),
        protocol=protocol,
        margin=float(given["margin"]),
        decide_on=given.get("decide_on") or content.get("decide_on") or {},
        facts=facts,
        own=given.get("own", False),
        note=given.get("note"),
    )


def _check_label(where: str, label: Any, known: Sequence[str]) -> None:
    if label not in known:
        raise ValueError(f"{where}: there is no row {label!r} in models; known: {', '.join(known)}")


def _pairs(where: str, compare: Mapping[str, Any]) -> tuple[tuple[tuple[Side, Side], ...], str]:
    """The pairs of ``compare``, and what is claimed of them."""
    for one, other, kind in (("better", "worse", BETTER), ("not_worse", "than", NOT_WORSE)):
        if set(compare) == {one, other}:
            others = compare[other] if isinstance(compare[other], list) else [compare[other]]
            if not others:
                raise ValueError(f"{where}: compare: {other}: the list is empty; name a row at least")
            return tuple((_side(where, compare[one]), _side(where, side)) for side in others), kind
    if set(compare) == {"equal"} and isinstance(compare["equal"], list) and len(compare["equal"]) == 2:
        one, other = compare["equal"]
        return ((_side(where, one), _side(where, other)),), EQUAL
    forms = "{better: ROW, worse: ROW}, {not_worse: ROW, than: ROW} nor {equal: [ROW, ROW]}"
    raise ValueError(f"{where}: compare: {compare!r} is neither {forms}")


def _side(where: str, given: Any) -> Side:
    if isinstance(given, dict) and set(given) == {AFTER_FIRST}:
        return Side(str(given[AFTER_FIRST]), after_first=True)
    if isinstance(given, dict) and set(given) == {RECORDED} and isinstance(given[RECORDED], list) and len(given[RECORDED]) > 1:
        label, *path = map(str, given[RECORDED])
        return Side(label, path=tuple(path))
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return Side(number=float(given))
    if given == CHANCE:
        return Side()
    if isinstance(given, str):
        return Side(given)
    forms = f"{CHANCE}, {{{AFTER_FIRST}: ROW}}, nor {{{RECORDED}: [ROW, KEY, ...]}}"
    raise ValueError(f"{where}: compare: {given!r} is neither a row, a number, {forms}")
