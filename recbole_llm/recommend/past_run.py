"""A finished run, loaded to score again: its data, its settings and its weights, which must be those of its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm import quick_start, registry
from recbole_llm.config.recorded import recorded_config
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.quick_start import Run
from recbole_llm.store.files import sha256_file
from recbole_llm.store.recorded_stages import RecordedStages

logger = getLogger()


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
    def load(
        cls, given: str | Path, data_path: str | None = None, model: str | None = None, *, as_evaluated: bool = False
    ) -> PastRun:
        """Load a run. Nothing is executed that lies in its folder, and nothing is trained but the retriever of a re-ranker
        that was evaluated on candidates, which needs none.

        Args:
            given: folder of the run, or its record.json.
            data_path: folder that contains the dataset, if it has moved.
            model: ``package.module:Class`` of a model of the user, whose code is imported only if it is named here.
            as_evaluated: with the candidates of its evaluation, if it has any, and without a retriever that it did not need; for
                those who ask what it ranked then.

        Raises:
            ValueError: there is no such run, it is damaged or of another state of the package, its data or weights are not
                those of the record, or its model cannot recommend.
        """
        path = record_file(given)
        record = read_record(path)
        again = f"repeat the run (--model={record['model']} --dataset={record['dataset']} and its other options)"
        _check_model(record, path, model)
        _check_recommends(record, path, as_evaluated)
        imported = record.get("imported")  # its file is no setting of the run
        changes = {"predictions": imported["file"]} if imported else {} if as_evaluated else _as_retrieved(record)
        config = recorded_config(record, path, data_path=data_path, changes=changes, own=model is not None)
        checkpoint = _checkpoint(record, path, again)
        parts = quick_start.assemble(config)
        _check_data(record, parts, path)
        _check_imported(record, parts, path)
        cache = RecordedStages(path.parent.parent.parent / "stages", config["seed"], recorded=record["stages"], again=again)
        for stage in parts.stages:
            if not cache.is_cached(stage):
                logger.warning(f"{path.parent.name} needs {stage.name} to recommend, which its evaluation did not: trained now")
        parts.trainer.restore(cache, checkpoint)
        if as_evaluated:
            _check_candidates(record, parts, path, again)
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


def record_file(given: str | Path) -> Path:
    """The record of a run, given by its folder or by this file.

    Raises:
        ValueError: there is no such run.
    """
    path = Path(given).expanduser().resolve()
    path = path / "record.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--run={given}: there is no run ({path} does not exist); give a run's folder, such as "
            "saved/runs/SASRec-ml-100k-1234abcd, or its record.json"
        )
    return path


def _check_model(record: Mapping[str, Any], path: Path, given: str | None) -> None:
    """Import the model that the user names, if it is a model of theirs; never one that the record alone names."""
    name = str(record["model"])
    own = name.rpartition(":")[2]
    if given is not None:
        kind = registry.get_model(given)
        if kind.__name__ != own:
            raise ValueError(f"--model={given}: the run {path} is of the model {name}, not of {kind.__name__}")
        return
    try:
        registry.check_name(name.replace(":", "."))
    except ValueError as error:
        raise ValueError(
            f"--run: {path} is of the model {name}, which is neither of this package nor of RecBole; if it is yours, name its "
            f"code, --model=MODULE:{own}: a run by itself imports none"
        ) from error


def _check_recommends(record: Mapping[str, Any], path: Path, as_evaluated: bool) -> None:
    if record["model"] == "Imported" and not as_evaluated:
        raise ValueError(f"--run: {path} has the predictions of another system; that system has to recommend")
    phases = record["config"].get("candidate_phases", ()), record["config"].get("full_phases", ())
    if not any("test" in listed for listed in phases):
        raise ValueError(f"--run: {path} was evaluated by labels or drawn negatives; a run that ranks items can recommend")


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
    file = path.parent.parent.parent / Path(named["file"]).name  # never outside the run's own folders
    if not file.is_file():
        raise ValueError(f"--run: the weights of {path} are missing, there is no {file}; {again}")
    if sha256_file(file) != named["sha256"]:
        raise ValueError(f"--run: {file} has changed since the run wrote it (SHA-256); {again}")
    return file


def _check_data(record: Mapping[str, Any], parts: Run, path: Path) -> None:
    """The vectors of a model belong to internal ids, so users, items and their order must be those of the run."""
    same = record["passport"]["sha256"] == parts.passport["sha256"]
    known = record.get("histories_sha256")
    if not same or known not in (None, parts.test._dataset.histories.fingerprint):
        raise ValueError(
            f"--run: the data of {path} have changed since the run ({parts.config['data_path']}): its model does not fit them. "
            "Give --data_path=DIR, the folder that contains the dataset as it was, or train again"
        )


def _check_imported(record: Mapping[str, Any], parts: Run, path: Path) -> None:
    """A file of predictions is still the one that was evaluated."""
    imported = record.get("imported")
    if imported and parts.model.sha256 != imported["sha256"]:
        raise ValueError(
            f"--run: {parts.model.file} is no longer the file of predictions that {path} evaluated (SHA-256); repeat the run"
        )


def _check_candidates(record: Mapping[str, Any], parts: Run, path: Path, again: str) -> None:
    """The candidates that were drawn now are those of the evaluation."""
    known, found = record["candidates_sha256"].get("test"), parts.test.candidates
    if found is not None and found.sha256 != known:
        raise ValueError(
            f"--run: the candidates of {path} (SHA-256 {str(known)[:12]}) are no longer what its settings give "
            f"({found.sha256[:12]}); {again}"
        )
