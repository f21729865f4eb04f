"""``recbole-llm replicate``: run the boards of claims, test the claims, and write the page of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.leaderboard.board import folder_of, run_cells
from recbole_llm.replication.claims import Board, read_boards, with_claims
from recbole_llm.replication.digest import with_digest
from recbole_llm.replication.judged import judge
from recbole_llm.replication.measure import NotMeasuredError, measure
from recbole_llm.replication.page import PICTURE, page
from recbole_llm.replication.picture import draw, rows
from recbole_llm.replication.results import Results, add, read_results, write_results
from recbole_llm.store.files import atomic_write

logger = getLogger()
JSON_FILE, PAGE_FILE, README = "replication.json", "replication.md", "README.md"


def replicate(
    names: Sequence[str],
    changes: Mapping[str, Any],
    *,
    claims: Sequence[str] = (),
    jobs: int = 1,
    engine: str = "process",
    out: Path = Path("docs"),
    show: bool = False,
) -> tuple[list[Path], int]:
    """Run what has no record, test the claims, and write ``replication.json``, ``replication.md`` and ``replication.png``.

    Results of claims without records stay as they are in the JSON.

    Args:
        names: boards of ``properties/claims`` or files of one's own; all without names.
        changes: keys of every run, which override those of the files.
        claims: names of the only claims to be tested; all without names. A run that none of them reads is not made.
        jobs, engine: as in :func:`recbole_llm.leaderboard.runner.run_tasks`.
        out: folder of both files; a README beside the folder, with marks for it, gets a short table of the claims.
        show: run nothing; test the existing records.

    Returns:
        The files, and the number of claims without a result although their runs were to be made.

    Raises:
        ValueError, FileNotFoundError: a file or an option is invalid.
    """
    boards, results, missing = read_boards(names), read_results(out / JSON_FILE), 0
    for board in with_claims(boards, claims):
        missing += _test(board, changes, results, jobs=jobs, engine=engine, show=show)
        write_results(out / JSON_FILE, results)  # after each board, so that a kill loses none
    known = read_boards()
    own = [board for board in boards if board.file not in [other.file for other in known]]
    judged = judge(results, [*known, *own])  # once: the p-values of all of them are one family
    atomic_write(out / PAGE_FILE, page(judged, results, [*known, *own]))
    if shown := rows(judged):
        draw(out / PICTURE, shown)
    readme = out.resolve().parent / README
    if readme.is_file():
        old, of_package = readme.read_text(encoding="utf-8"), [one for one in judged if one.board in known]
        if (text := with_digest(old, of_package, f"{out.resolve().name}/{PAGE_FILE}")) != old:
            atomic_write(readme, text)
    return [file for name in (JSON_FILE, PAGE_FILE, PICTURE) if (file := out / name).is_file()], 0 if show else missing


def _test(board: Board, changes: Mapping[str, Any], results: Results, **how: Any) -> int:
    """Add the results of a board; returns the number of claims without one."""
    cells = run_cells(board.tasks(changes), folder_of(board.file, changes), **how)
    reasons: dict[str, list[str]] = {}
    for claim in board.claims:
        try:
            add(results, board.name, claim.name, measure(board, claim, cells, changes))
        except NotMeasuredError as error:
            reasons.setdefault(str(error), []).append(claim.name)
    for reason, names in reasons.items():
        which = "no claim measured" if len(names) == len(board.claims) else f"not measured: {'; '.join(names)}"
        logger.warning(f"{board.name}: {which}: {reason}")
    return sum(map(len, reasons.values()))
