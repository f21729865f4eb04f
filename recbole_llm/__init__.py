"""RecBole-LLM: published LLM recommenders as ordinary RecBole models.

Importing the package applies the shims that RecBole 1.2 needs on current numpy and scipy (:mod:`recbole_llm.compat`) and
nothing else: RecBole, transformers and peft are imported where they are used.
"""

from recbole_llm import compat

__version__ = "0.1.0"

compat.apply()
