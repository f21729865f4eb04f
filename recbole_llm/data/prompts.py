"""From a history and candidates to token ids.

A template is plain data with slots: ``{history}`` (once), ``{candidates}`` (at most once), ``{noun}`` and ``{verb}``.
Its literal text and every title are tokenised once, apart from each other, and a prompt is a concatenation of such
lists. So a title never takes part in string replacement or in a chat template: whatever stands in it is only text.

A soft token, a vector that a model puts in a token's place (A-LLMRec, arXiv 2404.11343), stands in a prompt as an id below
zero, which no tokenizer gives: ``item_token(i)`` behind a title of item i, and in ``{user}`` whatever id the caller gives.

Where the separator of a slot ends in a space, its titles take that space over, because byte-level tokenizers know words
with their leading space; the text before the slot gives its own up. The answer does so where the cue ends in a space.
A label in front of a title stands between the two: it takes the separator's space over, and the title takes the label's.

The answer of the model is a title and an end. In a template that ends in ``{history}`` the next title continues the
list: each title is followed by the separator, and the separator ends the answer, too. So the score of a continuation is
exactly the distribution that :meth:`PromptBuilder.sequence` trains. In all other templates the end is EOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice, repeat
from logging import getLogger
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = getLogger()

_WORD = re.compile(r"\{(\w+)\}")
_SLOT = re.compile(r"\{(history|candidates|user)\}")


def item_token(item: int) -> int:
    """The id below zero that stands for the soft token of an item."""
    return -1 - item


class PromptBuilder:
    """Builds prompts and answers as lists of token ids, with one rule of truncation.

    Titles are cut to ``max_title_tokens``; the ``max_history`` most recent items are kept; then the oldest of these go
    until the prompt fits into ``max_prompt_tokens``. Candidates and literal text are never cut.

    Args:
        tokenizer: any Hugging Face tokenizer; it is not changed.
        names: the title of each item as shown, by internal item id; entry 0 is the padding item.
        template: the user's text, see the module.
        system: text before it: the system message of a chat, otherwise a first line.
        history_separator, candidate_separator: what stands between two titles.
        history_label: where given, what stands before each title of the history, with its number, from 1 for the oldest
            that is kept, in place of ``{k}``.
        labels: where given, candidates are listed as ``label. title`` and the answer is a label.
        item_tokens: put ``item_token(i)`` behind each title of the history and of the candidates (never of an answer).
        chat: render system and template through the tokenizer's own chat template.
        max_prompt_tokens: longest prompt, not counting its answer.

    Attributes:
        answers: item id -> tokens of its title and the end.
        label_tokens: the one token that answers with each label.
        is_continuation: the template ends in ``{history}``, or in ``{history}{user}``.
        shows_candidates, shows_user: the template has a slot for candidates, or for the user's soft token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        *,
        template: str,
        system: str | None = None,
        noun: str = "item",
        verb: str = "chosen",
        history_separator: str = "\n",
        candidate_separator: str = "\n",
        history_label: str = "",
        labels: Sequence[str] | None = None,
        item_tokens: bool = False,
        chat: bool = False,
        max_history: int = 20,
        max_title_tokens: int = 32,
        max_prompt_tokens: int = 1024,
    ) -> None:
        self.max_history, self.max_prompt_tokens = max_history, max_prompt_tokens
        self._text = text = _Text(tokenizer, names, max_title_tokens)
        texts, self._slots = _split(tokenizer, _fill(template, noun=noun, verb=verb), system, chat)
        closing = self._slots[-2:] == ["history", "user"] and not any(texts[-2:])  # the user's token ends the list
        self.is_continuation = closing or (self._slots[-1] == "history" and not texts[-1])
        self.shows_candidates, self.shows_user = "candidates" in self._slots, "user" in self._slots

        separator, history_spaced = text.separator("history_separator", history_separator)
        self._gap, listed_spaced = text.separator("candidate_separator", candidate_separator)
        spaced = {"history": history_spaced, "candidates": listed_spaced, "user": False}
        answer_spaced = history_spaced if self.is_continuation else texts[-1].endswith(" ")
        takes_space = [*(spaced[slot] for slot in self._slots), answer_spaced]
        bare = [part.removesuffix(" ") if taken else part for part, taken in zip(texts, takes_space, strict=True)]
        self._literals = [text.begin(bare[0], needed=self.is_continuation), *map(text.literal, bare[1:])]

        end = separator if self.is_continuation else text.end()
        self.answers = [title + end for title in text.titles(answer_spaced)]
        soft = [[item_token(item)] if item_tokens else [] for item in range(len(names))]
        self._numbers = self._number_history(history_label, history_spaced)
        told = text.titles(history_label.endswith(" ") if history_label else history_spaced)
        self._history = [title + s + separator for title, s in zip(told, soft, strict=True)]
        self._surplus = 0 if self.is_continuation else len(separator)  # the separator after the last title
        self._listed = text.titles(bool(labels) or listed_spaced) if self.shows_candidates else []
        self._candidates = [title + s for title, s in zip(self._listed, soft, strict=False)]
        self._labels = [text.literal(text.spaced(f"{label}.", listed_spaced)) for label in labels or ()]
        self.label_tokens = self._answer_with(labels, answer_spaced)

    def prompt(self, history: Sequence[int], candidates: Sequence[int] | None = None, user: int | None = None) -> list[int]:
        """Token ids of the prompt for item ids from old to new; ``candidates`` and ``user``, a soft token's id below
        zero, are used where the template shows them.

        Raises:
            ValueError: it does not fit into ``max_prompt_tokens`` even without history, or something shown is missing.
        """
        listed = self._list_candidates(candidates) if self.shows_candidates else []
        if self.shows_user and (user is None or user >= 0):
            raise ValueError(f"prompt_template: it has a slot {{user}}, which needs a soft token's id below zero, not {user}")
        asking = [user] if self.shows_user and user is not None else []
        fixed = sum(map(len, self._literals)) + len(listed) + len(asking)
        if fixed > self.max_prompt_tokens:
            raise ValueError(
                f"max_prompt_tokens: {self.max_prompt_tokens} is too small, the prompt has {fixed} tokens without any "
                f"history, {len(listed)} of them in its candidates; raise it, or lower "
                "max_title_tokens or the number of candidates"
            )
        told = self._list_history(history, self.max_prompt_tokens - fixed)
        parts = {"history": told, "candidates": listed, "user": asking}
        row = list(self._literals[0])
        for slot, literal in zip(self._slots, self._literals[1:], strict=True):
            row += parts[slot]
            row += literal
        return row

    def sequence(self, history: Sequence[int]) -> tuple[list[int], list[int]]:
        """A history as one training row: token ids, and 1 for every token of a title or of the separator that ends it.

        It is the prompt of all items but the last and the answer with the last one: at most ``max_history + 1`` titles.
        """
        if not self.is_continuation or self.shows_candidates or self.shows_user:
            raise ValueError(
                "train_mode: 'sequence' needs a template that ends in {history}, with no other slot and without chat"
            )
        if not len(history):
            return list(self._literals[0]), [0] * len(self._literals[0])
        row = self.prompt(history[:-1]) + self.answers[history[-1]]
        header = len(self._literals[0])
        return row, [0] * header + [1] * (len(row) - header)

    def ranking(self, items: Sequence[int]) -> list[int]:
        """An answer of several titles, best first, listed as the candidates are; of one item it is its answer.

        Raises:
            ValueError: the template has no ``{candidates}``, or they are answered by label or by continuation.
        """
        if not self.shows_candidates or self.is_continuation or self._labels:
            raise ValueError("top_k_target: a ranking needs {candidates} in the template, a cue, and no labels")
        best, *rest = items
        row = self.answers[best][:-1]
        for item in rest:
            row += self._gap
            row += self._listed[item]
        return row + self.answers[best][-1:]

    def first_of_ranking(self, item: int) -> list[int]:
        """How a :meth:`ranking` of several titles begins: its best title and the separator, where an answer would end."""
        return self.answers[item][:-1] + self._gap

    def _list_history(self, history: Sequence[int], room: int) -> list[int]:
        kept: list[list[int]] = []
        room += self._surplus
        # of n titles the numbers are 1 to n, whichever they are: one title more costs the tokens of the next number
        for number, item in zip(self._numbers, islice(reversed(history), self.max_history), strict=False):
            room -= len(number) + len(self._history[item])
            if room < 0:
                break
            kept.append(self._history[item])
        row = [token for parts in zip(self._numbers, reversed(kept), strict=False) for token in chain(*parts)]
        return row[: len(row) - self._surplus] if kept else row

    def _number_history(self, label: str, spaced: bool) -> Iterable[list[int]]:
        """What stands before the first title of the history, the second, and so on; nothing where there is no label."""
        if not label:
            return repeat([])
        if {*_WORD.findall(label)} != {"k"}:
            raise ValueError(f"history_label: a title's number stands in place of {{k}}, the one slot there is: {label!r}")
        if self.is_continuation:
            raise ValueError(
                f"history_label: the answer continues the history and would lack its number after {label!r}; let the "
                "template go on behind {history}, or leave the label out"
            )
        texts = [label.removesuffix(" ").replace("{k}", str(place)) for place in range(1, self.max_history + 1)]
        return [self._text.literal(self._text.spaced(text, spaced)) for text in texts]

    def _list_candidates(self, candidates: Sequence[int] | None) -> list[int]:
        if candidates is None or not len(candidates):
            raise ValueError("prompt_candidates: the template has a slot for candidates, and none are given")
        if self._labels and len(candidates) > len(self._labels):
            raise ValueError(f"scorer: {len(candidates)} candidates are more than the {len(self._labels)} labels")
        row: list[int] = []
        for place, item in enumerate(candidates):
            row += self._gap if place else ()
            row += self._labels[place] if self._labels else ()
            row += self._candidates[item]
        return row

    def _answer_with(self, labels: Sequence[str] | None, spaced: bool) -> list[int]:
        if not labels:
            return []
        if not self.shows_candidates or self.is_continuation:
            raise ValueError("scorer: labels need a template with {candidates} and a cue after {history}")
        tokens = [self._text.literal(self._text.spaced(label, spaced)) for label in labels]
        bad = [label for label, ids in zip(labels, tokens, strict=True) if len(ids) != 1 or tokens.count(ids) > 1]
        if bad:
            raise ValueError(
                f"scorer: each label must be one token of its own, but for this tokenizer {bad} are not; choose other "
                "labels, or a scorer that reads whole titles (tree, prefix, naive)"
            )
        return [ids[0] for ids in tokens]


