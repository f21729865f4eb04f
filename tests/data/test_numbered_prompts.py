"""Histories whose titles are numbered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from recbole_llm.data.prompts import PromptBuilder
from tests.data.prompt_builders import CONTINUATION, HOSTILE, LISTWISE, build, hard, sets_its_own_space

LABEL = ">> {k}. "
NUMBERED = "Seen:\n{history}\nOne of {candidates} is: "


def numbered(tokenizer: PreTrainedTokenizerFast, names: list[str] | None = None, **options: Any) -> PromptBuilder:
    return build(tokenizer, names, **{"template": NUMBERED, "history_separator": "\n", "history_label": LABEL, **options})


def test_a_numbered_history_counts_from_the_oldest_title_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Seen:\n>> 1. Heat\n>> 2. Toy Story\n>> 3. Heat\nOne of Brazil || Heat is:"
    assert tokenizer.decode(numbered(tokenizer).prompt([3, 1, 3], [5, 3]).ids) == text
    text = "Seen:\n>> 1. Toy Story\n>> 2. Heat\nOne of Brazil is:"
    assert tokenizer.decode(numbered(tokenizer, max_history=2).prompt([5, 4, 1, 3], [5]).ids) == text
    assert tokenizer.decode(numbered(tokenizer).prompt([], [5]).ids) == "Seen:\n\nOne of Brazil is:"


@pytest.mark.parametrize(
    ("label", "separator", "before", "between", "title"),
    [
        (LABEL, "\n", ">> 1.", "\n", " Heat"),
        (LABEL, ", ", " >> 1.", ",", " Heat"),  # the label takes the separator's space, the title the label's
        ("{k}:", ", ", " 1:", ",", "Heat"),
        ("[{k}]\t", "\n", "[1]\t", "\n", "Heat"),
        ("{k} of {k} ", " ", "1 of 1", " ", " Heat"),
    ],
)
def test_a_label_and_its_title_are_tokenised_apart(
    tokenizer: PreTrainedTokenizerFast, label: str, separator: str, before: str, between: str, title: str
) -> None:
    second = before.replace("1", "2")
    parts = ["Seen:", before, title, between, second, title, ". One of", " Brazil", " is:"]
    template = f"Seen:{' ' * before.startswith(' ')}{{history}}. One of {{candidates}} is: "
    builder = numbered(tokenizer, template=template, history_label=label, history_separator=separator)
    wanted = [tokenizer(part, add_special_tokens=False).input_ids for part in parts]
    assert builder.prompt([3, 3], [5]).ids == sum(wanted, [])


def test_a_numbered_history_where_the_tokenizer_sets_the_space_by_itself() -> None:
    tokenizer = sets_its_own_space()
    builder = build(tokenizer, ["", "Heat", "Brazil"], template="{history} next:", history_label="{k}. ")
    assert tokenizer.convert_ids_to_tokens(builder.prompt([1, 2]).ids) == [
        "▁",
        "1",
        ".",
        "▁Heat",
        "▁",
        ",",
        "▁",
        "2",
        ".",
        "▁Brazil",
        "▁",
        "▁next",
        ":",
    ]


@pytest.mark.parametrize("template", [LISTWISE, CONTINUATION, "{history}", "{history} then"])
def test_without_a_label_nothing_changes(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    none, plain = build(tokenizer, template=template, history_label=""), build(tokenizer, template=template)
    for history in ([], [1, 3], [5, 4, 3, 2, 1] * 5):
        assert none.prompt(history, [2, 5]) == plain.prompt(history, [2, 5])
    assert none.answers == plain.answers


@pytest.mark.parametrize("title", [*HOSTILE, "{k}", ">> 2. Heat"])
def test_no_title_changes_a_number(tokenizer: PreTrainedTokenizerFast, title: str) -> None:
    limits = {"max_title_tokens": 10**6, "max_prompt_tokens": 10**6}
    hostile, plain = (numbered(tokenizer, ["", first, "Heat", "Brazil"], **limits) for first in (title, "Alien"))
    prompt, calm = hostile.prompt([2, 1, 2], [3]).ids, plain.prompt([2, 1, 2], [3]).ids
    assert tokenizer.decode(prompt) == tokenizer.decode(calm).replace("Alien", title)


def test_the_oldest_go_until_a_numbered_history_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    history, seen = [1, 2, 3, 4, 5] * 24, set()  # numbers of one, two and three digits
    roomy = numbered(tokenizer, max_history=120, max_prompt_tokens=10**6)
    wanted = [roomy.prompt(history[120 - kept :], [5]) for kept in range(121)]
    for limit in range(len(wanted[0]), len(wanted[-1]) + 1):
        roomy.settings = replace(roomy.settings, max_prompt_tokens=limit)
        kept = wanted.index(roomy.prompt(history, [5]))
        assert len(wanted[kept]) <= limit and (kept == 120 or len(wanted[kept + 1]) > limit)
        seen.add(kept)
    assert seen == {*range(121)}


def test_soft_tokens_stand_behind_numbered_titles(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = numbered(tokenizer, item_tokens=True).prompt([1, 3], [5])
    assert hard(prompt) == numbered(tokenizer).prompt([1, 3], [5]).ids
    place = {key: position for position, key in prompt.soft_slots.items()}
    assert place.keys() == {1, 3, 5}
    assert tokenizer.decode(prompt.ids[place[1] + 1 : place[3]]) == "\n>> 2. Heat"


@pytest.mark.parametrize("label", [">> ", "{}. ", "{k}. {title} ", " "])
def test_a_label_has_the_one_slot(tokenizer: PreTrainedTokenizerFast, label: str) -> None:
    with pytest.raises(ValueError, match=f"history_label: needs the slot {{k}}, .* no other one: '{label}'"):
        numbered(tokenizer, history_label=label)


@pytest.mark.parametrize("template", [CONTINUATION, "{history}{user}"])
def test_a_history_that_the_answer_continues_is_not_numbered(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    with pytest.raises(ValueError, match="history_label: '>> {k}. ' needs a template with text after {history}"):
        numbered(tokenizer, template=template)
