"""What is converted: interactions, items, and what their columns mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recbole_llm.convert.tables import Table

Texts = dict[str, Any]
"""Values of an item by role (:data:`recbole_llm.convert.columns.TEXTS`)."""


@dataclass(frozen=True)
class Layout:
    """The tables of a source and their columns by role.

    Attributes:
        name: "MovieLens 1M", or "CSV" for files of the user.
        inter: the interactions, with at least the roles ``user`` and ``item`` or ``title``.
        inter_columns: column by role.
        items: the items; None if there is no such table.
        item_columns: column by role; the role ``item`` is their id.
        texts: makes the texts of an item from ``item_columns``' values where they are not those of the columns.
        names: names of the columns of the ``.item`` file by role; by default those of the role.
        properties: the lines of the property file: noun, verb, ...
        notes: what the user should know about this release.
        time_format: of the times, if they are dates in an ambiguous form.
        keeps: says of the values of ``also`` whether the row is an interaction.
        also: further columns of ``inter`` for ``keeps``.
    """

    name: str
    inter: Table
    inter_columns: Mapping[str, str]
    items: Table | None = None
    item_columns: Mapping[str, str] = field(default_factory=dict)
    texts: Callable[[Texts], Texts] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    time_format: str | None = None
    keeps: Callable[[Sequence[Any]], bool] | None = None
    also: Sequence[str] = ()
