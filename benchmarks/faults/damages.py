"""Files of finished runs are damaged, and the same command is given again: the damage is named, or what it hit is rebuilt."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from faults.world import Outcome, World, differing, record

MODELS = ("Pop", "TALLRec", "LoRACocktail", "AlphaRec", "ALLMRec", "Laser")
NAMED, REBUILT, UNREAD, LOST = "named", "rebuilt", "unread", "lost"


def _flipped(rng: Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[Random, bytes, bytes], bytes | None]] = {
    "one bit flipped": _flipped,
    "cut off": lambda rng, data, other: data[: rng.randrange(max(1, len(data)))],
    "emptied": lambda rng, data, other: b"",
    "removed": lambda rng, data, other: None,
    "swapped with another file": lambda rng, data, other: other,
    "a block of zeros": lambda rng, data, other: data[: (at := rng.randrange(max(1, len(data))))] + bytes(64) + data[at + 64 :],
}


def files_of(saved: Path) -> list[Path]:
    """The files that a run leaves, without the hidden ones of locks."""
    return sorted(path for path in saved.rglob("*") if path.is_file() and not path.name.startswith("."))


def damage(rng: Random, saved: Path) -> tuple[Path, str]:
    """Damage a file; returns it and what was done."""
    files = files_of(saved)
    groups = sorted({file.relative_to(saved).parts[0] for file in files})
    group = rng.choice(groups)  # a folder of many files is not damaged more often
    own = [file for file in files if file.relative_to(saved).parts[0] == group]
    while True:
        file, name = rng.choice(own), rng.choice([*DAMAGES])
        alike = [other for other in own if other.suffix == file.suffix and other != file] or own
        before = file.read_bytes()
        after = DAMAGES[name](rng, before, rng.choice(alike).read_bytes())
        if after != before:
            break
    if after is None:
        file.unlink()
    else:
        file.write_bytes(after)
    return file, name


def judged(outcome: Outcome, found: Any, expected: Any, file: Path) -> str:
    """What became of a damage. A file is named by its own name, or that of the folder of a stage or of scores."""
    names = {file.name, file.parent.name} - {"", "saved"}
    if outcome.code == 0:
        said = any(name in outcome.text for name in names) and ("again" in outcome.text or "regenerated" in outcome.text)
        return LOST if found != expected else REBUILT if said else UNREAD
    return NAMED if outcome.error and any(name in outcome.error for name in names) else LOST


def section(
    folder: Path, *, number: int = 500, seed: int = 0, models: tuple[str, ...] = MODELS, until: float = math.inf
) -> dict[str, Any]:
    """Damage ``number`` files, in turn of the models' runs; none after ``until``, a moment of :func:`time.monotonic`."""
    world = World(folder)
    world.warm()
    rng, counts, lost = Random(seed), {}, []
    runs = {model: world.whole(model) for model in models}
    for saved, _, _ in runs.values():
        shutil.copytree(saved, saved.with_name("kept"))
    for one in range(number):
        if time.monotonic() > until:
            break
        model = models[one % len(models)]
        saved, _, expected = runs[model]
        kept, end = saved.with_name("kept"), ""
        shutil.rmtree(saved)
        shutil.copytree(kept, saved)
        file, name = damage(rng, saved)
        kind = f"{file.relative_to(saved).parts[0]}/" if file.parent != saved else "*.pth"
        if kind == "runs/":
            found = _read(file, kept / file.relative_to(saved))
        else:
            outcome = world.run(world.arguments(model, saved), saved.parent)
            found = judged(outcome, again := record(saved), expected, file)
            end = outcome.end if outcome.code else f"another {', '.join(differing(expected, again))}"
        counts.setdefault(kind, Counter())[found] += 1
        if found == LOST:
            lost.append(f"{model}, {file.relative_to(saved)}: {name}: {end}")
            print(lost[-1], flush=True)
    rows = [[kind, sum(own.values()), own[REBUILT], own[UNREAD], own[NAMED], own[LOST]] for kind, own in sorted(counts.items())]
    total = [sum(row[place] for row in rows) for place in range(1, 6)]
    return {
        "part": "damages",
        "title": "Damaged files",
        "columns": [
            "files below saved/",
            "damages",
            "rebuilt, and said so",
            "same result, the file was not read",
            "named",
            "lost",
        ],
        "rows": [*rows, ["all", *total]],
        "notes": [
            f"Damages: {', '.join(DAMAGES)}; of files of runs of {', '.join(models)}. After each, the same command is given.",
            "Rebuilt or not read: its record is equal to that of the undamaged run. Named: exit code 2, one line with the file "
            "or its folder. Lost: another result, a traceback, or an error that names neither.",
            "Run records are read as a leaderboard reads them, since the same command writes them anew.",
            *(f"Lost: {line}" for line in lost),
        ],
        "lost": total[-1],
    }


def _read(file: Path, whole: Path) -> str:
    """What became of a damage of a run record, or of a file beside it that nothing reads."""
    from recbole_llm.evaluation.record_files import read_record

    if file.name != "record.json":
        return UNREAD
    try:
        return UNREAD if read_record(file) == read_record(whole) else LOST
    except (ValueError, OSError) as error:
        return NAMED if file.name in str(error) else LOST
