"""LlamaRec: trained to name the letter of the next item, ranks by the logits of the letters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.quick_start import run_recbole_llm


@pytest.fixture(scope="module")
def settings(module_settings: dict[str, Any]) -> dict[str, Any]:
    return {**module_settings, "lora_train_mode": "prefix", "train_samples": 48, "lora_epochs": 2, "lora_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def made(settings: dict[str, Any], assemble: Any) -> Any:
    made = assemble("LlamaRec", settings)
    made.trainer.fit(made.train, made.valid)
    return made


def test_the_training_answer_is_the_targets_letter(made: Any) -> None:
    model, letters = made.model, "ABCDEFGHIJ"
    history = model.domain.histories[3]
    ids, mask = model._encode(history.tolist(), model.prompts, model.domain, np.random.default_rng(1))
    assert sum(mask) == 1 and mask[-1] == 1
    listed = model.tokenizer.decode(ids[:-1]).split("Candidates:")[1]
    answer = model.tokenizer.decode(ids[-1:]).strip()
    title = model.domain.items.names[int(history[-1])]
    assert answer in letters and f"{answer}. {title}" in listed and listed.count(". The") == len(letters)


def test_scores_are_the_logits_of_the_letters_behind_the_prompt(made: Any) -> None:
    model, (interaction, _, _, targets) = made.model, next(iter(made.test))
    candidates = made.test.candidates.lookup(interaction["user_id"], targets)[:3]
    with torch.no_grad():
        scores = model.score_candidates(interaction[:3], candidates)
        for row, history in enumerate(model._histories_of(interaction[:3])):
            prompt = model.prompts.prompt(history, candidates[row].tolist())
            logits = model.lm(torch.tensor([prompt])).logits[0, -1]
            expected = logits.log_softmax(-1)[model.prompts.label_tokens[: candidates.size(1)]]
            torch.testing.assert_close(scores[row] - scores[row, 0], expected - expected[0], atol=1e-4, rtol=0)


def test_a_full_ranking_puts_the_retrievers_top_in_the_letters_order(settings: dict[str, Any]) -> None:
    mode = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "retriever_top": 6, "retriever_config": {"epochs": 1}}
    result = run_recbole_llm("LlamaRec", "tiny", config_dict={**settings, **mode, "train_batch_size": 64})
    assert 0 <= result["test_result"]["hit@5"] <= 1


def test_another_scorer_is_refused(settings: dict[str, Any], assemble: Any) -> None:
    with pytest.raises(ValueError, match="scorer: LlamaRec reads the logits of letters, not tree"):
        assemble("LlamaRec", settings, scorer="tree")
