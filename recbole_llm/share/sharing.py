"""``recbole-llm share RUN --to=FOLDER | hub:user/name``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.classical import portable_weights
from recbole_llm.config.contents import PRETRAINED
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.evaluation.training_curves import PICTURE
from recbole_llm.llm.adapter_folders import CONFIG_FILE, base_model_name
from recbole_llm.merging.arithmetic import MERGE_FILE
from recbole_llm.model.merges.lattice_scores import SCORES_FILE
from recbole_llm.share.base_models import base_models
from recbole_llm.share.card import card
from recbole_llm.share.public_record import public_record, without_paths
from recbole_llm.store import hub, runs
from recbole_llm.store.files import MANIFEST, DamagedError, atomic_folder, sha256_file, verify
from recbole_llm.store.json_files import read_object, sealed
from recbole_llm.store.shared_runs import CARD, KINDS, PASSPORT, SETTINGS, WEIGHTS, author_code, is_shared

LEFT_OUT = (
    "interactions, histories, candidates and item texts",
    "scores, answers and predictions of single users",
    "optimisers, checkpoints, logs and paths of the machine that trained it",
)
_NAMING = ("config.json", MERGE_FILE)
"""Endings of the files of stages that may name folders of this machine; others, such as vocabularies, are copied as they are."""
_USERS = "ids of users: ranks are numbered in an order that does not depend on them (--user_ids keeps them)"
_SKETCHES = "the passport's sketches, with which one could test whether a user has interacted with an item"


def share(run: str | Path, to: str, *, user_ids: bool = False, licence: str | None = None, private: bool = False) -> list[str]:
    """Share a finished run; returns lines that say what was written where.

    Args:
        run: folder of the run, or its record.json.
        to: a folder that does not exist, or ``hub:user/name``.
        user_ids: keep the ids of the users with their ranks.
        licence: of the shared weights, an identifier of the hub such as ``mit``; None: that of the base model.
        private: on the hub, of a repository that is new.

    Raises:
        ValueError: there is no such run, it is damaged, it cannot be shared, or it cannot be written there.
    """
    path = runs.record_file(run, "RUN")
    record = read_record(path)
    _check(record, path)
    options: dict[str, Any] = {"user_ids": user_ids, "licence": licence}
    if not to.startswith(hub.PREFIX):
        folder = Path(to).expanduser()
        if folder.exists():
            raise ValueError(f"--to={to}: it exists already; give a folder that does not, or hub:user/name")
        return _write(record, path, folder, folder.name, **options)
    hub.parse(to, "--to")
    with tempfile.TemporaryDirectory() as parent:
        lines = _write(record, path, Path(parent) / "run", to, **options)
        return [*lines[1:], hub.upload(Path(parent) / "run", to, "--to", marker=MANIFEST, private=private)]


def _check(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a run that nobody else could load."""
    config = record["config"]
    if is_shared(runs.root_of(path)):
        raise ValueError(f"RUN: {path} was shared with you; copy its folder")
    if record["model"] == "Imported":
        raise ValueError(f"RUN: {path} has the predictions of another system, and no weights")
    if not any("test" in config.get(key, ()) for key in ("candidate_phases", "full_phases")):
        raise ValueError(
            f"RUN: {path} was evaluated by labels or drawn negatives, and such a run cannot recommend; train it with "
            "--eval_args=\"{'mode': 'full'}\", or candidates, and share that run"
        )
    try:
        registry.check_name(str(record["model"]))
    except ValueError as error:
        raise ValueError(f"RUN: {path} is of a model of your own; share its file with your code ({error})") from error
    own = [key for key in ("cf_checkpoint", "cheap_checkpoint", *PRETRAINED) if config.get(key)]
    own += ["candidates.file"] if (config.get("candidates") or {}).get("source") == "file" else []
    own += [
        f"adapters.{name}" for name, given in (config.get("adapters") or {}).items() if Path(str(given)).expanduser().exists()
    ]
    if own:
        raise ValueError(f"RUN: {path} was made with a file of yours ({own[0]}), which others lack; share a run without it")
    if name := author_code(config):
        raise ValueError(f"RUN: {path} uses code of yours ({name}), which others lack; share a run without it")


