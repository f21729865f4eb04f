"""From a history and candidates to token ids.

A template is plain data with slots: ``{history}`` (once), ``{candidates}`` (at most once), ``{noun}`` and ``{verb}``.
Its literal text and every title are tokenised once, apart from each other, and a prompt is a concatenation of such
lists. So a title never takes part in string replacement or in a chat template: whatever stands in it is only text.

A soft token, a vector in a token's place (A-LLMRec, arXiv 2404.11343), is a position of a :class:`Prompt` with a key: the item
behind whose title it stands, or what the caller gives for ``{user}``.

Where the separator of a slot ends in a space, its titles take that space over, because byte-level tokenizers know words
with their leading space; the text before the slot gives its own up. The answer does so where the cue ends in a space.
A label in front of a title stands between the two: it takes the separator's space over, and the title takes the label's.

The answer of the model is a title and an end. In a template that ends in ``{history}`` the next title continues the
list: each title is followed by the separator, and the separator ends the answer, too. So the score of a continuation is
exactly the distribution that :meth:`PromptBuilder.sequence` trains. In all other templates the end is EOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from recbole_llm.data.tokens import TextTokens
from recbole_llm.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\{(\w+)\}")
_SLOT = re.compile(r"\{(history|candidates|user)\}")


@dataclass(frozen=True)
class Prompt:
    """Token ids, some of them soft.

    Attributes:
        ids: token ids; 0 where a soft token stands.
        soft_slots: position -> key of the soft token there.
    """

    ids: list[int]
    soft_slots: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, answer: Sequence[int]) -> Prompt:
        """The prompt with hard tokens behind it."""
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
    """The prompts with the keys of their soft tokens replaced by their places in the returned list of keys, each once."""
    keys = sorted({key for prompt in prompts for key in prompt.soft_slots.values()})
    place = {key: row for row, key in enumerate(keys)}
    slots = ({position: place[key] for position, key in prompt.soft_slots.items()} for prompt in prompts)
    return [replace(prompt, soft_slots=own) for prompt, own in zip(prompts, slots, strict=True)], keys


def _split_soft(row: Sequence[int]) -> Prompt:
    """A row in which soft tokens are ids below zero, ``-1 - key``; no other function knows of these."""
    return Prompt([max(token, 0) for token in row], {position: -1 - token for position, token in enumerate(row) if token < 0})


@dataclass(frozen=True)
class PromptSettings(Settings):
    """How prompts are built from titles.

    Attributes:
        template: the user's text, see the module.
        system: text before it: the system message of a chat, otherwise a first line.
        history_separator, candidate_separator: what stands between two titles.
        history_label: where given, what stands before each title of the history, with its number, from 1 for the oldest
            that is shown, in place of ``{k}``.
        labels: where given, candidates are listed as ``label. title`` and the answer is a label.
        item_tokens: put a soft token, whose key is the item, behind each title of the history and of the candidates (never
            of an answer).
        chat: render system and template through the tokenizer's own chat template.
        max_history: titles of a prompt, the most recent ones.
        max_title_tokens: longer titles are cut.
        max_prompt_tokens: longest prompt, not counting its answer.
    """

    template: str
    system: str | None = None
    history_separator: str = "\n"
    candidate_separator: str = "\n"
    history_label: str = ""
    labels: tuple[str, ...] | None = None
    item_tokens: bool = False
    chat: bool = False
    max_history: int = 20
    max_title_tokens: int = 32
    max_prompt_tokens: int = 1024

    @classmethod
    def of(cls, config: Any, **changes: Any) -> PromptSettings:
        """The settings of a configuration, with ``changes``."""
        own: dict[str, Any] = {"history_label": "", "labels": None, "item_tokens": False}
        return super().of(config, **{"template": template(config, config["prompt"]), **own, **changes})

    @property
    def slots(self) -> list[str]:
        """The slots of the template, in order."""
        return _SLOT.findall(self.template)

    @property
    def shows_candidates(self) -> bool:
        """Whether prompts list the candidates."""
        return "candidates" in self.slots

    @property
    def is_continuation(self) -> bool:
        """Whether the answer continues the history: the template ends in ``{history}``, or in ``{history}{user}``."""
        return not self.chat and self.template.endswith(("{history}", "{history}{user}"))


def template(config: Any, name: str) -> str:
    """A template of ``prompts`` by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in config["prompts"]:
        raise ValueError(f"prompt: {name} is not a key of `prompts` ({', '.join(config['prompts'])})")
    return config["prompts"][name]


