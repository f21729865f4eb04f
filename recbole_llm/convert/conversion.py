"""``recbole-llm data convert``: files of interactions, or a release, as a dataset in RecBole's atomic files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recbole_llm.convert import releases
from recbole_llm.convert.columns import ROLES, TEXTS
from recbole_llm.convert.interactions import REPEATS, Interactions, collect, filtered, item_texts, times_of
from recbole_llm.convert.layout import Layout
from recbole_llm.convert.sources import ConversionError, Source
from recbole_llm.convert.tables import Table
from recbole_llm.convert.values import clean, identifier, list_separator
from recbole_llm.convert.writing import used, write_dataset

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Options:
    """The options of the command, by their names.

    Raises:
        ConversionError: a name or a number that is not possible.
    """

    to: str
    out: Path = Path("dataset")
    items: Path | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    item_columns: Mapping[str, Any] = field(default_factory=dict)
    time_format: str | None = None
    encoding: str = "utf-8"
    k_core: int | None = None
    min_rating: float | None = None
    repeats: str = "exact"
    drop_incomplete: bool = False
    description: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.to):
            raise ConversionError(f"--to={self.to}: a name consists of letters, digits, dots, hyphens and underscores")
        if self.k_core is not None and self.k_core < 1:
            raise ConversionError(f"--k_core={self.k_core}: give a number of at least 1, or leave it out")
        if self.repeats not in REPEATS:
            raise ConversionError(f"--repeats={self.repeats}: give one of {', '.join(REPEATS)}")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ConversionError(f"--encoding={self.encoding}: not an encoding that Python knows, such as latin-1") from None


class Conversion:
    """One conversion: what was understood, then the files.

    Attributes:
        layout: the tables and their columns.
        folder: of the dataset.

    Raises:
        FileExistsError: the folder exists; nothing is overwritten.
        ConversionError: the source is not understood.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self.options, self.folder = options, options.out / options.to
        if self.folder.exists():
            raise FileExistsError(f"--to={options.to}: {self.folder} exists; remove it, or give another name or --out")
        source, own = Source(path), options.columns or options.items
        layout = None if own else releases.recognised(source)
        if layout is None:
            given = options.columns, options.item_columns, options.encoding, options.to
            layout = releases.of_user(source, options.items, *given)
        elif options.encoding != Options.encoding:
            raise ConversionError(
                f"--encoding={options.encoding}: {path} is recognised as {layout.name}, whose encoding is known; leave it out, "
                "or name the columns with --columns to read it as a table of yours"
            )
        self.layout = self._described(layout)
        if options.item_columns and options.items is None:
            raise ConversionError(f"--item_columns={options.item_columns}: there is no table of items; name it with --items=FILE")
        if options.time_format and "time" not in layout.inter_columns:
            raise ConversionError(f"--time_format={options.time_format}: no column is read as the time; name one in --columns")
        self._separator = self._list_separator()

    def _described(self, layout: Layout) -> Layout:
        """The layout with a description only if it is asked for."""
        if self.options.description:
            return layout
        columns, items = (
            {role: name for role, name in own.items() if role != "description"}
            for own in (layout.inter_columns, layout.item_columns)
        )
        return replace(layout, inter_columns=columns, item_columns=items if layout.texts is None else layout.item_columns)

    def plan(self) -> list[str]:
        """What was understood, for the user to see before anything is read."""
        layout = self.layout
        lines = [f"{layout.inter.shown}: {layout.name}, interactions{self._read_as(layout.inter)}"]
        lines += self._mapped(layout.inter, layout.inter_columns)
        if "time" not in layout.inter_columns:
            lines.append("  time         none: the order of the rows is taken for the order in time")
        if "item" not in layout.inter_columns:
            lines.append("  item         none: items are told apart by title and brand, and numbered")
        if layout.items is not None:
            lines.append(f"{layout.items.shown}: items{self._read_as(layout.items)}")
            lines += self._mapped(layout.items, layout.item_columns)
        words = layout.properties
        if "noun" in words:
            lines.append(f"prompts: users have {words['verb']} these {words['noun']}s")
        return [*lines, *(f"note: {note}" for note in layout.notes)]

    def _read_as(self, table: Table) -> str:
        """The encoding, if it or the one that the user gave is not UTF-8."""
        return f", read as {table.encoding}" if table.encoding and {table.encoding, self.options.encoding} != {"utf-8"} else ""

    def _mapped(self, table: Table, columns: Mapping[str, str]) -> list[str]:
        lines = []
        for role, name in columns.items():
            about = ""
            if role == "time":
                about = f" ({times_of(self.layout, self.options.time_format).said})"
            elif role == "category" and (mark := self._separator):
                about = f" (values between {mark!r})"
            lines.append(f"  {role:<12} {name}{about}" if role in ROLES else f"               {name}")
        if self.layout.name == releases.YOURS and (unread := [name for name in table.names if name not in columns.values()]):
            lines.append(f"  not read     {', '.join(unread)}")
        return lines

    def _list_separator(self) -> str | None:
        """Between the values of the column of categories."""
        layout = self.layout
        table, columns = (layout.inter, layout.inter_columns) if layout.items is None else (layout.items, layout.item_columns)
        if layout.texts is not None or "category" not in columns:
            return None
        name = columns["category"]
        return list_separator(name, (value for (value,) in table.sample([name])))

    def run(self) -> list[str]:
        """Convert; returns lines about what was read, removed and written.

        Raises:
            ConversionError: a value that cannot be converted; nothing is written.
        """
        options = self.options
        whole, notes = collect(self.layout, time_format=options.time_format, drop_incomplete=options.drop_incomplete)
        data, lines = filtered(whole, min_rating=options.min_rating, repeats=options.repeats, k_core=options.k_core)
        lines, columns = [*notes, *lines], self._columns()
        about = [f"Made by recbole-llm data convert from {self.layout.name}.", *lines]
        items = self._items(data) if columns else iter(())
        report = _ItemReport(len(used(data)))
        written = write_dataset(self.folder, data, report.watch(items), columns, self.layout.properties, about)
        before, after = ("{:,} users, {:,} items, {:,} interactions".format(*own.counts) for own in (whole, data))
        none = "there are no titles, so there is no .item file, which LLM recommenders need"
        titles = report.lines(written) if columns else [none]
        return [f"read: {before}", *lines, *titles, f"written to {self.folder}: {after}"]

    def _columns(self) -> dict[str, str]:
        """Names of the columns of ``.item`` by role."""
        layout = self.layout
        if layout.items is None:
            roles = [role for role in TEXTS if role in layout.inter_columns]
        elif layout.texts is None:
            roles = [role for role in TEXTS if role in layout.item_columns]
        else:
            roles = [role for role in TEXTS if role in self._made()]
        return {role: "title" if role == "title" else layout.names.get(role, role) for role in roles}

    def _made(self) -> set[str]:
        """Roles of the texts that a release's items have in its first rows."""
        rows = self._raw_items()
        found: set[str] = set()
        for (_, _, values), _ in zip(rows, range(1000), strict=False):
            found |= {role for role in TEXTS if values.get(role)}
        return found | {"title"} if self.options.description else (found | {"title"}) - {"description"}

    def _raw_items(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Line, id and values by role of each row of the table of items."""
        layout = self.layout
        assert layout.items is not None  # noqa: S101
        columns = layout.item_columns
        for line, row in layout.items.rows([*columns.values()]):
            values = dict(zip(columns, row, strict=True))
            if layout.texts is not None:
                values = layout.texts(values)
            yield line, identifier(values.get("item")), values

    def _items(self, data: Interactions) -> Iterator[tuple[str, dict[str, str]]]:
        """Id and texts of each item with interactions; of several rows of one item, the first."""
        wanted = used(data)
        if self.layout.items is None:
            for token, values in zip(data.item_ids, data.texts, strict=True):
                if token in wanted:
                    yield token, item_texts(values, self._separator)
            return
        others: list[str] = []
        known = len(wanted)
        for _, token, values in self._raw_items():
            if token in wanted:
                wanted.remove(token)
                yield token, item_texts(values, self._separator)
            elif len(others) < 3:
                others.append(token)
        if len(wanted) == known:
            theirs, ours = (", ".join(map(repr, ids)) for ids in (others, sorted(wanted)[:3]))
            raise ConversionError(
                f"{self.layout.items.shown}: none of its ids ({theirs}, ...) is among those of the interactions ({ours}, ...); "
                "name the columns of ids in --columns and --item_columns"
            )


class _ItemReport:
    """Counts items without a row or a title, and those that share a title."""

    def __init__(self, items: int) -> None:
        self._items, self._untitled, self._titles = items, 0, set[int]()

    def watch(self, items: Iterator[tuple[str, dict[str, str]]]) -> Iterator[tuple[str, dict[str, str]]]:
        for token, texts in items:
            title = clean(texts.get("title")).casefold()
            self._untitled += not title
            self._titles.add(hash(title))
            yield token, texts

    def lines(self, rows: int) -> list[str]:
        titled = rows - self._untitled
        found = [f"items with a title: {titled:,} of {self._items:,}"]
        same = titled - len(self._titles - {hash("")})
        return [*found, f"items that share their title with an earlier one: {same:,}"] if same else found
