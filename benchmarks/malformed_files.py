"""Damage a small data set in every way and read it: ``python benchmarks/malformed_files.py --files=10000``.

Each file is damaged once to three times: a byte replaced, inserted or removed, a cell, a line, the separators, the line ends, the
encoding. Then a run's dataset is made of it. There are two right outcomes: an error that names the file, or the reading that
:func:`reference` gives, a parser of ten lines that shares no code with the package. Anything else ends the script with the file.
The last line counts the outcomes.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from recbole_llm.config import LLMConfig
from recbole_llm.data.atomic_files import AtomicFileError
from recbole_llm.data.loading import create_dataset

NAME = "toy"
CELLS = [
    "",
    " ",
    "NA",
    "nan",
    "null",
    "inf",
    "-5",
    "1e3",
    "1e999",
    "0x1F",
    "1_000",
    " 7",
    "7 ",
    "265",
    "265.0",
    "2020-01-31",
    "12:30",
]
CELLS += [
    '"',
    '"a',
    'a"',
    "'",
    "é",
    "\u200b",
    "\ufeff",
    "[PAD]",
    "9007199254740993",
    "-0.0",
    "٣",
    "a b",
    "1,5",
    "\\N",
    "#",
    "x" * 300,
]
BYTES = b'\t\n\r\0",;|# .-+e0159aZ\xe9\xff\xfe\xef\xbb\xbf\x85\x1a'


def write(folder: Path) -> dict[str, bytes]:
    """Write the data set ``toy``, whose ids are words and numbers; returns its files by suffix."""
    items = [*(f"i{n}" for n in range(5)), *map(str, range(265, 269))]
    lines = ["item_id:token\ttitle:token_seq\tyear:float\tgenre:token_seq"]
    lines += [f"{item}\tThe {n}th \"Film\", a 'story' é\t{1990 + n}\tdrama comedy" for n, item in enumerate(items)]
    files = {"item": "\n".join([*lines, ""]).encode()}
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(5):
        lines += [
            f"u{user}\t{items[(user * 2 + step) % 9]}\t{1 + step % 5}\t{1_600_000_000 + 10 * step + user}" for step in range(5)
        ]
    files["inter"] = "\n".join([*lines, ""]).encode()
    (folder / NAME).mkdir(parents=True, exist_ok=True)
    for suffix, content in files.items():
        (folder / NAME / f"{NAME}.{suffix}").write_bytes(content)
    return files


def _in_line(change: Callable[[Random, list[bytes]], list[bytes]]) -> Callable[[Random, bytes], bytes]:
    """Change a line; given and returned as a list of lines, which is one line before."""

    def damage(rng: Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        return b"\n".join([*lines[:at], *change(rng, [lines[at]]), *lines[at + 1 :]])

    return damage


def _cell(rng: Random, lines: list[bytes]) -> list[bytes]:
    cells = lines[0].split(b"\t")
    cells[rng.randrange(len(cells))] = rng.choice(CELLS).encode()
    return [b"\t".join(cells)]


def _byte(rng: Random, data: bytes) -> bytes:
    at, value = rng.randrange(len(data) + 1), bytes([rng.choice(BYTES) if rng.random() < 0.6 else rng.randrange(256)])
    return data[:at] + rng.choice([value, value, b""]) + data[at + rng.randrange(2) :]


DAMAGES: dict[str, Callable[[Random, bytes], bytes]] = {
    "byte": _byte,
    "bytes removed": lambda rng, data: data[: (at := rng.randrange(len(data) + 1))] + data[at + rng.randrange(40) :],
    "cut off": lambda rng, data: data[: rng.randrange(len(data) + 1)],
    "cell": _in_line(_cell),
    "line twice": _in_line(lambda rng, lines: lines * 2),
    "line removed": _in_line(lambda rng, lines: []),
    "empty line": _in_line(lambda rng, lines: [b"", *lines]),
    "line of white space": _in_line(lambda rng, lines: [rng.choice([b" ", b"\t", b"\r", b"\t\t\t"]), *lines]),
    "separator at the end": _in_line(lambda rng, lines: [lines[0] + b"\t"]),
    "separator at all ends": lambda rng, data: data.replace(b"\n", b"\t\n"),
    "cell removed": _in_line(lambda rng, lines: [lines[0].rpartition(b"\t")[0]]),
    "cells in another order": _in_line(lambda rng, lines: [b"\t".join(rng.sample(c := lines[0].split(b"\t"), len(c)))]),
    "another separator": lambda rng, data: data.replace(b"\t", rng.choice([b",", b";", b"|", b" ", b"::", b"\t\t"])),
    "quoted cells": lambda rng, data: b"\n".join(
        b"\t".join(b'"%b"' % cell for cell in line.split(b"\t")) for line in data.split(b"\n")
    ),
    "quoted rows": lambda rng, data: data.replace(b"\t", b'"\t"').replace(b"\n", b'"\n"'),
    "CR LF": lambda rng, data: data.replace(b"\n", b"\r\n"),
    "CR": lambda rng, data: data.replace(b"\n", b"\r"),
    "no types": lambda rng, data: data.replace(b":token_seq", b"").replace(b":token", b"").replace(b":float", b""),
    "no header": lambda rng, data: data.partition(b"\n")[2],
    "header twice": lambda rng, data: data.partition(b"\n")[0] + b"\n" + data,
    "type": lambda rng, data: data.replace(b":float", rng.choice([b":token", b":int", b":", b": float", b":float_seq", b""])),
    "byte order mark": lambda rng, data: b"\xef\xbb\xbf" + data,
    "another encoding": lambda rng, data: data.decode(errors="replace").encode(
        rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "cp037"]), errors="replace"
    ),
    "ids as floats": lambda rng, data: data.replace(b"265\t", b"265.0\t").replace(b"266\t", b"266.0\t"),
    "ids in capitals": lambda rng, data: data.replace(b"\ni", b"\nI").replace(b"\ti", b"\tI"),
}


def damaged(rng: Random, data: bytes) -> tuple[bytes, list[str]]:
    """The file after one to three damages, and their names."""
    names = rng.choices([*DAMAGES], k=rng.choice([1, 1, 1, 2, 3]))
    for name in names:
        data = DAMAGES[name](rng, data)
    return data, names


def reference(data: bytes) -> tuple[list[str], list[list[str]]]:
    """Header names and rows of cells: a strict split of UTF-8 text."""
    header, *lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    names, rows = [cell.split(":")[0] for cell in header.split("\t")], [line.split("\t") for line in lines if line]
    assert all(len(row) == len(names) for row in rows), "rows of other lengths than the header"
    return names, rows


def outcome(config: LLMConfig, folder: Path) -> str:
    """``read`` or ``refused``; an AssertionError for anything else."""
    try:
        dataset = create_dataset(config)
        texts = dataset.item_texts
    except ValueError as error:
        about = str(error)
        assert isinstance(error, AtomicFileError) or any(
            key in about for key in ("TIME_FIELD", "ITEM_ID_FIELD", "title_field", "year_field")
        ), about
        assert any(f"{NAME}.{suffix}" in about for suffix in ("inter", "item")) or f"from {folder / NAME}" in about, about
        return "refused"
    (names, rows), (item_names, item_rows) = (
        reference((folder / NAME / f"{NAME}.{suffix}").read_bytes()) for suffix in ("inter", "item")
    )
    triples = [[row[names.index(name)] for name in ("user_id", "item_id", "timestamp")] for row in rows]
    expected: dict[tuple[str, str], float] = {}  # in time order, the first of each pair
    for user, item, moment in sorted(triples, key=lambda triple: float(triple[2])):
        expected.setdefault((user, item), float(moment))
    frame, histories = dataset.inter_feat, dataset.histories
    users, items = (dataset.id2token(name, frame[name]).tolist() for name in ("user_id", "item_id"))
    assert len(frame) == len(expected), "rows"
    assert dict(zip(zip(users, items, strict=True), frame["timestamp"].tolist(), strict=True)) == expected, "interactions"
    for user, known in zip(histories.user_ids, histories.items, strict=True):
        assert [(user, histories.item_ids[item]) for item in known] == [pair for pair in expected if pair[0] == user], "histories"
    of_item: dict[str, list[str]] = {}
    for row in item_rows:
        of_item.setdefault(row[item_names.index("item_id")], row)
    for item, token in enumerate(dataset.field2id_token["item_id"][1:].tolist(), start=1):
        for name in {*item_names} - {"item_id", "title"}:
            assert _plain(texts.fields[name][item]) == _plain(
                of_item[token][item_names.index(name)] if token in of_item else ""
            ), name
        title = _plain(of_item[token][item_names.index("title")]) if token in of_item else ""
        assert not title or _plain(texts.titles[item]) == title, "title"
    return "read"


def _plain(text: str) -> str:
    return "".join(char for char in text if char.isprintable() and not char.isspace())


def settings(folder: Path) -> LLMConfig:
    """The configuration of a model that reads texts of items."""
    given = {"data_path": str(folder), "year_field": "year", "checkpoint_dir": str(folder / "saved")}
    return LLMConfig("Pop", NAME, config_dict=given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts = Random(options.seed), Counter[str]()
    by_damage: dict[str, Counter[str]] = {name: Counter() for name in DAMAGES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write(folder)
        config = settings(folder)
        for _ in range(options.files):
            suffix = rng.choice([*files])
            file = folder / NAME / f"{NAME}.{suffix}"
            content, names = damaged(rng, files[suffix])
            file.write_bytes(content)
            logging.disable(logging.ERROR)
            try:
                found = outcome(config, folder)
            except Exception as error:
                raise SystemExit(f"{file.name} after {', '.join(names)}: {type(error).__name__}: {error}\n{content!r}") from error
            finally:
                logging.disable(logging.NOTSET)
            counts[found] += 1
            if len(names) == 1:
                by_damage[names[0]][found] += 1
            file.write_bytes(files[suffix])
    for name, found in by_damage.items():
        print(f"{name:24} read {found['read']:6}, refused {found['refused']:6}")
    print(
        f"{options.files} damaged files: {counts['read']} read as the reference reads them, {counts['refused']} refused by name"
    )


if __name__ == "__main__":
    main()
