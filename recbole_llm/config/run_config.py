"""RecBole's ``Config`` with our property files, checked keys, and values that are never evaluated.

Later values override earlier ones: RecBole's defaults, properties/overall, properties/dataset, the property file beside the
data, properties/llm/L (backbone L), properties/text_encoder/T (text encoder T), properties/model/M (the recipe of model M),
properties/llm/L/M and properties/text_encoder/T/M (what L and T need for M alone), the run of ``init_from``, the user's files,
``config_dict``, the command line. A dictionary such as ``eval_args`` or ``candidates`` overrides only the keys that it names.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.utils import ModelType
from recbole.utils.argument_list import dataset_arguments, training_arguments

from recbole_llm import compat, registry
from recbole_llm.config.checks import check, naming_source, of_other_training, source_of, unread
from recbole_llm.config.contents import contents, pretrained
from recbole_llm.config.evaluation import settle_metrics, settle_mode
from recbole_llm.config.key_groups import ABOUT_DATA, ABOUT_FEATURES, BOOKKEEPING, INNER_MODELS, OF_THE_RUN, SEQUENCE_TRAINING
from recbole_llm.config.property_files import PropertyFiles, property_file, read_yaml
from recbole_llm.config.values import as_literals, parse_value, plain, read_arguments
from recbole_llm.data import forms, scenarios
from recbole_llm.store.files import fingerprint
from recbole_llm.store.runs import SavedRun

_BEFORE_A_MODEL = ("llm", "llm_path", "text_encoder", "text_encoder_path", "init_from", "data_path", "use_gpu")
"""Keys that decide which files are read, or on what the run is, so that a model's own file comes too late for them."""


def given_value(
    key: str,
    config_file_list: Sequence[str] | str | None = None,
    config_dict: Mapping[str, Any] | None = None,
    cmd_line: Sequence[str] = (),
) -> Any:
    """The value that the user gives for a key that is needed before the configuration; None if there is none.

    Other arguments and errors as :class:`LLMConfig`.
    """
    sources = [*(values for _, values in _of_files(config_file_list)), _parsed(config_dict or {}), read_arguments(cmd_line)]
    return next((values[key] for values in reversed(sources) if key in values), None)


def _of_files(file_list: Sequence[str] | str | None) -> list[tuple[str, dict[str, Any]]]:
    files = file_list.split() if isinstance(file_list, str) else file_list or []
    return [(str(file), read_yaml(property_file(file))) for file in files]


