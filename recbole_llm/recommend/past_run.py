"""A finished run, loaded to score again: its data, its settings and its weights, which must be those of its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm import quick_start, registry
from recbole_llm.classical.record_inputs import record_inputs
from recbole_llm.classical.retriever import Retriever
from recbole_llm.config.recorded import given_mode, recorded_config
from recbole_llm.data.passport import differences
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.quick_start import Run
from recbole_llm.recommend import shared
from recbole_llm.store import runs
from recbole_llm.store.files import sha256_file
from recbole_llm.store.recorded_stages import RecordedStages
from recbole_llm.store.shared_runs import is_shared

logger = getLogger()


@dataclass(frozen=True)
class PastRun:
    """A run whose model can score.

    Attributes:
        record: the content of its record.
        parts: its data, model and trainer.
        variants: the rows of its results, the model itself first.
        ranks_catalogue: whether it can; a re-ranker without a retriever cannot.
    """

    record: Mapping[str, Any]
    parts: Run
    variants: Mapping[str, Variant]
    ranks_catalogue: bool = True

    @classmethod
    def load(
        cls,
        given: str | Path,
        data_path: str | None = None,
        model: str | None = None,
        *,
        moved: Mapping[str, str | None] | None = None,
        retriever: bool = True,
        as_evaluated: bool = False,
        changes: Mapping[str, Any] | None = None,
    ) -> PastRun:
        """Load a run. Nothing is executed that lies in its folder, and nothing is trained but the retriever of a re-ranker
        that was evaluated on candidates, which needs none.

        Args:
            given: folder of the run, or its record.json; the folder of a shared run, or ``hub:user/name``.
            data_path: folder that contains the dataset, if it has moved.
            moved: where the base models are, ``llm_path`` and ``text_encoder_path``, if they have moved.
            model: ``package.module:Class`` of a model of the user, whose code is imported only if it is named here.
            retriever: False for those who rank given items alone, for which a re-ranker needs none.
            as_evaluated: with the candidates of its evaluation, if it has any, and without a retriever that it did not need; for
                those who ask what it ranked then.
            changes: settings that change neither its weights nor its data, such as those of its evaluation.

        Raises:
            ValueError: there is no such run, it is damaged or of another state of the package, its data, weights or base models
                are not those of the record, or its model cannot recommend.
        """
        path = runs.record_file(given, "--run")
        record = read_record(path)
        root, again = runs.root_of(path), runs.again(record, path)
        _check_model(record, path, model)
        _check_recommends(record, path, as_evaluated)
        imported = record.get("imported")  # its file is no setting of the run
        without = {} if as_evaluated else _as_retrieved(record)  # the settings of a retriever that its evaluation lacked
        own = {"predictions": imported["file"]} if imported else without if retriever else {}
        bases = {key: value for key, value in (moved or {}).items() if value is not None}
        shared.check_moved(record, bases)
        kept: Path | None = root
        if is_shared(root):
            shared.check_names(record, path)
            kept = None  # nothing is written to what somebody shared, or to the hub's cache
        where: dict[str, Any] = {"checkpoint_dir": kept, "data_path": data_path}
        config = recorded_config(record, path, **where, changes={**own, **(changes or {}), **bases}, own=model is not None)
        checkpoint = _checkpoint(record, path, again)
        parts = quick_start.assemble(config)
        _check_data(record, parts, path)
        _warn_of_changed_files(record, config, path)
        _check_imported(record, parts, path)
        if "llm_path" in bases:
            shared.check_base(record, parts)
        stages = Path(config["checkpoint_dir"]) / "stages", root / "stages"
        whose = {"recorded": record["stages"], "run_root": stages[1], "again": again, "changed": _changed(record, config)}
        cache = RecordedStages(stages[0], config["seed"], **whose)
        for stage in parts.stages:
            if not cache.is_cached(stage):
                logger.warning(f"{path.parent.name} needs {stage.name} to recommend, which its evaluation did not: trained now")
        parts.trainer.restore(cache, checkpoint)
        if as_evaluated:
            _check_candidates(record, parts, path, again)
        return cls(record, parts, parts.trainer.recommender.variants(), retriever or not without)

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
    return {"eval_args": {**record["config"]["eval_args"], "mode": {**given_mode(record["config"]), "test": "full"}}}


def _changed(record: Mapping[str, Any], config: Any) -> frozenset[str]:
    """The role of the retriever, if this is not the one of the run."""
    then, now = record["config"], config.plain()
    other = any(now.get(key) != then.get(key) for key in Retriever.KEYS)
    drawn = [(own.get("candidates") or {}).get("source") == "retriever" for own in (then, now)]
    return frozenset(Retriever.KEYS[:1] if other or drawn == [False, True] else ())


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
    told, where = "the order of users or items differs", parts.config["data_path"]
    try:
        told = told if same else "; ".join(differences(parts.passport, record["passport"]))
    except (KeyError, TypeError, AttributeError):
        told = "its passport cannot be compared"
    if is_shared(runs.root_of(path)):
        raise ValueError(
            f"--run: this machine's {record['dataset']} ({where}) is not the data that the shared run was trained on: {told}. "
            "Its model does not fit; give --data_path=DIR, the folder that contains that dataset"
        )
    raise ValueError(
        f"--run: the data of {path} have changed since the run ({where}): {told}. Its model does not fit them. "
        "Give --data_path=DIR, the folder that contains the dataset as it was, or train again"
    )


def _warn_of_changed_files(record: Mapping[str, Any], config: Any, path: Path) -> None:
    """Tell of files such as the .item file, whose texts the model has learnt; interactions have a check of their own."""
    before, now = record.get("inputs") or {}, record_inputs(config)
    names = [name for name in before if before[name] != now.get(name, before[name]) and not name.startswith("candidates.")]
    if names:
        logger.warning(
            f"--run: {', '.join(names)} changed since the run of {path.parent}, whose model was made of the earlier content, and "
            "is read as it is now; put the earlier one back, or train again"
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
