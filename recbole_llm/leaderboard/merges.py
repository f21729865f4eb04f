"""What the records of runs say about their merges: features of the adapters, and what the merge gained.

A merge is the mean over its seeds. Its gain is a mixture's metric minus that of the better single adapter that it merges, on the
same users. This adapter is the better one on these very users, so the gain is rather too low than too high.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.config.key_groups import BOOKKEEPING
from recbole_llm.evaluation import significance
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.leaderboard.per_user import mean_over_seeds, per_user
from recbole_llm.llm.backbones import BUILTIN
from recbole_llm.store.files import DamagedError, fingerprint
from recbole_llm.store.shared_runs import shared_record

_FEATURES: dict[str, tuple[str, Callable[[float], float]]] = {
    "cosine of the updates": ("cosine", float),
    "cosine, mean over modules": ("cosine_mean", float),
    "|log of the norm ratio|": ("norm_ratio", lambda ratio: abs(math.log(ratio))),
    "|entropy gap| (nats)": ("entropy_gap", abs),
    "overlap of title words": ("title_words", float),
}
FEATURES = tuple(_FEATURES)
OWN, UNIFORM = "the model's mixture", "uniform mix"


@dataclass(frozen=True)
class Gain:
    """The mean over users of a mixture's metric minus the better single adapter's, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Merge:
    """One merge, whatever its seeds.

    Attributes:
        name: model, dataset and backbone.
        method: the model's merge method.
        adapters: the SHA-256 of each merged adapter's weights, of all seeds, sorted.
        better: the better single adapter.
        features: value of each of :data:`FEATURES`; None if it was not measured.
        gains: of :data:`OWN` and :data:`UNIFORM`.
    """

    name: str
    method: str
    adapters: list[str]
    seeds: list[int]
    users: int
    better: str
    features: dict[str, float | None]
    gains: dict[str, Gain]


def read_merges(given: Sequence[str | Path], metric: str | None) -> tuple[list[Merge], str, dict[str, str]]:
    """The merges of runs, the metric of their gains, and each record of a merge that is passed over, with the reason.

    Args:
        given: records, folders of runs or of shared runs, ``hub:user/name``, or folders that contain such.
        metric: None: the first of the first merge.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no record is that of a merge that can be used; says why the first one cannot. Or a shared run is damaged or
            cannot be read.
    """
    records: list[dict[str, Any]] = []
    passed_over: dict[str, str] = {}
    for path in _files(given):
        try:
            record = read_record(path)
        except DamagedError as error:
            passed_over[str(path)] = str(error).removeprefix(f"{path} ")
            continue
        if record.get("merge") is None:
            continue
        metric = metric or next(iter(record["results"][record["model"]]))
        if fault := _fault(record, metric):
            passed_over[str(path)] = fault
        else:
            records.append(record)
    if not records or metric is None:
        why = next((f": {path} {fault}" for path, fault in passed_over.items()), "")
        raise ValueError(f"forecast: no record of a merge in {', '.join(map(str, given))}{why}")
    return [_merge(own, metric) for own in _by_settings(records)], metric, passed_over


def _files(given: Sequence[str | Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for where in given:
        if (shared := shared_record(str(where), "forecast")) is not None:
            found[shared] = None
            continue
        path = Path(where)
        files = sorted(path.rglob("record.json")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(
                f"forecast: there is no record of a run at {path}; give folders of runs, such as saved/runs, or hub:user/name"
            )
        found |= dict.fromkeys(Path(os.path.abspath(file)) for file in files)  # links stay: the hub's cache has one for each file
    return list(found)


def _fault(record: Mapping[str, Any], metric: str) -> str | None:
    """Why the record of a merge is no point."""
    if record.get("evaluates"):
        return f"is {record['evaluates']}, evaluated again"
    if not record["merge"].get("pairs"):
        return "merges one adapter, or names no features of its adapters"
    if len(record["ranks"].get(record["model"]) or ()) == 1:
        return "has one user, of whom there is no interval"
    missing = [row for row in (record["model"], *_single(record)) if per_user(record, row, metric) is None]
    return f"has no ranks, or no {metric}, of the row {missing[0]}" if missing else None


def _single(record: Mapping[str, Any]) -> list[str]:
    """The rows of the merged adapters alone; that of a given one has its hash behind its name."""
    given = record.get("given_adapters") or {}
    names = [source["name"] for source in record["merge"]["sources"]]
    return [f"{name} (given {given[name]['sha256'][:8]})" if name in given else name for name in names]


def _by_settings(records: Iterable[Mapping[str, Any]]) -> list[dict[int, Mapping[str, Any]]]:
    """Records that differ in their seed alone, by seed, the newest of each."""
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record.get("written") or ""):
        config = {key: value for key, value in record["config"].items() if key not in {"seed", *BOOKKEEPING}}
        about = (
            record["model"],
            record["dataset"],
            # a builtin LM is another one with each seed; its settings stand in those of the run
            record["backbone" if config.get("llm_path") == BUILTIN else "backbone_fingerprint"],
            config,
            sorted(record["ranks"][record["model"]]),
        )
        group = groups.setdefault(fingerprint(about), {})
        if record.get("user_ids") is False:
            group.clear()  # each shared record numbers its users anew, so that seeds cannot be averaged by user
        group[record["seed"]] = record
    return list(groups.values())


def _merge(records: Mapping[int, Mapping[str, Any]], metric: str) -> Merge:
    """The merge of records of different seeds."""
    first = next(iter(records.values()))
    name = ", ".join(filter(None, (first["model"], first["dataset"], first["backbone"])))

    def values(rows: Mapping[int, str]) -> np.ndarray | None:
        """The metric of each user [N], averaged over seeds, of a row for each seed."""
        found = mean_over_seeds(name, {seed: per_user(records[seed], row, metric) for seed, row in rows.items()})
        return None if found is None else found.values

    places = range(len(_single(first)))
    single = [values({seed: _single(record)[place] for seed, record in records.items()}) for place in places]
    means = [-math.inf if own is None else own.mean() for own in single]
    best = int(np.argmax(means))
    mixtures = {OWN: first["model"], UNIFORM: first["model"] if first["merge"]["method"] == "uniform" else UNIFORM}
    gains = {}
    for mixture, row in mixtures.items():
        mixed, other = values(dict.fromkeys(records, row)), single[best]
        if mixed is not None and other is not None:
            gains[mixture] = Gain(float((mixed - other).mean()), *significance.interval(mixed - other))
    return Merge(
        name=name,
        method=first["merge"]["method"],
        adapters=sorted(source["sha256"] for record in records.values() for source in record["merge"]["sources"]),
        seeds=sorted(records),
        users=len(first["ranks"][first["model"]]),
        better=_single(first)[best],
        features={feature: _mean([*records.values()], *_FEATURES[feature]) for feature in FEATURES},
        gains=gains,
    )


def _mean(records: Sequence[Mapping[str, Any]], key: str, read: Callable[[float], float]) -> float | None:
    """A feature's mean over pairs and seeds; None if one of them lacks it."""
    found = [pair.get(key) for record in records for pair in record["merge"]["pairs"]]
    return None if None in found else math.fsum(map(read, found)) / len(found)
