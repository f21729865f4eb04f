"""Scores of candidates by the likelihood of their titles: prompts, answers, priors, other adapters, soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.data.prompts import Prompt, PromptBuilder, PromptSettings, number_soft_tokens
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.llm.likelihood import TitleLikelihood, remembering
from recbole_llm.llm.lora import AdapterView, attach_lora, lora_modules
from recbole_llm.llm.scoring import Scorer

NAMES = ["", "The red river", "The blue house", "The old wolf", "A song", "Winter"]
HISTORIES = [[1, 2], [], [3, 4, 5]]
CANDIDATES = torch.tensor([[5, 3, 1], [1, 5, 2], [2, 1, 4]])  # [B, C]
LISTWISE = "Seen: {history}\nOne of {candidates}\nis:\n"


@pytest.fixture(scope="module")
def causal(tiny_lm: Path) -> Any:
    return load_causal_lm(tiny_lm, device="cpu")


def likelihood(causal: Any, template: str = "{history}", lm: Any = None, scorer: str = "tree", **parts: Any) -> TitleLikelihood:
    options = {key: parts.pop(key) for key in ("labels", "item_tokens", "candidate_separator") if key in parts}
    prompts = PromptBuilder(causal.tokenizer, NAMES, settings=PromptSettings(template, **options))
    return TitleLikelihood(lm or causal.model, prompts, Scorer(scorer, pad_token_id=2), **parts)


def by_hand(lm: Any, prompt: Prompt, answer: Sequence[int]) -> float:
    """``log P(answer | prompt)`` from the logits of one row."""
    logp = lm(input_ids=torch.tensor([[*prompt.ids, *answer]])).logits[0].log_softmax(-1)
    return float(sum(logp[len(prompt) - 1 + place, token] for place, token in enumerate(answer)))


@torch.no_grad()
@pytest.mark.parametrize("template", ["{history}", LISTWISE])
def test_scores_are_log_likelihoods_of_titles(causal: Any, template: str) -> None:
    found = likelihood(causal, template)
    scores = found(HISTORIES, CANDIDATES)
    assert scores.shape == (3, 3) and scores.dtype == torch.float32
    for history, row, values in zip(HISTORIES, CANDIDATES.tolist(), scores, strict=True):
        prompt = found.prompts.prompt(history, row)
        expected = [by_hand(causal.model, prompt, found.prompts.answers[item]) for item in row]
        assert values.tolist() == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_labels_are_scored_in_the_place_of_titles(causal: Any) -> None:
    found = likelihood(causal, LISTWISE, scorer="label", labels=("A", "B", "C", "D"))
    scores = found(HISTORIES, CANDIDATES)
    for history, row, values in zip(HISTORIES, CANDIDATES.tolist(), scores, strict=True):
        prompt = found.prompts.prompt(history, row)
        expected = [by_hand(causal.model, prompt, [token]) for token in found.prompts.label_tokens[:3]]
        assert values.tolist() == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_several_titles_end_in_the_separator(causal: Any) -> None:
    one, several = likelihood(causal, LISTWISE), likelihood(causal, LISTWISE, several_titles=True)
    prompt = several.prompts.prompt([1, 2], [5, 3, 1])
    expected = [by_hand(causal.model, prompt, several.prompts.first_of_ranking(item)) for item in (5, 3, 1)]
    assert several(HISTORIES, CANDIDATES)[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert not torch.allclose(one(HISTORIES, CANDIDATES), several(HISTORIES, CANDIDATES))
    continued = likelihood(causal, several_titles=True, candidate_separator=" || ")  # nothing is listed: one title answers
    assert torch.equal(continued(HISTORIES, CANDIDATES), likelihood(causal)(HISTORIES, CANDIDATES))


# -- priors ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("template", ["{history}", LISTWISE])
def test_a_prior_takes_off_the_likelihood_without_a_history(causal: Any, template: str) -> None:
    plain = likelihood(causal, template)
    scores = likelihood(causal, template, prior=plain)(HISTORIES, CANDIDATES)
    expected = plain(HISTORIES, CANDIDATES) - plain([[]] * 3, CANDIDATES)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert scores[1].abs().max() < 1e-4 < scores[0].abs().max()  # an empty history adds nothing


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_without_a_history_every_title_is_scored_once_whatever_the_width(
    causal: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, scored = likelihood(causal), []
    candidates = torch.tensor([[1, 2, 3, 5], [5, 1, 2, 2], [2, 2, 1, 5]])[:, :width]
    expected = found([[]] * 3, candidates)
    score = Scorer.__call__

    def spy(self: Scorer, model: Any, prompts: Any, answers: Any, soft: Any = None) -> Any:
        scored.append(sum(map(len, answers)))
        return score(self, model, prompts, answers, soft)

    monkeypatch.setattr(Scorer, "__call__", spy)
    torch.testing.assert_close(found.without_history(candidates), expected, atol=1e-4, rtol=0)
    assert scored == [-(-len(candidates.unique()) // width) * width]


@torch.no_grad()
def test_a_prior_that_remembers_scores_a_title_once_for_all_calls(causal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, scored = remembering(likelihood(causal, prior=likelihood(causal))), []
    calls = torch.tensor([[1, 2, 3], [5, 1, 2]]), torch.tensor([[3, 2, 1], [5, 3, 4]])
    expected = [found.with_lm(causal.model)([[2], [4, 1]], candidates) for candidates in calls]  # forgets, as the LM may differ
    read = TitleLikelihood._likelihoods

    def spy(self: TitleLikelihood, histories: Any, candidates: torch.Tensor, users: Any = None) -> torch.Tensor:
        scored.extend([] if any(histories) else candidates.flatten().tolist())
        return read(self, histories, candidates, users)

    monkeypatch.setattr(TitleLikelihood, "_likelihoods", spy)
    for candidates, scores in zip(calls, expected, strict=True):
        torch.testing.assert_close(found([[2], [4, 1]], candidates), scores, atol=1e-4, rtol=0)
    assert scored == [1, 2, 3, 5, 1, 1, 4, 4, 4]  # rows of three, padded with the first
    without = likelihood(causal)
    assert remembering(without) is without


# -- other adapters ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_same_by_another_lm_and_its_prior_too(tiny_lm: Path) -> None:
    causal = load_causal_lm(tiny_lm, device="cpu")
    model = attach_lora(causal.model, name="x", r=2, lora_alpha=4, lora_dropout=0.0, seed=0)
    for layer in lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B["x"].weight, generator=torch.Generator().manual_seed(0))
    base, adapted = AdapterView(model), AdapterView(model, {"x": 1.0})
    first = likelihood(causal, lm=base, prior=likelihood(causal, lm=base))
    before = first(HISTORIES, CANDIDATES)
    second = first.with_lm(adapted)
    assert second.prompts is first.prompts and second.prior is not None and second.prior.lm is adapted
    expected = likelihood(causal, lm=adapted, prior=likelihood(causal, lm=adapted))(HISTORIES, CANDIDATES)
    assert torch.equal(second(HISTORIES, CANDIDATES), expected)
    assert torch.equal(first(HISTORIES, CANDIDATES), before) and not torch.allclose(expected, before)
    assert likelihood(causal, lm=base).with_lm(adapted).prior is None


def test_scores_are_differentiable_in_coefficients(tiny_lm: Path) -> None:
    causal = load_causal_lm(tiny_lm, device="cpu")
    model = attach_lora(causal.model, name="x", r=2, lora_alpha=4, lora_dropout=0.0, seed=0)
    for layer in lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B["x"].weight, std=0.1)
    weight = torch.tensor(0.5, requires_grad=True)
    likelihood(causal, lm=AdapterView(model, {"x": weight}))(HISTORIES, CANDIDATES).std().backward()
    assert weight.grad is not None and weight.grad != 0


# -- soft tokens -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_soft_tokens_are_filled_for_the_users_asked_about(causal: Any) -> None:
    table = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []

    def fill(prompts: Sequence[Prompt], histories: Any, users: Sequence[int]) -> tuple[Sequence[Prompt], torch.Tensor]:
        seen.append((histories, users))
        numbered, keys = number_soft_tokens(prompts)
        return numbered, table[[key if key < 50 else users[key - 50] for key in keys]]  # [S, D]

    parts = {"item_tokens": True, "soft_tokens": fill, "user_key": lambda row: 50 + row}
    found = likelihood(causal, "{user}Seen: {history}. Next:\n", **parts)
    prompts = found.prompts_of(HISTORIES, CANDIDATES)
    assert [set(prompt.soft_slots.values()) for prompt in prompts] == [{50, 1, 2}, {51}, {52, 3, 4, 5}]
    scores = found(HISTORIES, CANDIDATES, [60, 61, 62])
    assert seen == [(HISTORIES, [60, 61, 62])]
    others = found(HISTORIES, CANDIDATES, [60, 99, 62])
    assert torch.equal(scores[[0, 2]], others[[0, 2]]) and not torch.allclose(scores[1], others[1])


@torch.no_grad()
def test_candidates_are_listed_only_where_prompts_show_them(causal: Any) -> None:
    for template, alike in (("{history}", True), (LISTWISE, False)):
        found = likelihood(causal, template)
        assert (found.prompts_of(HISTORIES, CANDIDATES) == found.prompts_of(HISTORIES, CANDIDATES.flip(1))) == alike
