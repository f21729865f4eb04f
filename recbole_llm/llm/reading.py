"""How an LM is run so that its results are exact; :mod:`recbole_llm.llm.exactness` decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """How an LM is run so that its results are exact.

    Attributes:
        scorer: the strategy that replaces the configured one; None keeps the configured one.
        padding: rows of different lengths may share a batch.
        share: a common beginning of prompts may be computed once.
        context: the longest row that the LM reads; None if nothing limits it.
        warnings: what is slower than it was configured, and why.
    """

    scorer: str | None = None
    padding: bool = True
    share: bool = True
    context: int | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Reading:
        """A reading from its values as JSON has them."""
        return cls(**{**values, "warnings": tuple(values["warnings"])})

    def as_dict(self) -> dict[str, Any]:
        """The values, for JSON."""
        return asdict(self)
