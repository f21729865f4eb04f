"""The dataset and the loaders of a run: RecBole's classes and splits, without its pickled caches."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from logging import getLogger
from typing import Any

from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.transform import UserDefinedTransform
from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_llm import registry
from recbole_llm.data import dataset as classes
from recbole_llm.data import scenarios
from recbole_llm.data.eval_loader import ArrayEvalLoader
from recbole_llm.data.repeats import repeats_kept
from recbole_llm.data.samplers import create_samplers
from recbole_llm.data.united import unite

logger = getLogger()

PAIRS = 2**22
"""Users times items in a batch that evaluates a general model, at least; the size of RecBole's published benchmarks."""
USERS = 2**12
"""Users in a batch that ranks candidates by a general model, at least; RecBole's default for sequential models."""
SCORES = 2**24
"""Users times items in a full ranking of a sequential model, at most: 64 MiB of 32-bit numbers, in a few copies."""

_BY_TYPE = {ModelType.SEQUENTIAL: "SequentialDataset", ModelType.KNOWLEDGE: "KnowledgeBasedDataset"}


def create_dataset(config: Any) -> Any:
    """The dataset that RecBole would build for ``config``, extended by :class:`~recbole_llm.data.dataset.RankedTime`.

    With ``train_dataset`` it contains that dataset and ``dataset``.

    Raises:
        FileNotFoundError: the dataset is not on disk and has no download; the message says which files go where.
        ConnectionError: the download failed; likewise.
    """
    own = f"{config['model']}Dataset"
    name = own if hasattr(classes, own) else _BY_TYPE.get(config["MODEL_TYPE"], "Dataset")
    parts = _parts(config)
    dataset = getattr(classes, name)(_located(config, parts))
    dataset.repeats_dropped += sum(part.repeats_dropped for part in parts.values())
    if dataset.uid_field is not None:
        # cache now: build() replaces the table by RecBole's augmented rows, and its splits are copies of this dataset
        _ = dataset.histories, dataset.catalogue_titles
    _ = dataset.masking  # likewise
    if dataset.scenario.label:
        logger.info(scenarios.report(config, dataset.histories))
    return dataset


def _parts(config: Any) -> dict[str, Any]:
    """The datasets that ``train_dataset`` unites, by name; none without it."""
    parts = {}
    for name in (config["train_dataset"], config["dataset"]) if config["train_dataset"] else ():
        logger.info(f"train_dataset: reading {name}")
        parts[name] = create_dataset(config.for_dataset(name, whole=True))
    return parts


def _located(config: Any, parts: Mapping[str, Any]) -> Any:
    """``config`` with the path that RecBole reads: with ``train_dataset``, the united files of ``parts``."""
    if not parts:
        return config
    name, folder = unite(config, parts)
    located = copy.copy(config)
    settled = {"rm_dup_inter": None, "tie_order": "file"}  # each part has dropped and ordered its own
    located.final_config_dict = {**config.final_config_dict, **settled, "dataset": name, "data_path": folder}
    return located


def data_preparation(config: Any, dataset: Any) -> tuple[Any, Any, Any]:
    """RecBole's train, valid and test loaders.

    RecBole's function of that name would first unpickle ``saved/<dataset>-for-<model>-dataloader.pth``.

    Raises:
        ValueError: ``mask_history``, ``benchmark_filename``, ``topk`` or ``train_neg_sample_args`` does not fit data or model.
    """
    from recbole.data.utils import get_dataloader
    from recbole.sampler import KGSampler

    dataset.masking.check(config)
    _check_topk(config, dataset)
    _check_transform(config)
    splits = dataset.build()
    _check_examples(config, splits[0])
    samplers: list[list[Any]] = [[sampler] for sampler in create_samplers(config, dataset, splits)]
    if repeats_kept(dataset):  # items of the history may be negatives, and are not masked
        repeatable = copy.copy(config)
        repeatable.final_config_dict = {**config.final_config_dict, "repeatable": True}
        samplers[1:] = [[sampler] for sampler in create_samplers(repeatable, dataset, splits)[1:]]
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        sampling = config["train_neg_sample_args"]
        samplers[0].append(KGSampler(dataset, sampling["distribution"], sampling["alpha"]))
    train, valid, test = (
        _loader(get_dataloader(config, phase))(
            _batched(config, phase, dataset.item_num), split, *sampler, shuffle=phase == "train" and config["shuffle"]
        )
        for phase, split, sampler in zip(("train", "valid", "test"), splits, samplers, strict=True)
    )
    return train, valid, test


