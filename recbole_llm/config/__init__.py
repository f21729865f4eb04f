"""The configuration of a run."""

from recbole_llm.config.run_config import LLMConfig

__all__ = ["LLMConfig"]
