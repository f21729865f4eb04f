"""Which files make a run record: a leaderboard can tell the records of files that have changed since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.config.key_groups import INNER_MODELS
from recbole_llm.evaluation.recommender import Recommender
from recbole_llm.llm import text_encoder
from recbole_llm.llm.adapter_folders import CONFIG_FILE, WEIGHTS_FILE
from recbole_llm.llm.identity import fingerprint
from recbole_llm.store.files import sha256_file
from recbole_llm.store.json_files import read_object

TABLES = (".inter", ".item", ".user", ".kg", ".link", ".net")
_CHECKPOINTS = ("cf_checkpoint", "cheap_checkpoint")
_MODULES = "modules.json"
_PRETRAINED = ("llm_path", "text_encoder_path")


def record_inputs(config: Any) -> dict[str, str]:
    """The hash of each file or folder that a run reads, by a name without its place.

    These are the tables of its datasets, the settings beside those of other datasets, the user's candidates, checkpoints and
    adapters, and the pretrained models that are folders. What does not exist has none; whoever reads it says so. Those that name
    the run, such as predictions, count there.

    Args:
        config: of the run.
    """
    return {name: _hash(path) for name, path in _inputs(config) if path.exists()}


def changed(record: Mapping[str, Any], config: Any) -> list[str]:
    """The names of the files that are not those of a record."""
    before, now = record.get("inputs") or {}, record_inputs(config)  # a shared record names none
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def keep_aside(file: Path, inputs: Mapping[str, str]) -> Path | None:
    """Rename the folder of a finished run of other data, whose place a run is about to take; returns the new folder, if any.

    The name of a run does not say where its data are, so that two datasets of one name would share it.

    Args:
        file: of the record that is to be written.
        inputs: of the run, as :func:`record_inputs` gives them.
    """
    try:
        before = dict(read_object(file)["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if all(before.get(name) == inputs.get(name) for name in {**before, **inputs} if name.endswith(TABLES)):
        return None
    folder = file.parent
    aside = next(place for number in count(2) if not (place := folder.with_name(f"{folder.name}-{number}")).exists())
    folder.rename(aside)
    return aside


def _is_read(name: str, config: Any) -> bool:
    """Whether a run may read a file of that name, which is not one of a table that ``load_col`` leaves out.

    ``.inter`` and ``.item`` are read by all: candidates are unique by title.
    """
    table = next((suffix for suffix in TABLES[2:] if name.endswith(suffix)), None)
    if table is None:
        return True
    chosen = [config["load_col"]]
    for key, naming in INNER_MODELS.items():
        if registry.inner_model(naming, config[naming]):  # whose own file may choose others
            return True
        chosen += [settings["load_col"]] if "load_col" in (settings := config[key] or {}) else []
    return any(columns is None or table[1:] in columns for columns in chosen)


def _inputs(config: Any) -> Iterator[tuple[str, Path]]:
    given = {key: config[key] for key in ("general_datasets", "source_datasets") if key not in config.unread}
    others = [config["train_dataset"], *(name for names in given.values() for name in names or ())]
    configs = {config["dataset"]: config} | {name: config.for_dataset(name, whole=True) for name in others if name}
    for name, own in configs.items():
        for file in sorted(Path(own["data_path"]).glob("*")):
            # the settings of the run's own dataset count by their values
            read = (*TABLES, *_suffixes(config), *([".yaml"] if name != config["dataset"] else []))
            if file.name.startswith(f"{name}.") and file.suffix in read and file.is_file() and _is_read(file.name, own):
                yield file.name, file
    listed = (config["candidates"]["file"] or {}) if config["candidates"]["source"] == "file" else {}
    files = {f"candidates.{phase}": path for phase, path in listed.items() if phase in config["candidate_phases"]}
    files |= {key: config[key] for key in _CHECKPOINTS if key not in config.unread}
    if issubclass(config.model_class, Recommender):
        files |= {key: config[key] for key in _PRETRAINED}
        for name, folder in (config["adapters"] or {}).items():
            files |= {f"adapters.{name}/{part}": Path(folder) / part for part in (CONFIG_FILE, WEIGHTS_FILE)}
    yield from ((key, Path(path).expanduser()) for key, path in files.items() if path)


def _suffixes(config: Any) -> list[str]:
    return [f".{suffix}" for suffix in config["additional_feat_suffix"] or ()]


def _hash(path: Path) -> str:
    within = sorted(path.rglob("*")) if path.is_dir() else []
    states = [(part, part.stat()) for part in (path, *within) if part.exists()]
    folders = [str(part) for part in (path, *within) if part.is_dir()]  # those of a text encoder, too
    return _hashed(tuple(folders or [str(path)]), tuple((str(part), found.st_size, found.st_mtime_ns) for part, found in states))


@lru_cache(maxsize=1024)
def _hashed(parts: tuple[str, ...], states: tuple[Any, ...]) -> str:
    """The hash of a file, or of the folders of a model; ``states`` say whether they have changed."""
    if (Path(parts[0]) / _MODULES).is_file():  # of a SentenceTransformer: its other settings change the vectors, too
        return text_encoder.identity(parts[0])
    found = [sha256_file(path) if (path := Path(part)).is_file() else fingerprint(path) for part in parts]
    return found[0] if len(found) == 1 else sha256("\n".join(found).encode()).hexdigest()
