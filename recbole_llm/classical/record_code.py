"""Which code makes a run record: known before the run, so that a leaderboard can tell the records of other code."""

from __future__ import annotations

from typing import Any

from recbole_llm import registry
from recbole_llm.store.code import code_fingerprint, has_code

_ANY_RUN = (
    "recbole_llm.classical.building",
    "recbole_llm.classical.train_modes",
    "recbole_llm.data.candidate_sets",
    "recbole_llm.data.loading",
    "recbole_llm.evaluation.generated",
    "recbole_llm.evaluation.record",
    "recbole_llm.evaluation.slices",
)

_INNER = ("retriever", "cf_model", "cheap_model")


def record_code(config: Any) -> str:
    """SHA-256 of the code that reads and splits the data, draws candidates, and builds, trains and evaluates the model.

    Args:
        config: of the run.
    """
    kinds = [config.model_class]
    if (key := getattr(config.model_class, "contains", None)) is not None:
        kinds.append(registry.get_model(str(config[key])))
    named = (str(config[key]) for key in _INNER)
    kinds += [registry.get_model(name) for name in named if ":" in name]  # a user's own
    beside = [own.get("merge") if isinstance(own, dict) else own for own in (config["merge_beside"] or {}).values()]
    merges = [registry.dotted(str(name).replace(":", ".").rpartition(".")[0]) for name in (config["merge"], *beside)]
    merges = [name for name in merges if name and has_code(name)]  # '' of known methods; the merge says what is wrong with others
    retriever = ["recbole_llm.classical.retriever"] if config["candidates"]["source"] == "retriever" else []
    return code_fingerprint(*_ANY_RUN, *retriever, *(kind.__module__ for kind in kinds), *merges)
