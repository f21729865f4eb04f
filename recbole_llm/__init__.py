"""RecBole-LLM: published LLM recommenders as ordinary RecBole models.

Importing the package does nothing: RecBole, transformers and peft are imported where they are used. Every command but ``doctor``,
:func:`load` and :class:`recbole_llm.config.LLMConfig` check that RecBole is installed in a version that works, and ``LLMConfig``
applies what RecBole 1.2 needs on current numpy and scipy (:mod:`recbole_llm.compat`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recbole_llm import compat

if TYPE_CHECKING:
    from recbole_llm.recommend.recommender import RunRecommender

__version__ = "0.1.0"


def load(run: str | Path, *, retriever: bool = True, **where: str | None) -> RunRecommender:
    """A finished run as a recommender; see :func:`recbole_llm.recommend.recommender.load`."""
    compat.check_recbole()
    from recbole_llm.recommend.recommender import load as load_run

    return load_run(run, retriever=retriever, **where)
