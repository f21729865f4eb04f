"""The configuration of a classical model inside a run (``cf_model``, ``retriever``): its own settings, the data of the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any

from recbole.utils.argument_list import dataset_arguments

from recbole_llm.config.key_groups import ABOUT_DATA
from recbole_llm.evaluation.recommender import Recommender

if TYPE_CHECKING:
    from recbole_llm.config import LLMConfig
    from recbole_llm.data.histories import Histories

logger = getLogger()

_OF_THE_RUN = ("model", "dataset", "eval_args")  # of eval_args all but the mode


def inner_config(config: Any, name: str, values: Mapping[str, Any], keys: Sequence[str]) -> LLMConfig:
    """The configuration of the model ``name`` in a run, evaluated by full ranking.

    Args:
        config: of the run.
        values: the settings of the model.
        keys: those of the run that give ``name`` and ``values`` first, for messages.

    Raises:
        ValueError: no model of RecBole, a setting of the run among ``values``, or as :class:`LLMConfig`.
    """
    key, settings, *_ = keys
    for given in _OF_THE_RUN:
        if given in values:
            raise ValueError(f"{settings}: {given} is that of the run (of eval_args all but the mode, a full ranking); remove it")
    try:
        found: LLMConfig = config.for_model(name, {**values, "eval_args": {"mode": "full"}})
    except ValueError as error:
        raise ValueError(f"{key}: {name} with these {settings}: {error}") from error
    if issubclass(found.model_class, Recommender):
        raise ValueError(
            f"{key}: {name} is not a model of RecBole, whose trainer would train it; choose SASRec or BPR, for example"
        )
    for given in found.unread:
        logger.warning(f"{given} in {settings} changes nothing: {name} has no such setting")
    return found


def check_split(histories: Histories, own: Histories, name: str, values: Collection[str], settings: str) -> None:
    """Refuse a model that would be trained on other data than those of the run, such as its test items.

    Args:
        histories, own: of the run and of the model ``name``.
        values: the keys that the user gave in ``settings``.

    Raises:
        ValueError: users, items, interactions, scenario or split differ.
    """
    if not own.same_split(histories):
        odd = ", ".join(given for given in values if given in {*dataset_arguments, *ABOUT_DATA})
        remedy = f"remove {odd}, which is set for the run" if odd else "choose one without a graph, such as SASRec"
        raise ValueError(f"{settings}: {name} must be trained on the same items, interactions and split; {remedy}")
