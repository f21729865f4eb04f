"""A chat template is a program of somebody else: it costs bounded time and memory, and gives one text in every run."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from recbole_llm.data import chat_templates
from recbole_llm.data.tokens import TextTokens

USER = "{{ messages[-1]['content'] }}"


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    """The text of a message in a template."""
    monkeypatch.setattr(chat_templates, "SECONDS", 1)

    def rendered(template: str) -> str:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return TextTokens(tokenizer, [], 1).chat("hello", None)

    return rendered


@pytest.mark.parametrize(
    ("template", "used_up"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        pytest.param("{{ 9 ** (9 ** 9) }}", "1 s", marks=pytest.mark.slow),
        pytest.param(
            "{% macro f(n) %}{% for a in 'ab' if n %}{{ f(n - 1) }}{% endfor %}{% endmacro %}{{ f(40) }}",
            "1 s",
            marks=pytest.mark.slow,
        ),
        ("{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "1 GiB"),
        ("{{ 'x' | center(10 ** 11) }}", "1 GiB"),
    ],
)
def test_a_template_without_bounds_is_refused_by_name(chat, template: str, used_up: str) -> None:
    with pytest.raises(ValueError, match=f"chat: the chat template of .* takes more than ({used_up}|1 s|1 GiB) for one prompt"):
        chat(template + USER)


@pytest.mark.parametrize(
    "template", ["{% for i in range(10**9) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_what_the_sandbox_stops_is_refused_by_its_words(chat, template: str) -> None:
    with pytest.raises(ValueError, match="the chat template of .* rejects it: "):
        chat(template + USER)


@pytest.mark.parametrize(
    "template",
    [
        "{% set f = '%d' %}{{ strftime_now(f) }}",
        "{% set now = strftime_now %}{{ now('%Y') }}",
        "{{ ['a', 'b'] | random }}",
        "{% filter random %}abc{% endfilter %}",
        "{{ lipsum(1) }}",
        "{{ 'ab' | map('upper') }}",
        "{{ messages[0].items }}",
    ],
)
def test_a_template_that_differs_from_run_to_run_is_refused(chat, template: str) -> None:
    with pytest.raises(ValueError, match="chat: the chat template of .* so its text would be another one in each run"):
        chat(template + USER)


def test_a_draw_that_no_one_sees_in_the_template_is_the_same_in_each_run(chat) -> None:
    template = "{% set f = 'ran' ~ 'dom' %}{{ ['abcdefghijklmnopqrstuvwxyz'] | map(f) | join }} "
    random.seed(1)
    texts = {chat(template + USER) for _ in range(5)}
    drawn = random.random()
    random.seed(1)
    assert len(texts) == 1 and random.random() == drawn, "and nothing is drawn from the run's own numbers"


def test_a_published_template_asks_whether_there_is_a_clock(chat) -> None:
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %} "
    assert chat(asks + USER) == "26 Jul 2024 hello"


def test_a_form_of_messages_is_tried_once(chat, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    monkeypatch.setattr(chat_templates, "_trial", lambda work: trials.append(work))
    assert [chat("once: " + USER) for _ in range(3)] == ["once: hello"] * 3 and len(trials) == 1
