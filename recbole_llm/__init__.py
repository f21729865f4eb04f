"""RecBole-LLM: published LLM recommenders as ordinary RecBole models.

Importing the package checks that RecBole is installed, applies the shims that RecBole 1.2 needs on current numpy and scipy
(:mod:`recbole_llm.compat`) and does nothing else: RecBole's parts, transformers and peft are imported where they are used.
"""

from recbole_llm import compat

__version__ = "0.1.0"

compat.check_recbole()
compat.apply()
