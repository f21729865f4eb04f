"""Recognise a split: compare its passport with those of ``properties/splits``.

A file of that folder has facts about a published dataset under this package's default protocol, and no data::

    about: MovieLens 1M, all ratings
    sources: [...]          # where its counts are published
    counts: ...             # as in a passport, like the remaining keys
    sha256: ...
    sketches: ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from recbole.utils import init_seed
from tabulate import tabulate

from recbole_llm.config.property_files import properties_folder
from recbole_llm.data import passport as passports
from recbole_llm.data.loading import create_dataset
from recbole_llm.data.passport import Interactions, percent
from recbole_llm.data.split_facts import PHASES, split_facts
from recbole_llm.store.files import atomic_write, fingerprint

_NEAR = 0.5  # the share of targets that may differ from the nearest known split


@cache
def known_splits(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The known splits by name."""
    files = sorted((folder or properties_folder() / "splits").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def identify(config: Any, dataset: Any, whole: Interactions, splits: Mapping[str, Any]) -> dict[str, Any]:
    """The passport of a split, with the known split that it is or that is nearest; arguments as for ``passport.held_out``."""
    targets = passports.held_out(config, dataset, whole, splits)
    found = passports.passport(config, dataset.read_counts, whole, targets)
    return {**recognise(found, known_splits()), **found}


def recognise(passport: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is known about a split.

    Returns:
        ``recognised``: the name of a known split with the same targets, else None; which of several items of one time is the
        target may differ. ``nearest``: that name, or the name of the split with the most targets in common, if that is at least
        half of the larger split's. ``targets_differ``: the share that differs from the nearest one. ``verdict``: a sentence.
    """
    # of both sides: the popularities of a few targets all occur among those of a large split
    shares = {name: max(_share(passport, other), _share(other, passport)) for name, other in known.items()}
    hashes = passport["sha256"]
    for name, other in known.items():
        if other["sha256"]["targets"] == hashes["targets"]:
            share = min(passports.differing(passport, other, kind) for kind in ("tokens", "popularity"))
            how = ""
            if share:
                how = f"; {percent(share)} of the test targets are other items of the same time"
            elif passports.identity(passport) != passports.identity(other):
                how = "; ids or the order of equal times differ"
            return _verdict(name, name, share, f"recognised: {name}, {other['about']}{how}")
    for name, other in known.items():
        if other["sha256"]["histories"] == hashes["histories"]:
            share, _ = shares[name]
            return _verdict(None, name, share, f"another split of the interactions of {name}; {_differ(share)}")
    nearest = min(shares, key=lambda name: shares[name][0], default=None)
    if nearest is None or shares[nearest][0] > _NEAR:
        return _verdict(None, None, None, "not known: none of the published splits has half of these targets")
    share, rough = shares[nearest]
    counted = ", ".join(passports.counted(passport, known[nearest]))
    how = ", estimated from rounded popularities" if rough else ""
    return _verdict(None, nearest, share, f"nearest known: {nearest}; {_differ(share)}{how}{counted and f' ({counted})'}")


def _share(passport: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, bool]:
    """The share of the test targets that differ, by the most exact sketch that applies, and whether it is a rough one."""
    tokens, popularity, rounded = (passports.differing(passport, other, kind) for kind in ("tokens", "popularity", "rounded"))
    if tokens <= _NEAR:  # the same ids
        return tokens, False
    same = passport["sha256"]["popularities"] == other["sha256"]["popularities"]
    return (popularity, False) if (same and popularity <= _NEAR) or popularity <= rounded else (rounded, True)


def _differ(share: float) -> str:
    return f"{percent(share)} of the targets differ"


def _verdict(name: str | None, nearest: str | None, share: float | None, text: str) -> dict[str, Any]:
    return {"verdict": text, "recognised": name, "nearest": nearest, "targets_differ": share}


def passport_of(config: Any, dataset: Any) -> dict[str, Any]:
    """The passport of a dataset, with its repeats and ties; splits the dataset, whose table of interactions changes by that."""
    whole = dataset.interactions
    found = identify(config, dataset, whole, dict(zip(PHASES, dataset.build()[1:], strict=True)))
    return found | split_facts(config, dataset)


def write_passport(config: Any) -> tuple[dict[str, Any], Path]:
    """Split the dataset of ``config``; returns the passport, with its repeats and ties, and its file below ``checkpoint_dir``."""
    init_seed(config["seed"], config["reproducibility"])
    found = passport_of(config, create_dataset(config))
    name = f"{config['dataset']}-{fingerprint(found['sha256'])[:8]}.json"
    file = Path(config["checkpoint_dir"]) / "passports" / name
    atomic_write(file, json.dumps(found, indent=1, default=float))
    return found, file


def describe(passport: Mapping[str, Any]) -> str:
    """A passport of :func:`write_passport` as plain text."""
    read, counts = passport["read"], passport["counts"]
    sizes = [[name, f"{read[name]:,}", f"{counts[name]:,}"] for name in ("users", "items", "interactions")]

    def share(value: float | None) -> str:
        return "not counted" if value is None else f"{value:.1%}"

    lines = [
        ["density", f"{counts['density']:.3%}"],
        *([f"{phase} targets", f"{counts['targets'][phase]:,}"] for phase in PHASES),
        *([f"{phase} targets decided by a tie of time", share(passport["ties"]["tied_targets"][phase])] for phase in PHASES),
        *([f"{phase} targets in the history", share(passport["repeats"]["repeated_targets"][phase])] for phase in PHASES),
        ["dropped repeats", f"{passport['repeats']['dropped']:,}"],
        *([key, value] for key, value in passport["filters"].items()),
        *([f"SHA-256 {name}", value] for name, value in passport["sha256"].items()),
    ]
    tables = tabulate(sizes, headers=["", "read", "filtered"], disable_numparse=True), tabulate(lines, disable_numparse=True)
    return "\n\n".join([passport["verdict"], *tables])
