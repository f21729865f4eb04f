"""RecBole's ``Config`` with our property files, checked keys and values that are never evaluated.

Later wins: RecBole's defaults <- properties/overall <- properties/dataset <- a property file beside the data <-
properties/model <- properties/llm <- the run of ``init_from`` <- the user's files <- dict <- command line. A partial
``eval_args``, ``candidates`` or other dict is merged into the default instead of replacing it.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config
from recbole.utils import ModelType
from recbole.utils.argument_list import (
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_llm import compat, registry
from recbole_llm.data import scenarios
from recbole_llm.store.files import fingerprint
from recbole_llm.store.runs import SavedRun

# keys that RecBole reads and documents nowhere in its property files
_RECBOLE_KEYS = {
    "model",
    "dataset",
    "config_files",
    "nproc",
    "world_size",
    "local_rank",
    "ip",
    "port",
    "offset",
    "single_spec",
    "transform",
    "neg_sampling",
    "training_neg_sample_num",
    "fusion_type",
    "wandb_project",
    "selected_features",
}
# model families that RecBole measures by click labels (AUC, log-loss) keep its evaluation as it is
_LABELLED = (ModelType.CONTEXT, ModelType.DECISIONTREE)
# what only changes where or how a run is shown or kept, not its result
_BOOKKEEPING = {
    "checkpoint_dir",
    "config_files",
    "data_path",
    "dataloaders_save_path",
    "dataset_save_path",
    "device",
    "gpu_id",
    "log_wandb",
    "note",
    "save_dataloaders",
    "save_dataset",
    "save_every_seconds",
    "show_progress",
    "state",
    "wandb_project",
    "worker",
}
# keys that are younger than kept runs: at this value they are as if they were not there
_YOUNGER = {"shuffled_title_control": False}
# what is said about a run's data and how it is measured: all else of ours is about its model, and taken up by `init_from`
ABOUT_DATA = {
    *evaluation_arguments,
    *_BOOKKEEPING,
    *scenarios.SETTINGS,
    *scenarios.TEXTS,
    "candidates",
    "eval_users",
    "slices",
    "cf_checkpoint",
    "load_col",
    "init_from",
    "retriever",
    "retriever_config",
    "retriever_top",
}


def properties_folder() -> Path:
    """``properties/``: inside the package in a wheel, at the top of a checkout otherwise."""
    package = Path(__file__).parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "overall.yaml").is_file():
            return folder
    raise FileNotFoundError(f"properties/overall.yaml is neither in {package} nor beside it; reinstall recbole-llm")


def property_file(given: str | Path, key: str = "--config_files") -> Path:
    """A file that the user names with ``key``; ``properties/...`` that is not there from here is the package's own.

    Raises:
        FileNotFoundError: neither is there.
    """
    for file in (Path(given), properties_folder().parent / given):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{key}: {given} does not exist (read from {Path.cwd()})")


def parse_value(text: str) -> Any:
    """A command-line value as Python reads a literal, YAML's true/false/null included; anything else is a string."""
    simple = {"true": True, "false": False, "none": None, "null": None, "~": None}
    if text.strip().lower() in simple:
        return simple[text.strip().lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, (str, int, float, list, tuple, dict)) else text  # `...` is a separator, not an Ellipsis


