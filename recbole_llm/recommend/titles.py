"""Items as people name them: by title, or by the id of the dataset."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

from recbole_llm.data.items import title_key

_MANY = 5000  # titles that are compared letter by letter
_SIGNS = str.maketrans({**dict.fromkeys("‘’‚‛′´`ʼʻ", "'"), **dict.fromkeys("“”„‟″«»", '"'), **dict.fromkeys("‐‑‒–—―−", "-")})


def folded(title: str) -> str:
    """The title without differences that keyboards and fonts make, too: forms of Unicode, quotation marks, dashes."""
    plain = unicodedata.normalize("NFKC", title.translate(_SIGNS)).translate(_SIGNS)
    return unicodedata.normalize("NFKC", title_key(plain))


class Titles:
    """Finds items by title or id.

    Args:
        item_ids: tokens by internal id; [0] is padding.
        titles, names: the titles, and the names that tell items of one title apart, by internal id.
        years: a title may also be given with its year, "Fargo (1996)"; by internal id, "" where it is not known.
    """

    def __init__(self, item_ids: Sequence[str], titles: Sequence[str], names: Sequence[str], years: Sequence[str] = ()):
        self.item_ids, self.names = item_ids, names
        self._titles, self._years = titles, years

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: item for item, token in enumerate(self.item_ids) if item}

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        titles, names, years = self._titles, self.names, self._years
        found: dict[str, list[int]] = defaultdict(list)
        for item in range(1, len(self.item_ids)):
            dated = f"{titles[item]} ({years[item]})" if years and years[item] else titles[item]
            for text in {title_key(titles[item]), title_key(names[item]), title_key(dated)}:
                found[text].append(item)
        return found

    @cached_property
    def _by_folded(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = defaultdict(set)
        for title, items in self._by_title.items():
            found[folded(title)] |= {*items}
        return found

    def known(self, text: str) -> int | None:
        """As :meth:`find`, but None if no item has this title; an unknown ``id:TEXT`` is refused."""
        kind, _, rest = text.partition(":")
        kind = kind.strip() if kind.strip() in ("id", "title") else ""
        given = (rest if kind else text).strip()
        found = set() if kind == "title" else {self._ids[given]} if given in self._ids else set()
        found |= set() if kind == "id" else {*self._by_title.get(title_key(given), ())}
        if len(found) > 1:
            known = ", ".join(f"id:{self.item_ids[item]} ({self.names[item]})" for item in sorted(found)[:5])
            raise ValueError(f"{given!r} is the title or the id of {len(found)} items; give one of {known}")
        if kind == "id" and not found:
            raise ValueError(f"no item has the id {given!r}")
        if not found and len(alike := self._by_folded.get(folded(given), ())) == 1:
            found = {*alike}
        return found.pop() if found else None

    def find(self, text: str) -> int:
        """The internal id of an item by its title, its name or its id; ``id:TEXT`` and ``title:TEXT`` say which is meant.

        A title may have other quotation marks and dashes than in the data, if that leaves one item.

        Raises:
            ValueError: no item or several items have it; names the nearest titles, or the items.
        """
        item = self.known(text)
        if item is None:
            given = text.removeprefix("title:").strip()
            near = "; ".join(self.nearest(given))
            raise ValueError(f"no item has the title or the id {given!r}" + (f"; nearest titles: {near}" if near else ""))
        return item

    def split(self, text: str) -> list[str]:
        """The titles and ids of ``A|B|C``. A title of the catalogue may itself have the sign, so the longest one counts."""
        parts, found = text.split("|"), []
        most = 1 + max((title.count("|") for title in self._by_title), default=0)
        while parts:
            known = (end for end in range(min(most, len(parts)), 1, -1) if self._is_title("|".join(parts[:end])))
            end = next(known, 1)
            found.append("|".join(parts[:end]).strip())
            del parts[:end]
        return [one for one in found if one]

    def _is_title(self, text: str) -> bool:
        return folded(text.strip().removeprefix("title:")) in self._by_folded

    def nearest(self, title: str, number: int = 3) -> list[str]:
        """The names of the items whose titles are most similar, best first."""
        title = re.sub(r"\s*\(\d{4}\)$", "", title)
        words = set(re.findall(r"\w+", title_key(title)))
        known = list(self._by_title)
        if len(known) > _MANY:  # comparing letters is slow: only titles with the most words in common
            shared = {text: len(words.intersection(text.split())) for text in known}
            known = sorted(filter(shared.get, known), key=lambda text: -shared[text])[:_MANY]
        found = difflib.get_close_matches(title_key(title), known, n=number, cutoff=0.4)
        return list(dict.fromkeys(self.names[self._by_title[text][0]] for text in found))

    def find_all(self, texts: Iterable[str], what: str) -> list[int]:
        """As :meth:`find` for several; the error begins with ``what``."""
        try:
            return [self.find(text) for text in texts]
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