class _Text:
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


def _fill(template: str, **words: str) -> str:
    unknown = {found[1] for found in _WORD.finditer(template)} - {*words, "history", "candidates", "user"}
    if unknown:
        raise ValueError(
            f"prompt_template: unknown slots {sorted(unknown)}; known: history, candidates, user, noun, verb: {template!r}"
        )
    return _WORD.sub(lambda found: words.get(found[1], found[0]), template)


def _split(tokenizer: PreTrainedTokenizerBase, template: str, system: str | None, chat: bool) -> tuple[list[str], list[str]]:
    """The literal texts around the slots, and the slots."""
    text = _render_chat(tokenizer, template, system) if chat else "\n".join(filter(None, (system, template)))
    parts = _SLOT.split(text)
    slots = parts[1::2]
    if slots.count("history") != 1 or slots.count("candidates") > 1 or slots.count("user") > 1:
        raise ValueError(
            f"prompt_template: {{history}} must stand in it once, {{candidates}} and {{user}} at most once: {template!r}"
        )
    return parts[::2], slots


def _render_chat(tokenizer: PreTrainedTokenizerBase, template: str, system: str | None) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f"chat: the tokenizer of {tokenizer.name_or_path!r} has no chat template; set chat: false")
    messages = [{"role": "user", "content": template}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:  # enable_thinking: the answer is a title, with no thoughts before it; most templates do not read it
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False))
    except TemplateError as error:
        raise ValueError(f"system: the chat template of {tokenizer.name_or_path!r} refuses it: {error}") from error