def read_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """Keys and values of a command line.

    Raises:
        ValueError: an argument that is not --key=value, or a key with two values.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"command line: {argument!r} is not of the form --key=value")
        if texts.get(key, text) != text:
            raise ValueError(f"command line: --{key} is given twice, as {texts[key]!r} and {text!r}")
        texts[key] = text
    return {key: parse_value(text) for key, text in texts.items()}


class LLMConfig(Config):
    """Configuration of one run; a drop-in for RecBole's ``Config``.

    Args:
        model: name of one of our models or of RecBole's.
        dataset: name of an atomic dataset.
        config_file_list: the user's YAML files.
        config_dict: values set from Python; strings are read as literals, never evaluated.
        cmd_line: ``--key=value`` arguments; ``sys.argv`` is not read here.

    Attributes:
        init_run: the run that this one takes up, with ``init_from``.

    Raises:
        ValueError: an unknown key, model or value; names the key, its file and the nearest known key.
    """

    init_run: SavedRun | None = None

    def __init__(
        self,
        model: str | None = None,
        dataset: str | None = None,
        config_file_list: Sequence[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        cmd_line: Sequence[str] = (),
    ):
        compat.check_pandas()
        self._cmd_line = tuple(cmd_line)
        self._key_source: dict[str, str] = {}
        super().__init__(model, dataset, config_file_list, dict(config_dict or {}))
        _ = self.fingerprint  # as it was asked for: some models (BERT4Rec) put keys of their own into it while they run

    # -- what the user gave --------------------------------------------------------------------------------------------

    def _load_config_files(self, file_list: Sequence[str] | None) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for file in file_list or []:
            values = self._read_yaml(property_file(file))
            self._key_source.update(dict.fromkeys(values, str(file)))
            merged.update(values)
        return merged

    def _read_yaml(self, file: str | Path) -> dict[str, Any]:
        with open(file, encoding="utf-8") as stream:
            try:
                values = yaml.load(stream, Loader=self.yaml_loader)
            except yaml.YAMLError as error:
                raise ValueError(f"{file}: not a YAML file ({error})") from error
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{file}: a property file holds `key: value` lines, not a {type(values).__name__}")
        return values or {}

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        for key, value in config_dict.items():
            self._key_source.setdefault(key, "config_dict")
            if isinstance(value, str):
                config_dict[key] = parse_value(value)
        return config_dict

    def _load_cmd_line(self) -> dict[str, Any]:
        values = read_arguments(self._cmd_line)
        self._key_source.update(dict.fromkeys(values, "the command line"))
        return values

    # -- defaults ------------------------------------------------------------------------------------------------------

    def _get_model_and_dataset(self, model: str | None, dataset: str | None) -> tuple[str, type, str]:
        model = model or self.external_config_dict.get("model")
        dataset = dataset or self.external_config_dict.get("dataset")
        for key, value in (("model", model), ("dataset", dataset)):
            if value is None:
                raise ValueError(f"--{key} is missing: give it on the command line or in a property file")
        model_class = registry.get_model(str(model))
        compat.stop_anomaly_detection()
        return str(model), model_class, str(dataset)

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self._recbole_knows = {*self.internal_config_dict, *training_arguments, *dataset_arguments, "train_mode"}
        folder = properties_folder()
        labelled = self.internal_config_dict["MODEL_TYPE"] in _LABELLED
        overall = self._read_yaml(folder / "overall.yaml")
        protocol = overall.pop("protocol")
        load_col = overall.pop("load_col")
        self._ours = {**overall, **protocol}
        self.internal_config_dict.update(overall if labelled else self._ours)
        if self.internal_config_dict["load_col"] == {"inter": ["user_id", "item_id"]}:
            # RecBole's default leaves out the time that its own ordering needs (RUCAIBox/RecBole#1616)
            self.internal_config_dict["load_col"] = load_col
        files = [
            folder / "dataset" / f"{dataset}.yaml",
            self._beside_the_data(dataset),
            folder / "model" / f"{model}.yaml",
            *self._llm_files(folder, model),
        ]
        for file in files:
            if file.is_file():
                values = self._read_yaml(file)
                self._ours.update(values)
                self.internal_config_dict.update(values)
        self._take_up(model, model_class)
        self._check_keys()

    def _llm_files(self, folder: Path, model: str) -> list[Path]:
        """properties/llm/<llm>.yaml for ``--llm=<llm>``: one file per backbone; builtin unless a backbone is given.

        properties/llm/<llm>/<Model>.yaml, where there is one, is what that backbone wants of one model alone.
        """
        name = self.external_config_dict.get("llm")
        if name is None and "llm_path" in self.external_config_dict:
            return []
        name = name or "builtin"
        file = folder / "llm" / f"{name}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in (folder / "llm").glob("*.yaml")))
            raise ValueError(f"--llm={name}: {file} does not exist; known: {known}; or give --llm_path=FOLDER or a hub id")
        return [file, folder / "llm" / name / f"{model}.yaml"]

    def _beside_the_data(self, dataset: str) -> Path:
        """A property file of a dataset's own, ``<data_path>/<dataset>/<dataset>.yaml``: what its texts are, and its filters.

        Raises:
            ValueError: it says something about another thing than the dataset.
        """
        data_path = self.external_config_dict.get("data_path") or self.internal_config_dict["data_path"]
        file = Path(str(data_path)) / dataset / f"{dataset}.yaml"
        allowed = self.dataset_keys().union(dataset_arguments)
        for key in self._read_yaml(file) if file.is_file() else ():
            if key not in allowed:
                raise ValueError(f"{file}: `{key}` says nothing about a dataset; give it in a file of --config_files")
        return file

    def _take_up(self, model: str, model_class: type) -> None:
        """``init_from``: what a kept run says about its model becomes this run's defaults.

        Raises:
            ValueError: the model takes up no run, the run is of another model or backbone, or as :meth:`SavedRun.read`.
        """
        given, llm = self.external_config_dict.get("init_from"), self.external_config_dict.get("llm")
        if given is None:
            return
        if not getattr(model_class, "supports_init_from", False):
            raise ValueError(f"init_from: {model} takes up no other run; leave init_from={given} out")
        self.init_run = SavedRun.read(str(given))
        theirs, trained = self.init_run.record["model"], self.init_run.record["config"]
        if theirs != model:
            raise ValueError(f"init_from: {given} is a run of {theirs}, which {model} cannot take up; give a run of {model}")
        backbone = trained["llm"] or trained["llm_path"]
        if llm not in (None, backbone):  # the run's llm_path would win over that of properties/llm
            raise ValueError(f"--llm={llm}: init_from={given} was trained on {backbone}; leave llm out")
        taken = self._ours.keys() - ABOUT_DATA - self.dataset_keys()
        self.internal_config_dict.update({key: value for key, value in trained.items() if key in taken})

    def dataset_keys(self) -> set[str]:
        """What property files say about datasets."""
        files = (properties_folder() / "dataset").glob("*.yaml")
        return set(scenarios.TEXTS).union(*(self._read_yaml(file) for file in files))

    def _check_keys(self) -> None:
        quick = set(self.internal_config_dict) | _RECBOLE_KEYS
        quick.update(general_arguments, training_arguments, evaluation_arguments, dataset_arguments)
        unknown = [key for key in self.external_config_dict if key not in quick]
        if not unknown:
            return
        known = quick | _all_property_keys(self.yaml_loader)  # one file may serve several models
        for key in unknown:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
                raise ValueError(f"unknown key `{key}` in {self._key_source.get(key)}; did you mean `{near[0]}`?")

    def _get_final_config_dict(self) -> dict[str, Any]:
        final = dict(self.internal_config_dict)
        for key, value in self.external_config_dict.items():
            default = final.get(key)
            # `load_col: {inter: [...]}` means just these columns; everything else is a partial change
            merge = isinstance(default, dict) and isinstance(value, dict) and key not in ("load_col", "unload_col", "slices")
            final[key] = {**default, **value} if merge else value  # type: ignore[dict-item]
        refuses_negatives = final["MODEL_TYPE"] == ModelType.SEQUENTIAL and final.get("loss_type") == "CE"
        if refuses_negatives and "train_neg_sample_args" not in self.external_config_dict:
            final["train_neg_sample_args"] = None  # RecBole's own default is one that its SASRec refuses
        self._settle_evaluation(final)
        self._settle_scenario(final)
        return final

    def _set_default_parameters(self) -> None:
        super()._set_default_parameters()
        final = self.final_config_dict
        name, _, k = final["valid_metric"].partition("@")
        if name.lower() not in map(str.lower, final["metrics"]) or (k and int(k) not in final["topk"]):
            raise ValueError(
                f"valid_metric: {final['valid_metric']} is not measured; metrics are {final['metrics']}, topk is {final['topk']}"
            )

    def _settle_evaluation(self, final: dict[str, Any]) -> None:
        """``eval_args: {mode: candidates}`` is our protocol; to RecBole it looks like full ranking, one row per user."""
        mode = final["eval_args"]["mode"]
        modes = {"valid": mode, "test": mode} if isinstance(mode, str) else dict(mode)
        final["candidate_phases"] = [phase for phase, value in modes.items() if value == "candidates"]
        final["eval_args"] = {
            **final["eval_args"],
            "mode": {phase: "full" if value == "candidates" else value for phase, value in modes.items()},
        }
        split, order = final["eval_args"].get("split"), final["eval_args"].get("order")
        if final["candidate_phases"] and (split != {"LS": "valid_and_test"} or order != "TO"):
            raise ValueError(
                f"eval_args: candidates need the last item of each user as target, split: {{'LS': 'valid_and_test'}} and "
                f"order: TO, not {split} and {order}; for another split give eval_args: {{'mode': 'full'}}"
            )

    def _settle_scenario(self, final: dict[str, Any]) -> None:
        """One at most; with ``train_dataset`` this run reads the two datasets as one, whose columns are ours."""
        scenarios.check({**final, "dataset": self.dataset})
        if final["train_dataset"]:
            fields = [final[key] for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
            final.update(scenarios.UNITED, load_col={"inter": fields})

    def _init_device(self) -> None:
        # RecBole overwrites CUDA_VISIBLE_DEVICES with gpu_id; what the shell says wins unless gpu_id was given
        shell = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shell is not None and "gpu_id" not in self.external_config_dict:
            self.final_config_dict["gpu_id"] = shell
        super()._init_device()

    def compatibility_settings(self) -> None:
        compat.apply()
        super().compatibility_settings()

    def for_dataset(self, name: str, *, whole: bool = False) -> LLMConfig:
        """The configuration of another dataset in the same run: its own property file, this run's other settings.

        A scenario holds nothing out of another dataset; out of this run's own, unless it is asked for as a ``whole``.
        """
        dropped, other = {"dataset"}, name != self.dataset
        if other:
            dropped |= self.dataset_keys()
        if other or whole:
            dropped |= set(scenarios.SETTINGS)
        values = {key: value for key, value in self.external_config_dict.items() if key not in dropped}
        return LLMConfig(self.model, name, config_dict=_as_literals(values))

    def read_dataset(self) -> Any:
        """The dataset that this configuration names, as :func:`~recbole_llm.data.loading.create_dataset` reads it."""
        from recbole_llm.data.loading import create_dataset

        return create_dataset(self)

    def for_model(self, name: str, values: Mapping[str, Any]) -> LLMConfig:
        """The configuration of another model on the same data and scenario in the same run, with ``values`` for it."""
        about_data = {"data_path", "checkpoint_dir", "seed", "gpu_id", "use_gpu", "show_progress", "load_col", "state"}
        about_data |= {*dataset_arguments, *scenarios.SETTINGS}
        if self["train_dataset"]:
            about_data |= set(scenarios.UNITED)  # the same texts make the same files
        kept = {key: value for key, value in self.external_config_dict.items() if key in about_data}
        if scenarios.active(self):
            kept["candidates"] = {"seed": self["candidates"]["seed"]}  # it draws what is held out
        return LLMConfig(name, self.dataset, config_dict=_as_literals({**kept, **values}))

    # -- views ---------------------------------------------------------------------------------------------------------

    def plain(self) -> dict[str, Any]:
        """The final values as JSON-able data."""
        return {key: _plain(value) for key, value in sorted(self.final_config_dict.items())}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every value that can change a result, as the run was asked for."""
        values = {**self.plain(), "init_from": self.init_run and self.init_run.record["stages"]}  # wherever it lies
        told = {key: value for key, value in values.items() if key not in _BOOKKEEPING}
        return fingerprint({key: value for key, value in told.items() if key not in _YOUNGER or value != _YOUNGER[key]})

    @property
    def record_file(self) -> Path:
        """Where the record of this run is, or will be: ``<checkpoint_dir>/runs/<Model>-<dataset>-<fingerprint>/record.json``."""
        name = f"{self['model']}-{self['dataset']}-{self.fingerprint[:8]}"
        return Path(self["checkpoint_dir"]) / "runs" / name / "record.json"

    @property
    def recbole_fingerprint(self) -> str:
        """SHA-256 of every value that can change what RecBole trains; it reads nothing of what is said about LLMs."""
        known = self._recbole_knows - _BOOKKEEPING
        return fingerprint({key: value for key, value in self.plain().items() if key in known})

    def log_ours(self) -> None:
        """Show our own settings in RecBole's manner."""
        getLogger().info("\n".join(f"{key} = {self[key]}" for key in self._ours))


def _as_literals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that were parsed once, so that parsing them again changes nothing."""
    return {key: repr(value) if isinstance(value, str) else value for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _all_property_keys(loader: Any) -> set[str]:
    """Every key that any property file of ours or of RecBole's sets."""
    import recbole

    files: Iterable[Path] = [
        *(Path(recbole.__file__).parent / "properties").rglob("*.yaml"),
        *properties_folder().rglob("*.yaml"),
    ]
    keys: set[str] = set()
    for file in files:
        if file.name not in ("url.yaml", "kg_url.yaml") and file.parent.name != "leaderboard":  # lists of runs
            keys.update((yaml.load(file.read_text(encoding="utf-8"), Loader=loader) or {}).keys())
    return keys
