"""From a history and candidates to token ids.

A template has slots: ``{history}`` (once), ``{candidates}`` and ``{user}`` (at most once), and the words ``{noun}``, ``{verb}``,
``{verb_base}`` and ``{top_k}``. Its text and the titles are tokenised separately, so no title takes part in string replacement
or in a chat template.

A soft token, a vector in place of a token (A-LLMRec, arXiv 2404.11343), is a position of a :class:`Prompt` with a key: the item
whose title it follows, or the key that the caller gives for ``{user}``.

Byte-level tokenizers join a word with its leading space. So if a separator ends in a space, the next title or label takes that
space over, and so does the answer if the text before it ends in a space.

An answer is a title and an end. If the template ends in ``{history}``, the answer continues the list of titles and ends with the
separator: its score is the distribution that :meth:`PromptBuilder.sequence` trains. In all other templates the end is EOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, NamedTuple

from recbole_llm.data.templates import WORD, PromptSettings, split
from recbole_llm.data.tokens import TextTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LongListError(ValueError):
    """A prompt cannot list its candidates; ``fault`` is the message without the remedy."""

    def __init__(self, fault: str, remedy: str):
        self.fault = fault
        super().__init__(f"{fault}; {remedy}")


@dataclass(frozen=True)
class Prompt:
    """Token ids, some of them soft.

    Attributes:
        ids: token ids; 0 at the position of a soft token.
        soft_slots: position -> key of the soft token there.
    """

    ids: list[int]
    soft_slots: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, answer: Sequence[int]) -> Prompt:
        return replace(self, ids=[*self.ids, *answer])

    def surrounded(self, before: Sequence[int], after: Sequence[int]) -> Prompt:
        """The prompt with more soft tokens, by key, before and after it."""
        slots = {len(before) + position: key for position, key in self.soft_slots.items()}
        slots |= dict(enumerate(before)) | dict(enumerate(after, start=len(before) + len(self)))
        return Prompt([*(0 for _ in before), *self.ids, *(0 for _ in after)], slots)


class Example(NamedTuple):
    """A training example: a prompt with its answer, and 1 for each token of the answer, 0 for all others."""

    row: Prompt
    mask: list[int]

    @classmethod
    def of(cls, prompt: Prompt, answer: Sequence[int]) -> Example:
        """The example in which ``answer`` follows ``prompt``."""
        return cls(prompt + answer, [0] * len(prompt) + [1] * len(answer))


def number_soft_tokens(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """The distinct keys of all soft tokens, and the prompts with each key replaced by its index among them."""
    keys = sorted({key for prompt in prompts for key in prompt.soft_slots.values()})
    place = {key: row for row, key in enumerate(keys)}
    slots = ({position: place[key] for position, key in prompt.soft_slots.items()} for prompt in prompts)
    return [replace(prompt, soft_slots=own) for prompt, own in zip(prompts, slots, strict=True)], keys


def _split_soft(row: Sequence[int]) -> Prompt:
    """A row whose soft tokens are encoded as ``-1 - key``, as a prompt."""
    return Prompt([max(token, 0) for token in row], {position: -1 - token for position, token in enumerate(row) if token < 0})


class PromptBuilder:
    """Builds prompts and answers as lists of token ids, with one rule of truncation.

    Titles are cut to ``max_title_tokens``. A prompt has the ``max_history`` most recent items, less the oldest ones that do not
    fit into ``max_prompt_tokens``. Candidates and literal text are never cut.

    Args:
        tokenizer: any Hugging Face tokenizer; it is not changed.
        names: the title of each item as shown, by internal item id; entry 0 is the padding item.
        noun, verb, verb_base: the words in place of ``{noun}``, ``{verb}`` and ``{verb_base}``.

    Attributes:
        answers: item id -> tokens of its title and the end.
        end: tokens of the end of an answer.
        gap: tokens between two candidates, and between two titles of :meth:`ranking`.
        label_tokens: the one token of each label.
        shows_candidates, shows_user: the template has a slot for candidates, or for the user's soft token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        *,
        settings: PromptSettings,
        noun: str = "item",
        verb: str = "chosen",
        verb_base: str = "choose",
    ) -> None:
        self.settings, labels, label = settings, settings.labels, settings.history_label
        self._text = text = TextTokens(tokenizer, names, settings.max_title_tokens, settings.title_quote)
        texts, self._slots = split(text, settings, {"noun": noun, "verb": verb, "verb_base": verb_base})
        self.is_continuation = settings.is_continuation
        self.shows_candidates, self.shows_user = settings.shows_candidates, "user" in self._slots

        separator, history_spaced = text.separator("history_separator", settings.history_separator)
        self.gap, listed_spaced = text.separator("candidate_separator", settings.candidate_separator)
        spaced = {"history": history_spaced, "candidates": listed_spaced, "user": False}
        answer_spaced = history_spaced if self.is_continuation else texts[-1].endswith(" ")
        takes_space = [*(spaced[slot] for slot in self._slots), answer_spaced]
        bare = [part.removesuffix(" ") if taken else part for part, taken in zip(texts, takes_space, strict=True)]
        first = int(settings.user_before_bos)  # of the literals, the one that begins with BOS
        self._literals = [text.literal(part) for part in bare]
        self._literals[first] = text.begin(bare[first], needed=self.is_continuation)

        self.end = separator if self.is_continuation else text.end()
        self.answers = [title + self.end for title in text.titles(answer_spaced)]
        soft = [[-1 - item] if settings.item_tokens else [] for item in range(len(names))]  # see _split_soft
        self._numbers = self._number_history(label, history_spaced)
        titles = text.titles(label.endswith(" ") if label else history_spaced)
        self._history = [title + s + separator for title, s in zip(titles, soft, strict=True)]
        self._surplus = 0 if self.is_continuation else len(separator)  # the separator after the last title
        self._labels, labelled_spaced = self._label_candidates(labels or (), listed_spaced)
        self._listed = text.titles(labelled_spaced) if self.shows_candidates else []
        self._candidates = [title + s for title, s in zip(self._listed, soft, strict=False)]
        self.label_tokens = self._answer_with(labels, answer_spaced) if labels else []

    def prompt(self, history: Sequence[int], candidates: Sequence[int] | None = None, user: int | None = None) -> Prompt:
        """The prompt for item ids from old to new.

        ``candidates`` and ``user``, the key of a soft token, are ignored if the template has no slot for them.

        Raises:
            LongListError: it does not fit into ``max_prompt_tokens`` even without history, or there are more candidates than
                labels.
            ValueError: the value of a slot is missing.
        """
        parts = {"candidates": self._list_candidates(candidates) if self.shows_candidates else []}
        if self.shows_user:
            if user is None:
                raise ValueError("prompts: the slot {user} needs the key of a soft token, and none is given")
            parts["user"] = [-1 - user]
        fixed = sum(map(len, chain(self._literals, parts.values())))
        if fixed > self.settings.max_prompt_tokens:
            raise LongListError(
                f"max_prompt_tokens: {self.settings.max_prompt_tokens} is too small, the prompt has {fixed} tokens without "
                f"history, {len(parts['candidates'])} of them in its candidates",
                "raise it, or lower max_title_tokens or the number of candidates",
            )
        parts["history"] = self._list_history(history, self.settings.max_prompt_tokens - fixed)
        row = list(self._literals[0])
        for slot, literal in zip(self._slots, self._literals[1:], strict=True):
            row += parts[slot]
            row += literal
        return _split_soft(row)

    def longest(self, candidates: int = 1, titles: int = 1) -> int:
        """A number of tokens that no prompt with its answer exceeds.

        Args:
            candidates: in a prompt. titles: in an answer.
        """
        numbers = [len(number) for number, _ in zip(self._numbers, range(self.settings.max_history), strict=False)]
        fixed = sum(map(len, self._literals)) + self.shows_user
        listed = max(map(len, self._candidates), default=0) + len(self.gap) + max(map(len, self._labels), default=0)
        shown = candidates * listed if self.shows_candidates else 0
        row = fixed + sum(numbers) + len(numbers) * max(map(len, self._history)) + shown
        answer = titles * (max(map(len, self.answers)) + len(self.gap))
        return min(row, self.settings.max_prompt_tokens) + answer

    def decoded(self, titles: int) -> int:
        """A number of tokens that no decoded answer with so many titles exceeds: more than any title of the catalogue has."""
        return titles * (self.settings.max_title_tokens + len(self.gap) + 1)

    def sequence(self, history: Sequence[int]) -> Example:
        """A history as one training example, whose answer is every title with the separator that ends it.

        It is the prompt of all items but the last and the answer with the last one: at most ``max_history + 1`` titles.
        """
        if not self.is_continuation or self.shows_candidates or self.shows_user:
            raise ValueError("lora_train_mode: sequence needs a template that ends in {history}, with no other slot and no chat")
        row = self.prompt(history[:-1]) + (self.answers[history[-1]] if len(history) else [])
        header = len(self._literals[0])
        return Example(row, [0] * header + [1] * (len(row) - header))

    def ranking(self, items: Sequence[int]) -> list[int]:
        """An answer of several titles, best first, separated as the candidates are; for one item, its answer.

        Raises:
            ValueError: the template has no ``{candidates}``, or the answer is a label or a continuation.
        """
        if not self.shows_candidates or self.is_continuation or self._labels:
            raise ValueError("top_k_target: a ranking needs {candidates} in the template, a cue, and no labels")
        row = self.answers[items[0]][:-1]
        for item in items[1:]:
            row += self.gap + self._listed[item]
        return row + self._text.end()

    def first_of_ranking(self, item: int) -> list[int]:
        """The best title of a :meth:`ranking` of several titles, and the separator after it."""
        return self.answers[item][:-1] + self.gap

    def _list_history(self, history: Sequence[int], room: int) -> list[int]:
        kept: list[list[int]] = []
        room += self._surplus
        # n titles have the numbers 1 to n: one more title costs the tokens of the next number
        for number, item in zip(self._numbers, islice(reversed(history), self.settings.max_history), strict=False):
            room -= len(number) + len(self._history[item])
            if room < 0:
                break
            kept.append(self._history[item])
        row = [token for parts in zip(self._numbers, reversed(kept), strict=False) for token in chain(*parts)]
        return row[: len(row) - self._surplus] if kept else row

    def _number_history(self, label: str, spaced: bool) -> Iterable[list[int]]:
        """Tokens before the first title of the history, the second, and so on."""
        if not label:
            return repeat([])
        if {*WORD.findall(label)} != {"k"}:
            raise ValueError(f"history_label: needs the slot {{k}}, the number of a title, and no other one: {label!r}")
        if self.is_continuation:
            raise ValueError(f"history_label: {label!r} needs a template with text after {{history}}, the answer has no number")
        label = label.removesuffix(" ")
        return [self._text.literal(label.replace("{k}", str(k)), spaced) for k in range(1, self.settings.max_history + 1)]

    def _label_candidates(self, labels: Sequence[str], spaced: bool) -> tuple[list[list[int]], bool]:
        """Tokens before each candidate, and whether the title takes over a space."""
        label = self.settings.candidate_label
        if not labels:
            return [], spaced
        if {*WORD.findall(label)} != {"label"}:
            raise ValueError(f"candidate_label: needs the slot {{label}} and no other one: {label!r}")
        before = [label.replace("{label}", name).removesuffix(" ") for name in labels]
        return [self._text.literal(text, spaced) for text in before], label.endswith(" ")

    def _list_candidates(self, candidates: Sequence[int] | None) -> list[int]:
        if candidates is None or not len(candidates):
            raise ValueError("prompts: the template has a slot for candidates, and none are given")
        if self._labels and len(candidates) > len(self._labels):
            fault = f"scorer: {len(candidates)} candidates are more than the {len(self._labels)} labels"
            raise LongListError(fault, "lower the number of candidates")
        shown = [label + self._candidates[item] for label, item in zip(self._labels or repeat([]), candidates, strict=False)]
        return [*shown[0], *chain.from_iterable(self.gap + row for row in shown[1:])]

    def _answer_with(self, labels: Sequence[str], spaced: bool) -> list[int]:
        if not self.shows_candidates or self.is_continuation:
            raise ValueError("scorer: labels need a template with {candidates} and a cue after {history}")
        tokens = [self._text.literal(label, spaced) for label in labels]
        bad = [label for label, ids in zip(labels, tokens, strict=True) if len(ids) != 1 or tokens.count(ids) > 1]
        if bad:
            raise ValueError(
                f"scorer: each label must be a single, distinct token, but for this tokenizer {bad} are not; choose other "
                "labels, or a scorer that reads whole titles (tree, prefix, naive)"
            )
        return [ids[0] for ids in tokens]