def _loader(recboles: type) -> type:
    return ArrayEvalLoader if recboles is FullSortEvalDataLoader else recboles


def _batched(config: Any, phase: str, items: int) -> Any:
    """``config`` with the size of evaluation batches.

    RecBole counts pairs of a user and an item for general models, so that its default is one user of 4,096 items, and users for
    sequential models, so that a batch of it has 4,096 scores for each item.
    """
    given = config["eval_batch_size"]
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        # RecBole's Random draws one order of the items for all users of a batch
        least = max(PAIRS, USERS * items) if phase in config["candidate_phases"] else PAIRS
        size = given if config["model"] == "Random" else max(given, least)
    else:
        size = min(given, max(1, SCORES // items)) if phase in config["full_phases"] else given
    if phase == "train" or size == given or phase not in (*config["full_phases"], *config["candidate_phases"]):
        return config
    batched = copy.copy(config)
    batched.final_config_dict = {**config.final_config_dict, "eval_batch_size": size}
    return batched


def _check_topk(config: Any, dataset: Any) -> None:
    most = max(config["topk"])
    if config["eval_type"] == EvaluatorType.RANKING and most >= dataset.item_num:
        raise ValueError(f"topk: {most} is more than the {dataset.item_num - 1} items of {config['dataset']}; lower it")


_TRANSFORMED_BY = {"mask_itemseq": ("mask_ratio", 0.2), "crop_itemseq": ("eta", 0.6), "reorder_itemseq": ("beta", 0.5)}
"""The setting that a transform reads, and a usual value; few models have a default of it."""


def _check_transform(config: Any) -> None:
    """Refuse a transform that lacks what it reads; warn of one whose columns the model does not read."""
    name, model = config["transform"], config["model"]
    key, usual = _TRANSFORMED_BY.get(name, (None, None))
    if key and config[key] is None:
        raise ValueError(
            f"transform: {name} reads {key}, of which {model} has no default; give it, such as --{key}={usual}, or remove it"
        )
    longest = config["MAX_ITEM_LIST_LENGTH"]
    if name == "mask_itemseq" and min(int(config[key] * longest), longest - 1) < 1:
        raise ValueError(
            f"mask_ratio: {config[key]} of MAX_ITEM_LIST_LENGTH: {longest} masks no item, so that there is nothing to train on; "
            "raise one of them"
        )
    if name == "user_defined" and registry.source(UserDefinedTransform.__call__).rstrip().endswith("pass"):
        raise ValueError(
            "transform: user_defined is a class of RecBole that does nothing, UserDefinedTransform; give it a __call__ that "
            "returns the interaction, or remove transform"
        )
    if name in (None, "user_defined"):
        return
    column = f"{name.removesuffix('_itemseq').upper()}_ITEM_SEQ"
    modules = [base.__module__ for base in config.model_class.__mro__ if not base.__module__.startswith(("torch", "builtins"))]
    if not any(column in registry.source(sys.modules[module]) for module in modules):
        logger.warning(f"transform: {name} changes nothing: it adds columns ({column}) that {model} does not read")


def _check_examples(config: Any, train: Any) -> None:
    """Refuse a training without negatives of a model that reads negatives, or labels that the data does not have."""
    sampling = config["train_neg_sample_args"]
    if sampling["dynamic"] != bool(sampling["candidate_num"]):
        raise ValueError(
            f"train_neg_sample_args: dynamic: {sampling['dynamic']} chooses one of candidate_num: {sampling['candidate_num']} "
            "drawn items; give both, such as {'dynamic': True, 'candidate_num': 5}, or neither"
        )
    if sampling["distribution"] != "none":
        return
    code, name = registry.source(sys.modules[config.model_class.__module__]), config["model"]
    if config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE and "NEG_ITEM_ID" in code:
        raise ValueError(
            f"train_neg_sample_args: {name} compares chosen items with drawn ones, and none are drawn; remove it to draw one each"
        )
    label = config["LABEL_FIELD"]
    if config["MODEL_INPUT_TYPE"] == InputType.POINTWISE and "LABEL_FIELD" in code and label not in train.inter_feat:
        raise ValueError(
            f"train_neg_sample_args: {name} reads labels where no negatives are drawn, and no column {label} (LABEL_FIELD) is "
            "loaded; remove it, list the column in load_col, or make labels, such as --threshold=\"{'rating': 4}\""
        )
