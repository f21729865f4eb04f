"""Literal text and titles as token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from logging import getLogger
from typing import TYPE_CHECKING

from recbole_llm.data.chat_templates import UnboundedTemplateError, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = getLogger()


class TextTokens:
    """Tokenises literal text, which may contain special tokens, and titles, in which a special token is plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_title_tokens: int, quote: str = "") -> None:
        if max_title_tokens < 1:
            raise ValueError(f"max_title_tokens: {max_title_tokens} must be at least 1")
        self._tokenizer, self._names, self._max_title_tokens, self._quote = tokenizer, names, max_title_tokens, quote
        self._adds_space = tokenizer.tokenize("a") != ["a"]  # SentencePiece adds the leading space itself
        self._titles: dict[bool, list[list[int]]] = {}

    def literal(self, text: str, spaced: bool = False) -> list[int]:
        """Token ids of a text, with a leading space if ``spaced``."""
        text = f" {text}" if spaced and not self._adds_space else text
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def titles(self, spaced: bool) -> list[list[int]]:
        """Every title, with or without a leading space, cut to the limit and then between the quotes, if there are any."""
        spaced = spaced and not self._adds_space
        if spaced not in self._titles:
            texts = [f" {name}" if spaced and name and not self._quote else name for name in self._names]
            rows = [row[: self._max_title_tokens] for row in tokenise_as_text(self._tokenizer, texts)]
            alike = len(rows) - len(set(map(tuple, rows)))
            if alike and not self._titles:
                logger.warning(f"max_title_tokens: {alike} titles equal another one when cut to {self._max_title_tokens} tokens")
            if self._quote:
                opening, closing = self.literal(self._quote, spaced), self.literal(self._quote)
                rows = [[*opening, *row, *closing] for row in rows]
            self._titles[spaced] = rows
        return self._titles[spaced]

    def separator(self, key: str, text: str) -> tuple[list[int], bool]:
        """Its tokens, without a trailing space that the next title takes over, and whether there is one."""
        if not text:
            raise ValueError(f"{key}: must not be empty, titles need a separator")
        spaced = text.endswith(" ") and text != " "
        return self.literal(text.removesuffix(" ") if spaced else text), spaced

    def begin(self, text: str, needed: bool) -> list[int]:
        """The first literal, after BOS if the tokenizer adds it. If ``needed``, an empty text gives BOS or EOS."""
        literal, bos = self.literal(text), self._tokenizer.bos_token_id
        if bos is not None and literal[:1] != [bos] and self._tokenizer("a")["input_ids"][:1] == [bos]:
            return [bos, *literal]
        if needed and not literal:
            return self.end() if bos is None else [bos]
        return literal

    def end(self) -> list[int]:
        """EOS, which ends an answer."""
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"llm_path: the tokenizer of {self._tokenizer.name_or_path!r} has no EOS to end an answer")
        return [self._tokenizer.eos_token_id]

    def chat(self, text: str, system: str | None) -> str:
        """The text as the user's message in the tokenizer's chat template; the same text on every day.

        Raises:
            ValueError: there is no template, it refuses these messages, or is not bounded (:func:`.chat_templates.render`).
        """
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            raise ValueError(f"chat: the tokenizer of {tokenizer.name_or_path!r} has no chat template; set chat: false")
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:  # enable_thinking: the answer is a title, without reasoning before it; most templates ignore the argument
            return render(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
        except UnboundedTemplateError as error:
            raise ValueError(
                f"chat: the chat template of {tokenizer.name_or_path!r} {error}; correct its chat template, or set chat: false"
            ) from error
        except Exception as error:  # whatever a template raises
            raise ValueError(
                f"system: {system!r}: the chat template of {tokenizer.name_or_path!r} rejects it: {error}; give "
                f"{'system: ~, which leaves it out' if system else 'a text'}, or chat: false"
            ) from error


def tokenise_as_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which ``<|im_end|>``, ``</s>`` and other added tokens are plain text."""
    reserved = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if len(str(added)) > 1}
    pattern = re.compile("|".join(map(re.escape, reserved.values())) or r"(?!)", re.IGNORECASE)

    def encode(parts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(parts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def pieces(text: str) -> list[str]:
        """Cut the text after the first letter of every added token, so that no piece contains one."""
        cuts = [0]
        while found := pattern.search(text, cuts[-1]):
            cuts.append(found.start() + 1)
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]

    rows = encode(texts)
    for number, row in enumerate(rows):
        if not reserved.keys().isdisjoint(row):  # split_special_tokens ignores tokens that are added but not special
            rows[number] = list(chain.from_iterable(encode(pieces(texts[number]))))
    return rows
