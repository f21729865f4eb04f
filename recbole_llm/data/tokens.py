"""Literal text and titles as token ids: in a title, everything is text, special tokens included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from logging import getLogger
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = getLogger()


class TextTokens:
    """Tokenises literal text, in which special tokens count, and titles, in which everything is text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_title_tokens: int) -> None:
        if max_title_tokens < 1:
            raise ValueError(f"max_title_tokens: {max_title_tokens} must be at least 1")
        self._tokenizer, self._names, self._max_title_tokens = tokenizer, names, max_title_tokens
        self._adds_space = tokenizer.tokenize("a") != ["a"]  # SentencePiece sets the leading space by itself
        self._titles: dict[bool, list[list[int]]] = {}

    def literal(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def spaced(self, text: str, spaced: bool) -> str:
        return f" {text}" if spaced and not self._adds_space else text

    def titles(self, spaced: bool) -> list[list[int]]:
        """Every title, with or without a leading space, cut to the limit."""
        spaced = spaced and not self._adds_space
        if spaced not in self._titles:
            texts = [self.spaced(name, spaced) if name else "" for name in self._names]
            rows = [row[: self._max_title_tokens] for row in tokenise_as_text(self._tokenizer, texts)]
            alike = len(rows) - len(set(map(tuple, rows)))
            if alike and not self._titles:
                logger.warning(
                    f"max_title_tokens: cut to {self._max_title_tokens} tokens, {alike} titles are equal to another one"
                )
            self._titles[spaced] = rows
        return self._titles[spaced]

    def separator(self, key: str, text: str) -> tuple[list[int], bool]:
        """Its tokens without the space that the next title takes over, and whether a title does."""
        if not text:
            raise ValueError(f"{key}: titles must have something between them, not an empty text")
        spaced = text.endswith(" ") and bool(text.strip())
        return self.literal(text.removesuffix(" ") if spaced else text), spaced

    def begin(self, text: str, needed: bool) -> list[int]:
        """The first literal after BOS, where the tokenizer sets one. If ``needed``, never empty: BOS or EOS."""
        literal, bos = self.literal(text), self._tokenizer.bos_token_id
        if bos is not None and literal[:1] != [bos] and self._tokenizer("a")["input_ids"][:1] == [bos]:
            return [bos, *literal]
        if needed and not literal:
            return self.end() if bos is None else [bos]
        return literal

    def end(self) -> list[int]:
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"llm_path: the tokenizer of {self._tokenizer.name_or_path!r} has no EOS to end an answer")
        return [self._tokenizer.eos_token_id]


def tokenise_as_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which ``<|im_end|>``, ``</s>`` and the like are nothing but letters."""
    reserved = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if len(str(added)) > 1}
    pattern = re.compile("|".join(map(re.escape, reserved.values())) or r"(?!)", re.IGNORECASE)

    def encode(parts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(parts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def pieces(text: str) -> list[str]:
        """Cut every added token behind its first letter, so that no piece holds one."""
        cuts = [0]
        while found := pattern.search(text, cuts[-1]):
            cuts.append(found.start() + 1)
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]

    rows = encode(texts)
    for number, row in enumerate(rows):
        if not reserved.keys().isdisjoint(row):  # split_special_tokens spares tokens that are added but not special
            rows[number] = list(chain.from_iterable(encode(pieces(texts[number]))))
    return rows
