"""TALLRec's question (arXiv 2305.00447): does a user, who likes and dislikes these items, like that one? Yes or No."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.data.templates import PromptSettings, split
from recbole_llm.data.tokens import TextTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

YES, NO = "Yes.", "No."
SLOTS = ("liked", "disliked", "target")


class YesNoPrompts:
    """Builds questions and answers from a template with the slots ``{liked}``, ``{disliked}`` and, after them, ``{target}``.

    The ``max_history`` most recent items are shown, liked and disliked ones together, less the oldest ones that do not fit.

    Args:
        tokenizer, names, settings: as those of :class:`~recbole_llm.data.prompts.PromptBuilder`.
        words: of the template, by slot.
    """

    shows_candidates, label_tokens = False, ()

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], *, settings: PromptSettings, **words: str
    ) -> None:
        self.settings = settings
        text = TextTokens(tokenizer, names, settings.max_title_tokens, settings.title_quote)
        literals, slots = split(text, settings, words, needed=SLOTS, optional=())
        if slots != [*SLOTS]:
            raise ValueError(
                f"prompts: {', '.join(f'{{{slot}}}' for slot in SLOTS)} must come in this order: {settings.template!r}"
            )
        self._separator, spaced = text.separator("history_separator", settings.history_separator)
        before, between, asking, after = literals
        # an empty list has no title to take over the blank before it
        self._blank = {slot: literal.endswith(" ") for slot, literal in zip(SLOTS, literals, strict=False)}
        self._before, self._between = (
            [text.begin(before.removesuffix(" "), needed=False), text.begin(before, needed=False)],
            [text.literal(between.removesuffix(" ")), text.literal(between)],
        )
        self._asking, self._after = text.literal(asking.removesuffix(" ")), text.literal(after)
        self._first = {slot: text.titles(blank) for slot, blank in self._blank.items()}
        self._next = text.titles(spaced)
        self.yes, self.no = (text.literal(answer, after.endswith(" ")) + text.end() for answer in (YES, NO))
        if self.yes[0] == self.no[0]:
            raise ValueError(f"tallrec_form: yes_no needs answers with different first tokens, but {YES} and {NO} begin alike")

    def prompt(self, history: Sequence[int], disliked: Collection[int]) -> Prompt:
        """The question up to its target, for item ids from old to new."""
        recent = list(history[-self.settings.max_history :]) if self.settings.max_history else []
        for start in range(len(recent) + 1):
            shown = recent[start:]
            row = [
                *self._list("liked", [item for item in shown if item not in disliked], self._before),
                *self._list("disliked", [item for item in shown if item in disliked], self._between),
                *self._asking,
            ]
            if len(row) <= self.settings.max_prompt_tokens:
                return Prompt(row)
        raise ValueError(
            f"max_prompt_tokens: {self.settings.max_prompt_tokens} is too small, a question has {len(row)} tokens without history"
        )

    def longest(self, candidates: int = 1, titles: int = 1) -> int:
        """A number of tokens that no question with its target and answer exceeds; it does not depend on the arguments."""
        fixed = sum(max(map(len, literal)) for literal in (self._before, self._between)) + len(self._asking)
        title = max(map(len, [*self._next, *self._first["liked"], *self._first["disliked"]]))
        row = min(fixed + self.settings.max_history * (title + len(self._separator)), self.settings.max_prompt_tokens)
        target = max(map(len, self._first["target"])) + len(self._after)
        return row + target + max(len(self.yes), len(self.no))

    def target(self, item: int) -> list[int]:
        """The target and what follows it up to the answer."""
        return self._first["target"][item] + self._after

    def example(
        self, history: Sequence[int], disliked: Collection[int], item: int, likes: bool, *, train_on_inputs: bool
    ) -> Example:
        """A training example; ``train_on_inputs`` trains on all of its tokens but the first, not on the answer alone."""
        question = self.prompt(history, disliked) + self.target(item)
        example = Example.of(question, self.yes if likes else self.no)
        return example._replace(mask=[0] + [1] * (len(example.row) - 1)) if train_on_inputs else example

    def _list(self, slot: str, items: Sequence[int], literal: Sequence[list[int]]) -> list[int]:
        if not items:
            return literal[1]
        row = literal[0] + self._first[slot][items[0]]
        for item in items[1:]:
            row = row + self._separator + self._next[item]
        return row
