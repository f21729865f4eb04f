"""What an LM knows of a catalogue: an LM that knows it, one that does not, and a second computation pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.memorisation import NEAR, OTHERS, SHOWN, Catalogue, memorisation, recombined

WORDS = ["red", "blue", "old", "new", "last", "first", "lost", "high", "dark", "long"]
NOUNS = ["house", "river", "king", "road", "night", "city", "star", "garden", "train", "sea"]
NAMES = ["", *(f"{word} {noun}" for i, word in enumerate(WORDS) for noun in (NOUNS + NOUNS)[i : i + 6])]


class Tokenizer:
    """One token for each character."""

    bos_token_id, eos_token_id, added_tokens_decoder = None, 0, {}

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [list(map(ord, one)) for one in text] if isinstance(text, list) else list(map(ord, text))}


@pytest.fixture
def catalogue() -> Catalogue:
    lines = np.random.default_rng(3).permutation(np.arange(1, len(NAMES))).tolist()
    return Catalogue("film", NAMES, lines, 64)


def text(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def measured(catalogue: Catalogue, score: Any) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    """The measurements with a scorer of texts, and what it was asked."""
    asked = []

    def scorer(_: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        rows = [(text(prompt.ids), [text(answer) for answer in own]) for prompt, own in zip(prompts, answers, strict=True)]
        asked.extend(rows)
        return torch.tensor([[score(prompt, answer) for answer in own] for prompt, own in rows])

    causal: Any = SimpleNamespace(model=None, tokenizer=Tokenizer())
    return memorisation(causal, scorer, catalogue, seed=1), asked  # type: ignore[arg-type]


def test_an_lm_that_knows_the_file_is_found_out(catalogue: Catalogue) -> None:
    names = [catalogue.names[item] for item in catalogue.lines]
    after = dict(zip(names, names[1:], strict=False))

    def knows(prompt: str, answer: str) -> float:
        *_, last, _ = prompt.split("\n")
        return float(answer.rstrip("\n") == after.get(last)) if last in after else float(answer.rstrip("\n") in names)

    found, asked = measured(catalogue, knows)
    assert found["titles"]["share"] == 1.0 and found["titles"]["difference"] == 1.0
    lines = found["lines"]
    assert lines.pop("words") < 0.5
    assert lines == {"number": len(names) - SHOWN - OTHERS, "share": 1.0, "half_width_95": 3 / lines["number"], "chance": 0.05}
    assert asked[0][0] == "A list of films:\n" and all(answer.endswith("\n") for _, own in asked for answer in own)
    prompt, own = asked[-1]
    shown, others = prompt.split("\n")[1:-1], [answer[:-1] for answer in own]
    place = names.index(shown[-1]) + 1
    assert shown == names[place - SHOWN : place] and others[0] == names[place]
    assert len(set(others)) == OTHERS + 1 and set(others[1:]) <= set(names[place + 1 : place + 1 + NEAR])


def test_an_lm_that_knows_nothing_is_at_chance(catalogue: Catalogue) -> None:
    rng = np.random.default_rng(0)
    found, _ = measured(catalogue, lambda *_: float(rng.random()))
    assert abs(found["titles"]["share"] - 0.5) < 2 * found["titles"]["half_width_95"]
    assert found["lines"]["share"] < 0.3
    constant, _ = measured(catalogue, lambda *_: 0.0)
    assert constant["titles"]["share"] == 0 and constant["lines"]["share"] == 0  # a tie is no knowledge


def test_what_a_sorted_file_tells_is_counted_without_an_lm() -> None:
    alone = [f"{'set' if i % 2 else 'box'} {i}" if i < 11 else f"part {i}" for i in range(40)]
    found, _ = measured(Catalogue("piece", ["", *alone], list(range(1, 41)), 64), lambda *_: 0.0)
    assert found["lines"]["words"] == 1 / 11  # the last of the sets and boxes


def test_both_sides_have_the_same_words() -> None:
    titles = ["a b", "c d", "e f", "one", "x y z", "u v w", "a b"]
    pairs = recombined(titles, np.random.default_rng(0))
    assert pairs and {real for real, _ in pairs} <= set(titles)
    assert not {made for _, made in pairs} & set(titles)
    for real, made in pairs:
        assert len(real.split()) == len(made.split()) > 1
    many = [f"{word} {noun}" for word, noun in zip(WORDS, NOUNS, strict=True)]
    found = recombined(many, np.random.default_rng(1))
    assert {made.split()[0] for _, made in found} <= set(WORDS) and {made.split()[1] for _, made in found} <= set(NOUNS)


def test_a_small_catalogue_has_no_measurement() -> None:
    found, asked = measured(Catalogue("film", ["", "one", "two"], [1, 2], 8), lambda *_: 0.0)
    assert found == {"titles": None, "lines": None} and not asked
