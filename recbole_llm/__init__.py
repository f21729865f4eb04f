"""RecBole-LLM: published LLM recommenders as ordinary RecBole models.

Importing the package checks that RecBole is installed and does nothing else: RecBole, transformers and peft are imported where
they are used, and :class:`recbole_llm.config.LLMConfig` applies what RecBole 1.2 needs on current numpy and scipy
(:mod:`recbole_llm.compat`).
"""

from recbole_llm import compat

__version__ = "0.1.0"

compat.check_recbole()
