"""The check of a backbone before anything is trained: can it be run exactly, and do its vocabulary and the rows of the run fit?

Its result is cached in ``<checkpoint_dir>/readings``, under a name of everything that it depends on: the backbone with its
precision and attention, the versions of torch and transformers, what the run asks of it, and the code that it compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.exactness import check_vocabulary, exact_reading
from recbole_llm.llm.reading import Reading
from recbole_llm.settings import Settings
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import atomic_write, fingerprint
from recbole_llm.store.json_files import DamagedError, read_sealed, sealed
from recbole_llm.store.processes import current, undivided
from recbole_llm.store.random_state import preserved_random_state

logger = getLogger()


@dataclass(frozen=True)
class BackboneCheck(Settings):
    """``check(identity, name, load)``: how the backbone is to be run.

    Attributes:
        scorer: strategy of a ranker; None for an encoder.
        vectors: its prompts have soft tokens.
        folder: the run's ``checkpoint_dir``.
    """

    KEYS = {"folder": "checkpoint_dir", "attention": "attn_implementation"}

    scorer: str | None
    max_prompt_tokens: int
    max_title_tokens: int
    attention: str | None
    folder: str
    vectors: bool = False

    def __call__(self, identity: str, name: str, load: Callable[[], CausalLM]) -> Reading:
        """The cached reading of the backbone of this identity, or that of the LM that ``load`` returns; process 0's for all.

        Raises:
            NotExactError: the LM cannot be run exactly, or its tokenizer is larger than its embedding.
        """
        processes = current()
        cached = self.known(identity) if processes.main else None
        known: Any = processes.agree(cached and cached.as_dict())
        if known is not None:
            reading = Reading.of(known)
        else:
            causal = load()
            check_vocabulary(causal.model, causal.tokenizer, name)
            longest = self.max_prompt_tokens + self.max_title_tokens + 1
            with preserved_random_state(), undivided():
                reading = exact_reading(causal.model, scorer=self.scorer, longest=longest, source=name, vectors=self.vectors)
            found: Any = processes.agree(reading.as_dict())
            reading = Reading.of(found)
            if processes.main:
                file = self._file(identity)
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(file, sealed(reading.as_dict()))
        for warning in reading.warnings:
            logger.warning(f"{name}: {warning}")
        return reading

    def known(self, identity: str) -> Reading | None:
        """The cached reading of the backbone of this identity."""
        file = self._file(identity)
        try:
            return Reading.of(read_sealed(file))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            logger.warning(f"{error}; the backbone is checked again")
            return None

    def _file(self, identity: str) -> Path:
        versions = [version("torch"), version("transformers")]
        made_from = [identity, self.as_dict() | {"folder": None}, versions, code_fingerprint("recbole_llm.llm.exactness")]
        return Path(self.folder) / "readings" / f"{fingerprint(made_from)[:16]}.json"
