"""Forms of data: what becomes of the files of `tiny`, and the settings that go with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[list[str]]


def inter(folder: Path) -> tuple[str, Rows]:
    header, *lines = (folder / "tiny.inter").read_text().splitlines()
    return header, [line.split("\t") for line in lines]


def write(folder: Path, name: str, header: str, rows: Rows) -> None:
    (folder / f"tiny{name}.inter").write_text("\n".join([header, *map("\t".join, rows)]) + "\n")


def by_user(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row)
    return found


def plain(folder: Path) -> None:
    pass


def files(*sizes: int, times: bool = True, lists: bool = False, first: bool = False) -> Callable[[Path], None]:
    """Files that are split already: training, and one file for each number of rows at the end of a user's (or, at its start)."""

    def make(folder: Path) -> None:
        header, rows = inter(folder)
        columns = header.split("\t")[: 3 if times else 2] + ["item_id_list:token_seq"] * lists
        parts: list[Rows] = [[] for _ in range(1 + len(sizes))]
        for own in by_user(rows).values():
            shown = [row[: 3 if times else 2] for row in own]
            if lists:
                shown = [[*row, " ".join(item for _, item, *_ in own[:place])] for place, row in enumerate(shown) if place]
            if first:
                shown = shown[sum(sizes) :] + shown[: sum(sizes)]
            ends = np.cumsum([len(shown) - sum(sizes), *sizes])
            for part, end, size in zip(parts, ends, (ends[0], *sizes), strict=True):
                part += shown[end - size : end]
        for name, part in zip(NAMES[len(sizes)], parts, strict=True):
            write(folder, f".{name}", "\t".join(columns), part)
        (folder / "tiny.inter").unlink()

    return make


def without_times(folder: Path) -> None:
    header, rows = inter(folder)
    write(folder, "", "\t".join(header.split("\t")[:2]), [row[:2] for row in rows])


def rated(folder: Path) -> None:
    header, rows = inter(folder)
    write(folder, "", f"{header}\trating:float", [[*row, str(2 + place % 4)] for place, row in enumerate(rows)])


def separated(folder: Path) -> None:
    for file in (folder / "tiny.inter", folder / "tiny.item"):
        file.write_text(file.read_text().replace("\t", "|"))


def renamed(folder: Path) -> None:
    for file in (folder / "tiny.inter", folder / "tiny.item"):
        text = file.read_text().replace("user_id:", "uid:").replace("item_id:", "sku:")
        file.write_text(text.replace("timestamp:", "at:").replace("title:", "name:"))


NAMES = {1: ["train", "test"], 2: ["train", "valid", "test"]}
TWO, THREE = ({"benchmark_filename": NAMES[number]} for number in (1, 2))
LOSS = {"lora_valid": "loss", "retriever_config": {"epochs": 1}}
COLUMNS = {"USER_ID_FIELD": "uid", "ITEM_ID_FIELD": "sku", "TIME_FIELD": "at", "title_field": ["title", "name"]}
RATIO = {"RS": [0.8, 0.1, 0.1]}
LABELS = {"metrics": ["AUC"], "valid_metric": "AUC"}

FORMS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "three files": (files(1, 1), THREE),
    "three files without times": (files(1, 1, times=False), THREE),
    "three files with lists": (files(1, 1, lists=True), THREE),
    "three files, full ranking": (files(1, 1), THREE | {"eval_args": {"mode": "full"}}),
    "three files, several targets": (files(1, 2), THREE),
    "three files, several targets, full ranking": (files(1, 2), THREE | {"eval_args": {"mode": "full"}}),
    "three files, several targets, full ranking, by loss": (files(1, 2), THREE | LOSS | {"eval_args": {"mode": "full"}}),
    "three files, filtered": (files(1, 1), THREE | {"user_inter_num_interval": "[7,inf)"}),
    "two files": (files(1), TWO),
    "two files, by loss": (files(1), TWO | LOSS),
    "one name": (files(1), {"benchmark_filename": ["train"]}),
    "test only": (plain, {"eval_args": {"split": {"LS": "test_only"}}}),
    "valid only": (plain, {"eval_args": {"split": {"LS": "valid_only"}}}),
    "leave one out, random": (plain, {"eval_args": {"order": "RO"}}),
    "leave one out, not grouped": (plain, {"eval_args": {"group_by": "none"}}),
    "ratio": (plain, {"eval_args": {"split": {"RS": [0.7, 0.1, 0.2]}, "mode": "full"}}),
    "ratio, candidates": (plain, {"eval_args": {"split": {"RS": [0.6, 0.1, 0.3]}}}),
    "ratio, not grouped": (plain, {"eval_args": {"split": RATIO, "group_by": None, "mode": "full"}}),
    "ratio, random": (plain, {"eval_args": {"split": RATIO, "order": "RO", "mode": "full"}}),
    "ratio without validation": (plain, {"eval_args": {"split": {"RS": [0.8, 0, 0.2]}, "mode": "full"}}),
    "two ratios": (plain, {"eval_args": {"split": {"RS": [0.8, 0.2]}, "mode": "full"}}),
    "time": (plain, {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}, "mode": "full"}}),
    "uni9": (plain, {"eval_args": {"mode": "uni9"}}),
    "pop9": (plain, {"eval_args": {"mode": "pop9"}}),
    "uni9 of a ratio": (plain, {"eval_args": {"split": RATIO, "mode": "uni9"}}),
    "uni": (plain, {"eval_args": {"mode": "uni"}}),
    "filtered users": (plain, {"user_inter_num_interval": "[7,inf)"}),
    "filtered values": (rated, {"val_interval": {"rating": "[3,inf)"}}),
    "filtered values without the column": (plain, {"val_interval": {"rating": "[3,inf)"}}),
    "threshold without the column": (plain, {"threshold": {"rating": 3}}),
    "separator": (separated, {"field_separator": "|"}),
    "renamed": (renamed, COLUMNS),
    "without times": (without_times, {}),
    "without times, random": (without_times, {"eval_args": {"split": RATIO, "order": "RO", "mode": "full"}}),
    "labels in a ranking": (plain, LABELS),
    "labels and ranks": (plain, {"metrics": ["Hit", "RMSE"], "valid_metric": "Hit@5"}),
    "ranks of labels": (plain, {"eval_args": {"mode": "labeled"}}),
}
