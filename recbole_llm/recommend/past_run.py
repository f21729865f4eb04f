"""A finished run, loaded to score again: its data, its settings and its weights, which must be those of its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm import quick_start, registry
from recbole_llm.config.recorded import recorded_config
from recbole_llm.data.passport import differences
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.quick_start import Run
from recbole_llm.store import runs
from recbole_llm.store.files import sha256_file
from recbole_llm.store.recorded_stages import RecordedStages
from recbole_llm.store.shared_runs import FOLDER, is_shared

logger = getLogger()

_MODELS = ("model", "cf_model", "cheap_model", "llm_ranker", "retriever")
"""The keys that name models."""


@dataclass(frozen=True)
class PastRun:
    """A run whose model can score.

    Attributes:
        record: the content of its record.
        parts: its data, model and trainer.
        variants: the rows of its results, the model itself first.
    """

    record: Mapping[str, Any]
    parts: Run
    variants: Mapping[str, Variant]

    @classmethod
    def load(cls, given: str | Path, data_path: str | None = None, changes: Mapping[str, Any] | None = None) -> PastRun:
        """Load a run. Nothing is executed that lies in its folder, and nothing is trained but the retriever of a re-ranker
        that was evaluated on candidates, which needs none.

        Args:
            given: folder of the run, or its record.json; the folder of a shared run, or ``hub:user/name``.
            data_path: folder that contains the dataset, if it has moved.
            changes: where the base models are, ``llm_path`` and ``text_encoder_path``, if they have moved.

        Raises:
            ValueError: there is no such run, it is damaged or of another state of the package, its data, weights or base models
                are not those of the record, or its model cannot recommend.
        """
        path = runs.record_file(given, "--run")
        record = read_record(path)
        again = runs.again(record, path)
        _check_recommends(record, path)
        root, shared = runs.root_of(path), is_shared(runs.root_of(path))
        if shared:
            _check_names(record, path)
        changed = {key: value for key, value in (changes or {}).items() if value is not None}
        for key in ("llm_path", "text_encoder_path"):
            given = str(record["config"].get(key))
            if given.startswith(FOLDER) and key not in changed:
                name = given.removeprefix(FOLDER)
                raise ValueError(
                    f"--run: the run was trained on {name}, which is not shared with it; give --{key}=FOLDER of {name}"
                )
        own = None if shared else root  # nothing is written to what somebody shared, or to the hub's cache
        changed = {**_as_retrieved(record), **changed}
        config = recorded_config(record, path, checkpoint_dir=own, data_path=data_path, changes=changed)
        checkpoint = _checkpoint(record, path, again)
        parts = quick_start.assemble(config)
        _check_data(record, parts, path)
        if "llm_path" in changed:
            _check_base(record, parts)
        cache = RecordedStages(
            Path(config["checkpoint_dir"]) / "stages",
            config["seed"],
            recorded=record["stages"],
            run_root=root / "stages",
            again=again,
        )
        for stage in parts.stages:
            if not cache.is_cached(stage):
                logger.warning(f"{path.parent.name} needs {stage.name} to recommend, which its evaluation did not: trained now")
        parts.trainer.restore(cache, checkpoint)
        return cls(record, parts, parts.trainer.recommender.variants())

    @property
    def dataset(self) -> Any:
        """The test split, with the whole histories."""
        return self.parts.test._dataset

    def variant(self, row: str | None) -> Variant:
        """The row of that name, or the model itself.

        Raises:
            ValueError: there is no such row.
        """
        if row is None:
            return next(iter(self.variants.values()))
        if row not in self.variants:
            raise ValueError(f"--row={row}: the run has no such row; it has: {', '.join(self.variants)}")
        return self.variants[row]


def _check_recommends(record: Mapping[str, Any], path: Path) -> None:
    registry.check_name(str(record["model"]).replace(":", "."))  # never a module: nothing that a record names is imported
    if record["model"] == "Imported":
        raise ValueError(f"--run: {path} has the predictions of another system; that system has to recommend")
    phases = record["config"].get("candidate_phases", ()), record["config"].get("full_phases", ())
    if not any("test" in listed for listed in phases):
        raise ValueError(f"--run: {path} was evaluated by labels or drawn negatives; a run that ranks items can recommend")


def _check_names(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a shared run that names code of its author."""
    config = record["config"]
    merges = [config.get("merge"), *(config.get("merge_beside") or {}).values()]
    named = [config.get(key) for key in _MODELS] + [one.get("merge") if isinstance(one, dict) else one for one in merges]
    for name in named:
        if isinstance(name, str) and (":" in name or "." in name):
            raise ValueError(f"--run: {path} names {name!r}, code of its author, which is not part of a shared run")


def _as_retrieved(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which a re-ranker has a retriever, which it lacks if its test was on candidates."""
    model = registry.get_model(record["model"])
    if getattr(model, "scores_full_catalogue", True) or "test" in record["config"]["full_phases"]:
        return {}
    valid = "candidates" if "valid" in record["config"]["candidate_phases"] else "full"
    return {"eval_args": {**record["config"]["eval_args"], "mode": {"valid": valid, "test": "full"}}}


def _checkpoint(record: Mapping[str, Any], path: Path, again: str) -> Path | None:
    """The checked file of the weights that RecBole's trainer saved; None if the stages were the whole training."""
    if getattr(registry.get_model(record["model"]), "trained_in_stages", False):
        return None
    named = record.get("checkpoint")
    if not named:
        raise ValueError(
            f"--run: {path} names no file of weights (it is older than records that do, or nothing was saved); {again}"
        )
    file = runs.root_of(path) / Path(named["file"]).name  # never outside the run's own folders
    if not file.is_file():
        raise ValueError(f"--run: the weights of {path} are missing, there is no {file}; {again}")
    if sha256_file(file) != named["sha256"]:
        raise ValueError(f"--run: {file} has changed since the run wrote it (SHA-256); {again}")
    return file


def _check_data(record: Mapping[str, Any], parts: Run, path: Path) -> None:
    """The vectors of a model belong to internal ids, so users, items and their order must be those of the run."""
    same = record["passport"]["sha256"] == parts.passport["sha256"]
    known = record.get("histories_sha256")
    if same and known in (None, parts.test._dataset.histories.fingerprint):
        return
    try:
        told = "the order of users or items differs"
        if not same:
            told = "; ".join(differences(parts.passport, record["passport"]))
    except (KeyError, TypeError, AttributeError):
        told = "its passport cannot be compared"
    where = parts.config["data_path"]
    if is_shared(runs.root_of(path)):
        raise ValueError(
            f"--run: this machine's {record['dataset']} ({where}) is not the data that the shared run was trained on: {told}. "
            "Its model does not fit; give --data_path=DIR, the folder that contains that dataset"
        )
    raise ValueError(
        f"--run: the data of {path} have changed since the run ({where}): {told}. Its model does not fit them. "
        "Give --data_path=DIR, the folder that contains the dataset as it was, or train again"
    )


def _check_base(record: Mapping[str, Any], parts: Run) -> None:
    """Refuse another LM than the one whose adapters the run has, where both are known by the hash of their folders."""
    backbone, known = parts.trainer.recommender.backbone, (record.get("backbone_identity") or "").split(", ")
    if backbone is None or backbone.stages or backbone.identity in known:
        return
    if "@" in backbone.identity or any("@" in identity for identity in known):
        logger.warning(f"llm_path: {backbone.name} is taken for {record['backbone']}, which cannot be compared")
        return
    raise ValueError(
        f"--llm_path={parts.config['llm_path']}: this is not {record['backbone']}, on which the run was trained (its files have "
        "another SHA-256)"
    )
