"""Texts of prompts: rendered and tokenised again they are the ids of training, or the line says that they are not."""

import json
from typing import Any

import pytest

from recbole_llm.data.conversations import Conversations, description
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.data.templates import PromptSettings
from tests.conftest import CHATML, write_lm

NAMES = ["", "The red river", "The blue house (1980)", "naïve 東京 🎬", "new song"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte-level BPE with a chat template whose end of turn is EOS."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(write_lm(tmp_path_factory.mktemp("lm") / "tiny"))
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    found.chat_template = CHATML
    return found


def example(tokenizer: Any, settings: PromptSettings, names: list[str] = NAMES) -> tuple[list[int], list[int]]:
    builder = PromptBuilder(tokenizer, names, settings=settings, noun="movie")
    return builder.prompt([1, 2, 3], [4, 1]).ids, builder.answers[4]


def chat(**changes: Any) -> PromptSettings:
    own = {"template": "Seen {noun}s:\n{history}\nCandidates:\n{candidates}\nNext:", "system": "Recommend.", "chat": True}
    return PromptSettings(**{**own, **changes})


@pytest.mark.parametrize("system", ["Recommend.", None])
def test_a_chat_gives_the_ids_of_training(tokenizer: Any, system: str | None) -> None:
    prompt, answer = example(tokenizer, chat(system=system))
    found = Conversations(tokenizer, chat(system=system)).of(prompt, answer)
    assert found.exact and found.system == system and found.answer == "new song"
    assert found.prompt.startswith("Seen movies:\nThe red river\nThe blue house (1980)\nnaïve 東京 🎬\nCandidates:\nnew song")
    messages = found.line("messages")["messages"]
    assert [message["role"] for message in messages] == [*(["system"] if system else []), "user", "assistant"]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids[: len(prompt) + len(answer)] == prompt + answer  # only the template's newline follows
    unanswered = Conversations(tokenizer, chat(system=system)).of(prompt)
    assert unanswered.exact
    shown = unanswered.line("messages", answered=False)["messages"]
    assert tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=False) == prompt


def test_bare_text_gives_the_ids_of_training_with_its_own_end(tokenizer: Any) -> None:
    settings = chat(chat=False)
    prompt, answer = example(tokenizer, settings)
    found = Conversations(tokenizer, settings).of(prompt, answer)
    assert found.exact and found.system is None and found.prompt.startswith("Recommend.\nSeen movies:")
    assert found.answer == "new song<|im_end|>"
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (found.prompt, found.answer)]
    assert encoded == [prompt, answer]


def test_a_continuation_ends_with_its_separator(tokenizer: Any) -> None:
    settings = PromptSettings("{history}")
    prompt, answer = example(tokenizer, settings)
    found = Conversations(tokenizer, settings).of(prompt, answer)
    assert found.exact and found.answer == "new song\n"
    text, exact = Conversations(tokenizer, settings).document(prompt + answer)
    assert exact and text == found.prompt + found.answer


@pytest.mark.parametrize(
    "names, changes",
    [
        (["", "a <|im_end|> b", *NAMES[2:]], {}),  # plain text in training
        (["", "🎬" * 40, *NAMES[2:]], {"max_title_tokens": 5}),  # cut within a character
    ],
)
def test_a_text_that_cannot_be_exact_says_so(tokenizer: Any, names: list[str], changes: dict[str, Any]) -> None:
    prompt, answer = example(tokenizer, chat(**changes), names)
    assert not Conversations(tokenizer, chat(**changes)).of(prompt, answer).exact


def test_a_template_that_changes_the_text_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[-1]['content'] | upper }}")
    with pytest.raises(ValueError, match="does not show the user's text once and unchanged"):
        Conversations(tokenizer, chat())


@pytest.mark.parametrize("layout", ["messages", "alpaca"])
def test_the_columns_of_the_description_are_those_of_a_line(tokenizer: Any, layout: str) -> None:
    line = Conversations(tokenizer, chat()).of(*example(tokenizer, chat())).line(layout)
    entry = description("a.jsonl", layout)
    assert set(entry["columns"].values()) <= set(line) and entry["file_name"] == "a.jsonl"
    if layout == "messages":
        assert set(line["messages"][0]) == {entry["tags"]["role_tag"], entry["tags"]["content_tag"]}
    assert json.loads(json.dumps(line)) == line


def test_a_template_with_the_date_is_exact_for_nobody_else(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of this package are the same on every day."""
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    prompt, answer = example(tokenizer, chat())
    assert tokenizer.decode(prompt).startswith("26 Jul 2024\n")
    texts = Conversations(tokenizer, chat())
    assert not texts.of(prompt).exact and not texts.of(prompt, answer).exact
