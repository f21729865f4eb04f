"""What ``recbole-llm recommend`` prints, and the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tabulate import tabulate

from recbole_llm.recommend.recommender import COLUMNS, RunRecommender
from recbole_llm.recommend.request import Person, Request
from recbole_llm.store.files import atomic_file
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.spreadsheets import guard

_SHOWN = 20  # last items of a history that are printed
_SCHEMA = pa.schema([*((name, pa.string()) for name in ("user", "item", "title")), ("rank", pa.int64()), ("score", pa.float64())])


def show(recommender: RunRecommender, people: Iterable[Person], request: Request) -> Iterator[str]:
    """The history and the recommendations of each one, as text."""
    for one in people:
        name, _, history = one
        lines = [[recommender.titles.item_ids[item], recommender.titles.names[item]] for item in history[-_SHOWN:]]
        left = f", the last {_SHOWN}" if len(history) > _SHOWN else ""
        found = pd.concat([part for _, part in recommender.batches([one], request)])
        rows = [[rank, item, title, f"{score:.4g}"] for _, rank, item, title, score in found.itertuples(index=False)]
        yield "\n".join(
            [
                f"{name}: history of {len(history)} item{'s' * (len(history) != 1)}{left}, oldest first",
                tabulate(lines, headers=["item", "title"], disable_numparse=True),
                "",
                "recommended",
                tabulate(rows, headers=["", "item", "title", "score"], disable_numparse=True),
            ]
        )


def write(
    recommender: RunRecommender, people: Iterable[Person], request: Request, out: Path, *, number: int, show_progress: bool
) -> int:
    """Write the recommendations for ``number`` people to a file; returns the number of lines. Memory is that of one batch.

    The columns ``user``, ``item``, ``score`` and ``rank`` are those that ``--model=Imported`` reads.

    Raises:
        ValueError: the ending of the file is unknown.
    """
    check_ending(out)
    lines = 0
    bar = progress_bar("recommend", number, show=show_progress)
    with atomic_file(out) as temporary, _WRITERS[out.suffix](temporary) as add, bar as shown:
        for done, part in recommender.batches(people, request):
            add(part)
            lines += len(part)
            shown.advance(done)
    return lines


def check_ending(out: Path) -> None:
    """Refuse a file whose ending is unknown."""
    if out.suffix not in _WRITERS:
        raise ValueError(f"--out={out}: the ending {out.suffix!r} is unknown; give {', '.join(_WRITERS)}")


def read_lines(path: Path, key: str) -> list[str]:
    """The lines of a text file that are not empty, such as user ids.

    Raises:
        ValueError: there is no such file, or it has no lines; names the key.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{key}: {path} cannot be read ({getattr(error, 'strerror', None) or error}); give a text file with one per line"
        ) from error
    if not found:
        raise ValueError(f"{key}: {path} is empty; give one per line")
    return found


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        yield lambda part: writer.write_table(pa.Table.from_pandas(part, _SCHEMA, preserve_index=False))


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with open(path, "w", encoding="utf-8", newline="") as file:
        pd.DataFrame(columns=COLUMNS).to_csv(file, index=False)

        def add(part: pd.DataFrame) -> None:
            titles = part["title"].map(guard)  # ids stay as they are, for whoever reads the file again
            part.assign(title=titles).to_csv(file, index=False, header=False, lineterminator="\n")

        yield add


@contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with open(path, "w", encoding="utf-8") as file:

        def add(part: pd.DataFrame) -> None:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in part.to_dict("records"))

        yield add


_WRITERS: Mapping[str, Any] = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
