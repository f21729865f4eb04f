"""The dataset and the loaders of a run: RecBole's classes and splits, without its pickled caches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from logging import getLogger
from typing import Any

from recbole.utils import ModelType

from recbole_llm.data import dataset as classes
from recbole_llm.data import repeats, scenarios, ties
from recbole_llm.data.repeats import repeats_kept
from recbole_llm.data.samplers import create_samplers
from recbole_llm.data.united import unite

logger = getLogger()

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
    repeats.check(config)
    ties.check(config)
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
        ValueError: ``mask_history`` or ``benchmark_filename`` does not fit the data.
    """
    from recbole.data.utils import get_dataloader
    from recbole.sampler import KGSampler

    dataset.masking.check(config)
    splits = dataset.build()
    samplers: list[list[Any]] = [[sampler] for sampler in create_samplers(config, dataset, splits)]
    if repeats_kept(dataset):  # items of the history may be negatives, and are not masked
        repeatable = copy.copy(config)
        repeatable.final_config_dict = {**config.final_config_dict, "repeatable": True}
        samplers[1:] = [[sampler] for sampler in create_samplers(repeatable, dataset, splits)[1:]]
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        sampling = config["train_neg_sample_args"]
        samplers[0].append(KGSampler(dataset, sampling["distribution"], sampling["alpha"]))
    train, valid, test = (
        get_dataloader(config, phase)(config, split, *sampler, shuffle=phase == "train" and config["shuffle"])
        for phase, split, sampler in zip(("train", "valid", "test"), splits, samplers, strict=True)
    )
    return train, valid, test