class PromptBuilder:
    """Builds prompts and answers as lists of token ids, with one rule of truncation.

    Titles are cut to ``max_title_tokens``; the ``max_history`` most recent items are kept; then the oldest of these go
    until the prompt fits into ``max_prompt_tokens``. Candidates and literal text are never cut.

    Args:
        tokenizer: any Hugging Face tokenizer; it is not changed.
        names: the title of each item as shown, by internal item id; entry 0 is the padding item.
        settings: see :class:`PromptSettings`.

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
        settings: PromptSettings,
        noun: str = "item",
        verb: str = "chosen",
    ) -> None:
        self.settings, labels, label = settings, settings.labels, settings.history_label
        self._text = text = TextTokens(tokenizer, names, settings.max_title_tokens)
        texts, self._slots = _split(tokenizer, _fill(settings.template, noun=noun, verb=verb), settings.system, settings.chat)
        self.is_continuation = settings.is_continuation
        self.shows_candidates, self.shows_user = settings.shows_candidates, "user" in self._slots

        separator, history_spaced = text.separator("history_separator", settings.history_separator)
        self._gap, listed_spaced = text.separator("candidate_separator", settings.candidate_separator)
        spaced = {"history": history_spaced, "candidates": listed_spaced, "user": False}
        answer_spaced = history_spaced if self.is_continuation else texts[-1].endswith(" ")
        takes_space = [*(spaced[slot] for slot in self._slots), answer_spaced]
        bare = [part.removesuffix(" ") if taken else part for part, taken in zip(texts, takes_space, strict=True)]
        self._literals = [text.begin(bare[0], needed=self.is_continuation), *map(text.literal, bare[1:])]

        end = separator if self.is_continuation else text.end()
        self.answers = [title + end for title in text.titles(answer_spaced)]
        soft = [[-1 - item] if settings.item_tokens else [] for item in range(len(names))]  # see _split_soft
        self._numbers = self._number_history(label, history_spaced)
        told = text.titles(label.endswith(" ") if label else history_spaced)
        self._history = [title + s + separator for title, s in zip(told, soft, strict=True)]
        self._surplus = 0 if self.is_continuation else len(separator)  # the separator after the last title
        self._listed = text.titles(bool(labels) or listed_spaced) if self.shows_candidates else []
        self._candidates = [title + s for title, s in zip(self._listed, soft, strict=False)]
        self._labels = [text.literal(text.spaced(f"{name}.", listed_spaced)) for name in labels or ()]
        self.label_tokens = self._answer_with(labels, answer_spaced)

    def prompt(self, history: Sequence[int], candidates: Sequence[int] | None = None, user: int | None = None) -> Prompt:
        """The prompt for item ids from old to new; ``candidates`` and ``user``, the key of a soft token, are used where the
        template shows them.

        Raises:
            ValueError: it does not fit into ``max_prompt_tokens`` even without history, or something shown is missing.
        """
        listed = self._list_candidates(candidates) if self.shows_candidates else []
        if self.shows_user and user is None:
            raise ValueError("prompt_template: it has a slot {user}, which needs the key of a soft token, and none is given")
        asking = [-1 - user] if self.shows_user and user is not None else []
        fixed = sum(map(len, self._literals)) + len(listed) + len(asking)
        if fixed > self.settings.max_prompt_tokens:
            raise ValueError(
                f"max_prompt_tokens: {self.settings.max_prompt_tokens} is too small, the prompt has {fixed} tokens without any "
                f"history, {len(listed)} of them in its candidates; raise it, or lower "
                "max_title_tokens or the number of candidates"
            )
        told = self._list_history(history, self.settings.max_prompt_tokens - fixed)
        parts = {"history": told, "candidates": listed, "user": asking}
        row = list(self._literals[0])
        for slot, literal in zip(self._slots, self._literals[1:], strict=True):
            row += parts[slot]
            row += literal
        return _split_soft(row)

    def sequence(self, history: Sequence[int]) -> Example:
        """A history as one training example, whose answer is every title with the separator that ends it.

        It is the prompt of all items but the last and the answer with the last one: at most ``max_history + 1`` titles.
        """
        if not self.is_continuation or self.shows_candidates or self.shows_user:
            raise ValueError(
                "train_mode: 'sequence' needs a template that ends in {history}, with no other slot and without chat"
            )
        if not len(history):
            return Example(Prompt(list(self._literals[0])), [0] * len(self._literals[0]))
        row = self.prompt(history[:-1]) + self.answers[history[-1]]
        header = len(self._literals[0])
        return Example(row, [0] * header + [1] * (len(row) - header))

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
        for number, item in zip(self._numbers, islice(reversed(history), self.settings.max_history), strict=False):
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
        texts = [label.removesuffix(" ").replace("{k}", str(place)) for place in range(1, self.settings.max_history + 1)]
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
