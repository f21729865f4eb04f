"""Runs are killed at random moments and started again: the record is that of a run that nobody killed."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

from faults.world import World, differing, record

MODELS = (
    *("TALLRec", "LoRACocktail", "MoLoRec", "WeaveRec", "LlamaRec", "ALLMRec", "Laser", "AlphaRec", "Cascade", "Imported"),
    *("RecentPop", "TransitionGraph", "RepeatRule", "NearestTitles", "NearestTexts"),
    *("Pop", "BPR", "LightGCN", "NeuMF", "GRU4Rec", "NextItNet", "BERT4Rec", "SASRec"),
)


def left_over(saved: Path) -> list[str]:
    """What a killed run has left and the next one has not removed: temporary files, checkpoints of stages, owners of locks."""
    return sorted(str(path.relative_to(saved)) for path in saved.rglob(".*") if path.suffix != ".lock")


def section(
    folder: Path,
    *,
    kills: int = 20,
    restarts: int = 3,
    models: tuple[str, ...] = MODELS,
    seed: int = 0,
    until: float = math.inf,
) -> dict[str, Any]:
    """``kills`` runs of each model in turn, each killed ``restarts`` times before it may end; none begins after ``until``."""
    world = World(folder)
    world.warm()
    rng, lost = Random(seed), []
    runs: dict[str, tuple[float, float, dict[str, Any]]] = {}
    counts = {model: [0, 0, 0, 0] for model in models}  # kills, runs, equal records, others
    for one in range(kills):
        for model in models:
            if time.monotonic() > until:
                break
            if model not in runs:
                whole, first, expected = world.whole(model)
                runs[model] = first.seconds, world.run(world.arguments(model, whole), whole.parent).seconds, expected
            whole_seconds, cached_seconds, expected = runs[model]
            saved = folder / model / str(one) / "saved"
            failed = 0  # of the restarts
            for _ in range(restarts):
                for attempt in range(8):  # a run that ended before its kill has not been killed: earlier, then
                    longest = cached_seconds if record(saved) else whole_seconds
                    command = world.start(world.arguments(model, saved), saved.parent)
                    if command.kill_after_work(rng.random() * longest * 0.8**attempt):
                        counts[model][0] += 1
                        break
                    failed += command.failed
            last = world.run(world.arguments(model, saved), saved.parent)
            found, left = record(saved), left_over(saved)
            same = last.code == 0 and found == expected and not left and not failed
            counts[model] = [counts[model][0], counts[model][1] + 1, counts[model][2] + same, counts[model][3] + (not same)]
            if not same:
                what = (
                    f"another {', '.join(differing(expected, found))}"
                    if found != expected
                    else f"left {', '.join(left) or 'nothing'}, {failed} restarts failed"
                )
                lost.append(f"{model}, run {one}: {last.end}, {what}")
                print(lost[-1], flush=True)
            shutil.rmtree(saved.parent)
    rows = [[model, *own] for model, own in counts.items() if own[1]]
    total = [sum(row[place] for row in rows) for place in range(1, 5)]
    return {
        "part": "kills",
        "title": "Killed runs",
        "columns": ["model", "SIGKILLs", "runs", "records equal to an undisturbed run's", "lost"],
        "rows": [*rows, ["all", *total]],
        "notes": [
            f"Each run is killed {restarts} times, at moments drawn from its processor time, and started again by the same "
            "command.",
            "Equal: every value of the record but times, memory and paths, and so every rank of every user and row. No "
            "temporary file, stage checkpoint or lock owner is left afterwards.",
            "Processor seconds of an undisturbed run, and of the same command again: "
            + ", ".join(f"{model} {whole:.1f} and {cached:.1f}" for model, (whole, cached, _) in runs.items()),
            *(f"Lost: {line}" for line in lost),
        ],
        "lost": total[-1],
    }
