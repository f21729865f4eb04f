"""Typed settings: small frozen dataclasses, each read from a configuration in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self


class Settings:
    """Base of settings dataclasses.

    Attributes:
        KEYS: the key of a field in the configuration, where it is not the field's name.
    """

    KEYS: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls, config: Any, **given: Any) -> Self:
        """The settings of a configuration; what is ``given`` is not read from it."""
        names = [field.name for field in fields(cls) if field.name not in given]  # type: ignore[arg-type]
        return cls(**{name: config[cls.KEYS.get(name, name)] for name in names}, **given)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, for what depends on them."""
        return asdict(self)  # type: ignore[call-overload]
