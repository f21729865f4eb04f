"""Prompt templates and the settings of prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.data.tokens import TextTokens
from recbole_llm.settings import Settings

WORD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptSettings(Settings):
    """How prompts are built from titles.

    Attributes:
        template: the user's text, see the module.
        system: text before it: the system message of a chat, otherwise a first line.
        history_separator, candidate_separator: text between two titles.
        history_label: text before each title of the history, with ``{k}`` for its number: 1 for the oldest title shown.
        candidate_label: text before each candidate if there are ``labels``, with ``{label}`` for its label.
        labels: list candidates with these labels and answer with a label.
        title_quote: text on both sides of each title, in answers too; a soft token follows it.
        user_before_bos: the soft token of ``{user}``, which begins the template, comes before BOS.
        item_tokens: add a soft token, whose key is the item, after each title of the history and the candidates.
        chat: render system and template through the tokenizer's chat template.
        max_history: largest number of titles, the most recent ones; of a run, at most MAX_ITEM_LIST_LENGTH.
        max_title_tokens: longer titles are cut.
        max_prompt_tokens: longest prompt, not counting its answer.
    """

    template: str
    system: str | None = None
    history_separator: str = "\n"
    candidate_separator: str = "\n"
    history_label: str = ""
    candidate_label: str = "{label}. "
    labels: tuple[str, ...] | None = None
    title_quote: str = ""
    user_before_bos: bool = False
    item_tokens: bool = False
    chat: bool = False
    max_history: int = 20
    max_title_tokens: int = 32
    max_prompt_tokens: int = 1024

    @classmethod
    def of(cls, config: Any, **changes: Any) -> PromptSettings:
        """The settings of a configuration, with ``changes``."""
        own = {"template": template(config, config["prompt"]), "labels": None, "user_before_bos": False, "item_tokens": False}
        # the test reads RecBole's rows, which have no more; training and early stopping would
        own |= {"max_history": min(config["max_history"], config["MAX_ITEM_LIST_LENGTH"])}
        return super().of(config, **own | changes)

    @property
    def shows_candidates(self) -> bool:
        """Whether prompts list the candidates."""
        return "{candidates}" in self.template

    @property
    def is_continuation(self) -> bool:
        """Whether the answer continues the history: the template ends in ``{history}``, or in ``{history}{user}``."""
        return not self.chat and self.template.endswith(("{history}", "{history}{user}"))

    def __post_init__(self) -> None:
        if self.user_before_bos and (self.chat or not self.template.startswith("{user}")):
            raise ValueError(f"user_before_bos: needs a template that begins with {{user}}, without chat: {self.template!r}")


def template(config: Any, name: str) -> str:
    """A template of ``prompts`` by name, with ``top_k_target`` for ``{top_k}``; raises a ValueError for an unknown name."""
    if name not in config["prompts"]:
        raise ValueError(f"prompt: {name} is not a key of `prompts` ({', '.join(config['prompts'])})")
    return config["prompts"][name].replace("{top_k}", str(config["top_k_target"]))


def split(
    tokens: TextTokens,
    settings: PromptSettings,
    words: Mapping[str, str],
    needed: Sequence[str] = ("history",),
    optional: Sequence[str] = ("candidates", "user"),
) -> tuple[list[str], list[str]]:
    """The literal texts around the slots, and the slots.

    Raises:
        ValueError: a slot is unknown, missing or given twice.
    """
    given, known = settings.template, [*words, *needed, *optional]
    unknown = {*WORD.findall(given)}.difference(known)
    if unknown:
        raise ValueError(f"prompts: unknown slots {sorted(unknown)}; use {', '.join(known)}: {given!r}")
    text = WORD.sub(lambda found: words.get(found[1], found[0]), given)
    text = tokens.chat(text, settings.system) if settings.chat else "\n".join(filter(None, (settings.system, text)))
    parts = re.split(rf"\{{({'|'.join([*needed, *optional])})\}}", text)
    slots = parts[1::2]
    if any(slots.count(slot) != 1 for slot in needed) or any(slots.count(slot) > 1 for slot in optional):
        once, rarely = (" and ".join(f"{{{slot}}}" for slot in some) for some in (needed, optional))
        also = f", {rarely} at most once" if rarely else ""
        raise ValueError(f"prompts: a template needs {once} once{also}: {given!r}")
    return parts[::2], slots
