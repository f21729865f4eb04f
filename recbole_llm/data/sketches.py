"""Sketches of multisets: a few hundred hashes from which the size of the overlap of two multisets is estimated.

A sketch has the :data:`SIZE` smallest hashes of a multiset of texts (bottom-k MinHash; Broder, "On the resemblance and
containment of documents", 1997). It has the same size for any multiset, and no text can be read from it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from hashlib import sha256

SIZE = 256
"""Hashes of a sketch; the standard error of an estimated Jaccard similarity J is sqrt(J (1 - J) / SIZE), at most .031."""

_BYTES = 4


def sketch(texts: Iterable[str]) -> str:
    """The sketch of a multiset of texts, as hexadecimal digits; equal texts are numbered, so each of them counts."""
    seen: dict[str, int] = {}

    def numbered() -> Iterable[bytes]:
        for text in texts:
            seen[text] = number = seen.get(text, 0) + 1
            yield sha256(f"{number}\t{text}".encode()).digest()[:_BYTES]

    return b"".join(heapq.nsmallest(SIZE, set(numbered()))).hex()


def common(one: str, other: str, size: int, other_size: int) -> float:
    """An estimate of the number of texts that two multisets of the given sizes have in common, from their sketches."""
    first, second = (set(_entries(bytes.fromhex(text))) for text in (one, other))
    union = sorted(first | second)[:SIZE]
    if not union:
        return 0.0
    jaccard = sum(entry in first and entry in second for entry in union) / len(union)
    return jaccard / (1 + jaccard) * (size + other_size)


def _entries(content: bytes) -> list[bytes]:
    return [content[start : start + _BYTES] for start in range(0, len(content), _BYTES)]
