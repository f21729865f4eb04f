"""Base class of the frozen dataclasses that hold the settings of each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self


class Settings:
    """Base of settings dataclasses; ``KEYS`` maps a field to its key in the configuration, where the names differ."""

    KEYS: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls, config: Any, **given: Any) -> Self:
        """Read the fields from ``config``, except those in ``given``."""
        names = [field.name for field in fields(cls) if field.name not in given]  # type: ignore[arg-type]
        return cls(**{name: config[cls.KEYS.get(name, name)] for name in names}, **given)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values, for fingerprints."""
        return asdict(self)  # type: ignore[call-overload]
