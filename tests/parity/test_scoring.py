"""Shortcuts are the oracle: prefix, tree and label equal naive within 1e-4, on every family and any lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.scoring import Scorer
from tests.llm.conftest import FAMILIES, VOCABULARY, tiny_model

TOKEN = st.integers(1, VOCABULARY - 1)
MODELS: dict = {}


def model_of(family, attention):
    if (family, attention) not in MODELS:
        MODELS[family, attention] = tiny_model(family, attention)
    return MODELS[family, attention]


@st.composite
def cases(draw):
    """1 to 4 users, 1 to 5 candidates, prompts of 1 to 30 tokens, answers of 1 to 7."""
    users, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    answers = st.lists(st.lists(TOKEN, min_size=1, max_size=7), min_size=candidates, max_size=candidates)
    prompts = st.lists(st.lists(TOKEN, min_size=1, max_size=30), min_size=users, max_size=users)
    return (
        [Prompt(ids) for ids in draw(prompts)],
        draw(st.lists(answers, min_size=users, max_size=users)),
        draw(st.sampled_from([1, 80, 9999])),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_every_strategy_equals_naive(family, attention, case):
    prompts, answers, budget = case
    labels = [[answer[:1] for answer in row] for row in answers]
    model = model_of(family, attention)
    with torch.no_grad():
        oracle = Scorer("naive")(model, prompts, answers)
        for strategy in ("prefix", "tree"):
            scores = Scorer(strategy, batch_tokens=budget)(model, prompts, answers)
            torch.testing.assert_close(scores, oracle, atol=1e-4, rtol=0)
        scores = Scorer("label", batch_tokens=budget)(model, prompts, labels)
        torch.testing.assert_close(scores, Scorer("naive")(model, prompts, labels), atol=1e-4, rtol=0)
