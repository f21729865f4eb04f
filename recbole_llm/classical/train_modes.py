"""Which trainer a model has: RecBole's of its type, with the protocol of this package and the mixin of its ``train_mode``."""

from __future__ import annotations

from logging import getLogger
from typing import Any

from recbole.trainer import Trainer
from recbole.utils import get_trainer

from recbole_llm.classical.cloze import MASKED_MODELS, MaskedPrefixes, MaskedTraining
from recbole_llm.classical.sequence import CAUSAL_MODELS, SequenceTraining, refuse_sequence_keys
from recbole_llm.classical.shared import SharedPairs
from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.evaluation.recommender import Recommender

logger = getLogger()


def trainer_class(config: Any) -> type[Any]:
    """The trainer for a configured model.

    Raises:
        ValueError: ``train_mode`` is unknown, or a key of another mode is given.
    """
    base = get_trainer(config["MODEL_TYPE"], config["model"])
    bases: tuple[type, ...] = (ProtocolTrainer,) if base is Trainer else (ProtocolTrainer, base)
    if config["train_mode"] not in ("auto", "sequence", "prefix"):
        raise ValueError(f"train_mode: {config['train_mode']!r} is unknown; choose auto, sequence or prefix")
    if issubclass(config.model_class, Recommender):  # ``train_mode`` concerns RecBole's models
        refuse_sequence_keys(config, "only RecBole's models have it (a model inside this run: in cf_config or retriever_config)")
        bases = (SharedPairs, *bases) if config.model_class.loss_is_mean else bases
    elif config["train_mode"] == "sequence" and config["model"] in MASKED_MODELS:
        bases = (MaskedTraining, *bases)
    elif config["train_mode"] == "sequence" or (config["train_mode"] == "auto" and config["model"] in CAUSAL_MODELS):
        logger.info(f"train_mode: sequence ({config['model']} is causal; --train_mode=prefix is RecBole's own loop)")
        bases = (SequenceTraining, *bases)
    else:
        refuse_sequence_keys(config, f"{config['model']} is trained in train_mode: prefix here, which does not have it")
        masked = any(base.__name__ in MASKED_MODELS for base in config.model_class.__mro__)
        bases = (MaskedPrefixes, *bases) if masked else bases
    return type(f"Protocol{base.__name__}", bases, {})