def _parsed(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {key: parse_value(value) if isinstance(value, str) else value for key, value in config_dict.items()}


class LLMConfig(Config):
    """Configuration of one run; a drop-in for RecBole's ``Config``.

    Args:
        model: name of one of our models or of RecBole's.
        dataset: name of an atomic dataset.
        config_file_list: the user's YAML files; in a string, separated by spaces.
        config_dict: values by key; strings are parsed as literals and never evaluated.
        cmd_line: ``--key=value`` arguments; ``sys.argv`` is not read.
        cmd_name: what messages call ``cmd_line``.

    Attributes:
        init_run: the run that ``init_from`` names.
        unread: given settings that only other models have, with their sources; they change nothing.
        of_other_training: given settings of RecBole's trainer that change nothing, with those of the model's stages.
        own_copy: whether the user's data is read in place of data that comes with RecBole under the same name.

    Raises:
        ValueError: an unknown key or model, or an invalid value; the message names the key, its source and the remedy.
    """

    init_run: SavedRun | None = None
    unread: Mapping[str, str]
    of_other_training: Mapping[str, Sequence[str]]
    own_copy: bool = False
    internal_config_dict: dict[str, Any]
    external_config_dict: dict[str, Any]
    _beside: tuple[str, dict[str, Any]]  # the file beside the data, and its values

    def __init__(
        self,
        model: str | None = None,
        dataset: str | None = None,
        config_file_list: Sequence[str] | str | None = None,
        config_dict: Mapping[str, Any] | None = None,
        cmd_line: Sequence[str] = (),
        *,
        cmd_name: str = "the command line",
    ):
        compat.check_recbole()
        compat.check_pandas()
        self._cmd_line, self._cmd_name = tuple(cmd_line), cmd_name
        self._given: list[tuple[str, dict[str, Any]]] = []  # source and values; later ones win
        self.properties = PropertyFiles()
        super().__init__(model, dataset, config_file_list, dict(config_dict or {}))
        _ = self.fingerprint  # computed now, because some models (BERT4Rec) add keys while they run

    def _load_config_files(self, file_list: Sequence[str] | str | None) -> dict[str, Any]:
        self._given += _of_files(file_list)
        return {}

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        self._given.append(("config_dict", _parsed(config_dict)))
        return {}

    def _load_cmd_line(self) -> dict[str, Any]:
        self._given.append((self._cmd_name, read_arguments(self._cmd_line)))
        return {}

    def _merge_external_config_dict(self) -> None:
        for _, values in self._given:
            values.update(self.properties.as_collections(values))
        self.external_config_dict = self.properties.merge(*(values for _, values in self._given))

    def _get_model_and_dataset(self, model: str | None, dataset: str | None) -> tuple[str, type, str]:
        model = model or self.external_config_dict.get("model")
        dataset = dataset or self.external_config_dict.get("dataset")
        for key, value in (("model", model), ("dataset", dataset)):
            if value is None:
                raise ValueError(f"--{key} is missing: give it on the command line or in a property file")
        model_class = registry.get_model(str(model))
        compat.stop_anomaly_detection()
        self._add_own_file(model_class)
        return str(model).rpartition(":")[2], model_class, str(dataset)

    def _add_own_file(self, model_class: type | None) -> list[str]:
        """Read the property file of a model of the user, if there is one; returns the names of the model: one or none."""
        if model_class and (own := registry.own_property_file(model_class)):
            self.properties.add(f"model/{model_class.__name__}", own)
            self._merge_external_config_dict()  # its comments say which dictionaries are replaced as a whole
        return [model_class.__name__] if model_class else []

    def _inner_files(self) -> dict[str, PropertyFiles]:
        """By key with settings of a model inside the run that is one of the user: the property files, with that of this model."""
        found = {}
        for key, naming in INNER_MODELS.items():
            name = self.external_config_dict.get(naming) if self.external_config_dict.get(key) else None
            if (model := registry.inner_model(naming, name)) and (own := registry.own_property_file(model)):
                found[key] = PropertyFiles(self.properties.folder)
                found[key].own = {**self.properties.own, f"model/{model.__name__}": own}
        return found

    def _update_internal_config_dict(self, file: str) -> dict[str, Any]:
        values = read_yaml(file)  # RecBole would parse its files again in every Config, four fifths of the time of one
        self.internal_config_dict.update(values)
        return values

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        bases = registry.extended(model_class)
        theirs = next((name for name in reversed(bases) if name not in registry.MODELS), model)
        super()._load_internal_config_dict(theirs, model_class, dataset)
        own = ("train_mode", *SEQUENCE_TRAINING, "mask_history")  # keys of ours that change what RecBole's trainer selects
        self._recbole_knows = {*self.internal_config_dict, *training_arguments, *dataset_arguments, *own}
        files, overall, evaluation = self.properties, self.properties.read("overall"), self.properties.read("evaluation")
        self._ours = {*overall, *evaluation}
        if self.internal_config_dict["load_col"] != {"inter": ["user_id", "item_id"]}:
            del overall["load_col"]  # ours only adds the time column, which RecBole's default omits (RecBole#1616)
        if self.internal_config_dict["MODEL_TYPE"] in forms.LABELLED:
            evaluation = {}
        beside = self._beside_the_data(dataset, overall)
        self._beside = str(self._own_data(dataset) / f"{dataset}.yaml"), beside
        parts = [part for part in (self._part("llm"), self._part("text_encoder")) if part]  # the pretrained parts
        inner = registry.contained(
            model_class, self.external_config_dict, files.read(*(f"model/{one}" for one in (*bases, model)))
        )
        # it has the settings of the models that it extends, and of the one that it contains
        models = [*registry.extended(inner), *self._add_own_file(inner), *bases, model]
        named = [*parts, *(file for one in models for file in (f"model/{one}", *(f"{part}/{one}" for part in parts)))]
        texts = files.read(f"dataset/{dataset}") if beside or dataset in files.names("dataset") else files.read("parts/columns")
        ours = files.merge(overall, evaluation, texts, beside, files.read(*named))
        self._ours.update(ours)
        self.internal_config_dict = files.merge(self.internal_config_dict, ours)
        self._initialise_from_run(model, model_class)
        for file in files.own.values():
            values = {key: value for key, value in read_yaml(file).items() if key != "extends"}
            check(values, str(file), files, self.internal_config_dict)
            for key in _BEFORE_A_MODEL:
                if values.get(key) is not None:
                    raise ValueError(
                        f"{file}: `{key}` is needed before the file of a model is read; give --{key}={values[key]}, or set it in "
                        "a file of --config_files"
                    )
        of_inner = self._inner_files()
        for source, values in self._given:
            check(values, source, files, self.internal_config_dict, inner=of_inner)
            compat.refuse_options(values, source)
        of_lms = {*overall} - ABOUT_DATA - self._recbole_knows - self.dataset_keys() - {"float32_matmul_precision"}
        self.unread = unread(self._given, files, self.internal_config_dict, model_class, of_lms)
        of_models = files.read(*(f"model/{one}" for one in models))
        self.of_other_training = of_other_training(self._given, self.internal_config_dict, model_class, of_models)

    def _part(self, key: str) -> str | None:
        """The property file of a pretrained part, such as ``llm/<llm>``; None if ``<key>_path`` names the part itself."""
        name = self.external_config_dict.get(key)
        if name is None and f"{key}_path" in self.external_config_dict:
            return None
        name, known = name or "builtin", self.properties.names(key)
        if name not in known:
            what = {"llm": "backbone", "text_encoder": "text encoder"}[key]
            raise ValueError(f"--{key}={name}: unknown {what}; known: {', '.join(known)}; or give --{key}_path=FOLDER_OR_HUB_ID")
        return f"{key}/{name}"

    def _beside_the_data(self, dataset: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The property file ``<data_path>/<dataset>/<dataset>.yaml``: text fields and filters of the dataset.

        Raises:
            ValueError: a key that does not describe a dataset.
        """
        file = self._own_data(dataset) / f"{dataset}.yaml"
        if not file.is_file():
            return {}
        values, allowed = read_yaml(file), self.dataset_keys().union(dataset_arguments, {"encoding"})
        for key in values:
            if key not in allowed:
                raise ValueError(f"{file}: `{key}` does not describe a dataset; set it in a file of --config_files")
        check(values, str(file), self.properties, defaults)
        return values

    def _own_data(self, dataset: str) -> Path:
        data_path = self.external_config_dict.get("data_path") or self.internal_config_dict["data_path"]
        return Path(str(data_path)) / dataset

    def _initialise_from_run(self, model: str, model_class: type) -> None:
        """``init_from``: use the model settings of a saved run as defaults.

        Raises:
            ValueError: the model does not support it, the run has another model or backbone, or as :meth:`SavedRun.read`.
        """
        given, llm = self.external_config_dict.get("init_from"), self.external_config_dict.get("llm")
        if given is None:
            return
        if not getattr(model_class, "supports_init_from", False):
            raise ValueError(f"init_from: {model} cannot be initialised from a run; remove init_from={given}")
        self.init_run = SavedRun.read(str(given))
        theirs, trained = self.init_run.record["model"], self.init_run.record["config"]
        if theirs != model:
            raise ValueError(f"init_from: {given} is a run of {theirs}; give a run of {model}")
        backbone = trained["llm"] or trained["llm_path"]
        if llm not in (None, backbone):
            raise ValueError(f"--llm={llm}: init_from={given} was trained on {backbone}; remove llm")
        taken = self._ours - ABOUT_DATA - self.dataset_keys()
        self.internal_config_dict.update({key: value for key, value in trained.items() if key in taken})

    def dataset_keys(self) -> set[str]:
        """The keys that describe a dataset."""
        files = self.properties
        return set(scenarios.TEXTS).union(*(files.read(f"dataset/{name}") for name in files.names("dataset")))

    def _get_final_config_dict(self) -> dict[str, Any]:
        final = self.properties.merge(self.internal_config_dict, self.external_config_dict)
        mode = self.external_config_dict.get("eval_args", {}).get("mode")
        if isinstance(mode, Mapping) and isinstance(self.internal_config_dict["eval_args"].get("mode"), str):
            final["eval_args"]["mode"] = mode  # a mode of one phase alone holds for both, as in RecBole
        softmax = final["MODEL_TYPE"] == ModelType.SEQUENTIAL and final.get("loss_type") == "CE"
        if softmax and not hasattr(self.model_class, "input_type") and "train_neg_sample_args" not in self.external_config_dict:
            final["train_neg_sample_args"] = None  # RecBole's SASRec refuses RecBole's default
        lists_only = not getattr(self.model_class, "scores_full_catalogue", True)
        with naming_source([self._beside, *self._given]):
            settle_mode(final, self.external_config_dict, self._beside[1], model=self.model, lists_only=lists_only)
            self._settle_scenario(final)
        return final

    def _set_default_parameters(self) -> None:
        final, own = self.final_config_dict, self._own_data(self.dataset)
        with naming_source(self._given):
            settle_metrics(final, partial(source_of, self._given))
            if not hasattr(self.model_class, "input_type") and final.get("loss_type") not in ("CE", "BPR"):
                given = final.get("loss_type")
                raise ValueError(
                    f"loss_type: {given!r}: {self.model} has CE and BPR; give one of them, or --loss_type=CE with a loss of its "
                    "whole sequences, such as --sequence_loss=gbce"
                )
            super()._set_default_parameters()
        self.own_copy = Path(final["data_path"]) != own and any(own.glob(f"{glob.escape(self.dataset)}.*inter"))
        if self.own_copy:
            final["data_path"] = str(own)  # RecBole prefers its own copy of ml-100k

    def _settle_scenario(self, final: dict[str, Any]) -> None:
        """Check the scenario; with ``train_dataset``, set the columns of the two datasets that are read as one."""
        scenarios.check({**final, "dataset": self.dataset})
        if final["train_dataset"]:
            fields = [final[key] for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
            final.update(scenarios.UNITED, load_col={"inter": fields})

    def _init_device(self) -> None:
        # RecBole overwrites CUDA_VISIBLE_DEVICES with the default of gpu_id; here only a gpu_id that the user gave does
        shell = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shell is not None and "gpu_id" not in self.external_config_dict:
            self.final_config_dict["gpu_id"] = shell
        super()._init_device()
        if not self.final_config_dict["use_gpu"]:  # which RecBole does not read
            self.final_config_dict["device"] = torch.device("cpu")

    def compatibility_settings(self) -> None:
        compat.apply()
        registry.add_metrics()
        super().compatibility_settings()

    def for_dataset(self, name: str, *, whole: bool = False) -> LLMConfig:
        """The configuration of another dataset in the same run: its own property file, and this run's other settings.

        The scenario is dropped for another dataset, and for this run's own one if it is requested as a ``whole``. Of another
        dataset only the interactions and texts are read, so the keys of columns of features are those of this run's own one.
        """
        other = name != self.dataset
        dropped = {"dataset", *(scenarios.SETTINGS if other or whole else ())}
        dropped |= {*self.dataset_keys(), *ABOUT_FEATURES} if other else set()
        files = [self._own_data(name) / f"{name}.{part}.inter" for part in self["benchmark_filename"] or ()]
        if other and not all(file.is_file() for file in files):
            dropped.add("benchmark_filename")  # the other dataset is one file
        values = {key: value for key, value in self.external_config_dict.items() if key not in dropped}
        return LLMConfig(self.model, name, config_dict=as_literals(values))

    def given_of_model(self) -> dict[str, Any]:
        """The settings that the user gives and that a model may read: neither of data nor of training and evaluation."""
        others = ABOUT_DATA.union(training_arguments, self.unread)
        return {key: value for _, values in self._given for key, value in values.items() if key not in others}

    def read_dataset(self) -> Any:
        """The dataset that this configuration names, as :func:`~recbole_llm.data.loading.create_dataset` reads it."""
        from recbole_llm.data.loading import create_dataset

        return create_dataset(self)

    def for_model(self, name: str, values: Mapping[str, Any]) -> LLMConfig:
        """The configuration of another model on the same data and scenario, with ``values`` for that model."""
        about_data = OF_THE_RUN | set(scenarios.UNITED if self["train_dataset"] else ())
        kept = {key: value for key, value in self.external_config_dict.items() if key in about_data}
        kept["eval_args"] = {key: self["eval_args"][key] for key in ("split", "group_by", "order")}  # the same training data
        if scenarios.active(self) or self["tie_order"] == "random":
            kept["candidates"] = {"seed": self["candidates"]["seed"]}  # of the held-out users or items, and of ties
        return LLMConfig(name, self.dataset, config_dict=as_literals(self.properties.merge(kept, values)))

    def plain(self) -> dict[str, Any]:
        """The final values as JSON-able data."""
        return {key: plain(value) for key, value in sorted(self.final_config_dict.items())}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every given value that can change a result."""
        values = {**self.plain(), "init_from": self.init_run and self.init_run.record["stages"]}  # not its path
        values |= {"own_copy": True} if self.own_copy else {}  # for the run record, which is named by this alone
        return fingerprint({key: value for key, value in values.items() if key not in BOOKKEEPING} | contents(self))

    def evaluate(self, run: str) -> None:
        """Make this the configuration of an evaluation of a finished run with this fingerprint, which has a folder of its own."""
        self.final_config_dict["evaluates"] = run
        self.__dict__.pop("fingerprint", None)

    @property
    def record_file(self) -> Path:
        """The file of the run record, ``<checkpoint_dir>/runs/<Model>-<dataset>-<fingerprint>/record.json``."""
        name = f"{self['model']}-{self['dataset']}-{self.fingerprint[:8]}"
        return Path(self["checkpoint_dir"]) / "runs" / name / "record.json"

    @property
    def known_to_recbole(self) -> frozenset[str]:
        """The keys that RecBole's own files and lists have, with those of ours that its trainer reads."""
        return frozenset(self._recbole_knows)

    @property
    def recbole_fingerprint(self) -> str:
        """SHA-256 of every value that can change what RecBole trains, without the keys of LLMs."""
        known = self._recbole_knows - BOOKKEEPING
        return fingerprint({key: value for key, value in self.plain().items() if key in known} | pretrained(self))
