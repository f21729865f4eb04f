"""Runs are killed at random moments and started again: the record is that of a run that nobody killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

from faults.world import World, differing, record

MODELS = (
    *("TALLRec", "LoRACocktail", "MoLoRec", "WeaveRec", "LlamaRec", "ALLMRec", "Laser", "AlphaRec", "Cascade", "Imported"),
    *("RecentPop", "TransitionGraph", "RepeatRule", "NearestTitles", "NearestTexts"),
    *("Pop", "BPR", "LightGCN", "NeuMF", "GRU4Rec", "NextItNet", "BERT4Rec", "SASRec"),
)


def section(
    folder: Path, *, kills: int = 20, restarts: int = 3, models: tuple[str, ...] = MODELS, seed: int = 0
) -> dict[str, Any]:
    """``kills`` runs of each model, each killed ``restarts`` times before it may end."""
    world = World(folder)
    world.warm()
    rng, rows, lost = Random(seed), [], []
    for model in models:
        whole = folder / model / "whole" / "saved"
        took = [world.run(world.arguments(model, whole), whole.parent).seconds for _ in range(2)]  # the second one is cached
        shutil.rmtree(whole)
        first = world.run(world.arguments(model, whole), whole.parent)
        expected = record(whole)
        if first.code or expected is None:
            raise RuntimeError(f"{model}: {first.text}")
        delivered = equal = 0
        for one in range(kills):
            saved = folder / model / str(one) / "saved"
            for _ in range(restarts):
                longest = took[1] if record(saved) else first.seconds
                for attempt in range(8):  # a run that ended before its kill has not been killed: earlier, then
                    command = world.start(world.arguments(model, saved), saved.parent)
                    if command.kill_after(rng.random() * longest * 0.8**attempt):
                        delivered += 1
                        break
            last = world.run(world.arguments(model, saved), saved.parent)
            same = last.code == 0 and record(saved) == expected
            equal += same
            if not same:
                lost.append(f"{model}, run {one}: {last.end}, another {', '.join(differing(expected, record(saved)))}")
            shutil.rmtree(saved.parent)
        rows.append([model, delivered, kills, equal, kills - equal])
    total = [sum(row[place] for row in rows) for place in range(1, 5)]
    return {
        "part": "kills",
        "title": "Killed runs",
        "columns": ["model", "SIGKILLs", "runs", "records equal to an undisturbed run's", "lost"],
        "rows": [*rows, ["all", *total]],
        "notes": [
            f"Each run is killed {restarts} times, at moments drawn from its duration, and started again by the same command.",
            "Equal: every value of the record but times, memory and paths, and so every rank of every user and row.",
            *(f"Lost: {line}" for line in lost),
        ],
        "lost": total[-1],
    }