def _write(record: Mapping[str, Any], path: Path, target: Path, name: str, *, user_ids: bool, licence: str | None) -> list[str]:
    """Write the folder ``target``, which ``name`` will load."""
    root, again = runs.root_of(path), runs.again(record, path)
    folders = {stage: root / "stages" / folder for stage, folder in record["stages"].items()}
    for stage, folder in folders.items():
        try:
            verify(folder)
        except DamagedError as error:
            raise ValueError(f"RUN: the stage {stage} is missing or damaged ({error}); {again}") from error
    # the scores of validation users at all points of a lattice, which only the merge has read
    folders = {stage: folder for stage, folder in folders.items() if not (folder / SCORES_FILE).exists()}
    with atomic_folder(target) as out:
        bases = base_models(record)
        public = public_record(record, bases, stages=folders, root=root, user_ids=user_ids)
        adapters: dict[str, str] = {}  # by the name in the card
        own_merge = ""
        for stage, folder in folders.items():
            for adapter in _copy(folder, out / "stages" / folder.name, root):
                inside = adapter.relative_to(folder).as_posix()
                shown = stage if inside == "." else f"{stage} ({inside})"
                adapters[shown] = adapter.relative_to(root).as_posix()
                own_merge = shown if _is_own(adapter, record.get("merge")) else own_merge
        if named := record.get("checkpoint"):
            public["checkpoint"] = _weights(root / Path(named["file"]).name, named["sha256"], out / WEIGHTS, again)
        passport = {key: value for key, value in public["passport"].items() if key != "sketches"}
        public["passport"] = passport
        own = out / "runs" / path.parent.name
        own.mkdir(parents=True)
        (own / "record.json").write_text(sealed(public))
        (out / PASSPORT).write_text(json.dumps(passport, indent=1))
        (out / SETTINGS).write_text(json.dumps(public["config"], indent=1))
        if picture := (path.parent / PICTURE).is_file():
            shutil.copyfile(path.parent / PICTURE, out / PICTURE)
        left_out = [*LEFT_OUT, *([] if user_ids else [_USERS]), _SKETCHES]
        # the model's first: its merge, not those of the rows beside it, or else the last stage
        listed = dict(sorted(reversed(adapters.items()), key=lambda pair: pair[0] != own_merge))
        text = card(public, bases, listed, name=name, licence=licence, left_out=left_out, picture=picture)
        (out / CARD).write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    parts = ", ".join([*folders, *([WEIGHTS] if named else [])]) or "no weights: the model has none"
    lines = [str(target), f"{size / 1e6:.1f} MB: {parts}", *(f"not shared: {line}" for line in left_out)]
    return lines + [f"licence of {base.name}: {base.licence or 'not found, see its page'}" for base in bases]


def _is_own(adapter: Path, merge: Mapping[str, Any] | None) -> bool:
    """Whether a folder has the adapter of the model's ``merge``."""
    if merge is None or not (adapter / MERGE_FILE).is_file():
        return False
    found = read_object(adapter / MERGE_FILE)
    return all(found[key] == merge[key] for key in ("method", "settings", "sources", "weights"))


def _copy(folder: Path, out: Path, root: Path) -> list[Path]:
    """Copy a stage, without paths of this machine; returns the folders of PEFT adapters in it.

    Raises:
        ValueError: it has a kind of file that is not shared.
    """
    found = []
    with atomic_folder(out) as copy:
        for file in sorted(folder.rglob("*")):
            place = copy / file.relative_to(folder)
            if file.is_dir() or file.name.startswith(".") or file.name == MANIFEST:
                continue
            if not file.name.endswith(KINDS):
                raise ValueError(f"RUN: {file} is a kind of file that is not shared")
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.name == CONFIG_FILE:
                config = read_object(file, 2**24)
                named = base_model_name(config)
                place.write_text(json.dumps({**config, "base_model_name_or_path": named}, indent=2, sort_keys=True))
                found.append(file.parent)
            elif file.name.endswith(_NAMING):
                values = json.loads(file.read_text(encoding="utf-8"))
                place.write_text(json.dumps(without_paths(values, [str(root), str(Path.home())]), indent=1))
            elif file.name != CARD:  # peft's card of an adapter has its base model's path, and no more
                shutil.copyfile(file, place)
    return found


def _weights(checkpoint: Path, sha256: str, file: Path, again: str) -> dict[str, str]:
    """Write the weights of the checkpoint; returns what the record says of them."""
    if not checkpoint.is_file() or sha256_file(checkpoint) != sha256:
        raise ValueError(f"RUN: {checkpoint} is missing, or has changed since the run wrote it; {again}")
    portable_weights.write(checkpoint, file)
    return {"file": file.name, "sha256": sha256_file(file)}
