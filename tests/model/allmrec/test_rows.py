"""The rows beside ALLMRec are what they say, with and without the prior of a title; its full ranking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.data.prompts import PromptBuilder, PromptSettings
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.allmrec import LLM_ONLY, TEXT_ONLY
from recbole_llm.quick_start import run_recbole_llm
from tests.model.allmrec.conftest import PROMPTS, Made, close, codes, score, scores, with_codes

# -- variants ----------------------------------------------------------------------------------------------------------


def variant_scores(made: Made, name: str) -> torch.Tensor:
    with torch.no_grad():
        return made.model.variants()[name].score(made.interaction, made.candidates)


def test_the_text_row_is_the_model_with_its_item_vectors_replaced(made: Made) -> None:
    found = variant_scores(made, TEXT_ONLY)
    assert torch.equal(found, score(with_codes(made, codes(made)["text"]))) and not torch.equal(found, scores(made))


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "BPR"])
def test_the_collaborative_row_is_that_models_own_full_ranking_at_the_candidates(trained: Any, name: str) -> None:
    made = trained(cf_model=name)
    batch = next(iter(made.model.cf.loaders[2]))[0]
    own = made.model.cf.model.full_sort_predict(batch).view(len(batch), -1)
    place = {user: row for row, user in enumerate(batch["user_id"].tolist())}
    expected = own[[place[user] for user in made.users]].gather(1, made.candidates)
    close(variant_scores(made, name), expected)
    assert not torch.allclose(scores(made), expected)


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_llm_alone_is_a_bare_lm_on_prompts_without_soft_tokens(trained: Any, prompt: str, tiny_lm: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trained(**PROMPTS[prompt])
    bare = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    template = "{history}"
    if prompt == "listwise":
        template = (
            "This user has chosen {history} in the previous. Recommend one next item for this user to choose next from the "
            "following item title set, {candidates}. The recommendation is "
        )
    between = {"history_separator": ", ", "candidate_separator": ", ", "title_quote": '"'} if prompt == "listwise" else {}
    settings = PromptSettings(template, max_history=5, **between)
    builder = PromptBuilder(made.causal.tokenizer, made.model.parts.domain.items.names, settings=settings)
    pairs = zip(made.histories, made.candidates.tolist(), strict=True)
    prompts = [builder.prompt(history, row if builder.shows_candidates else None) for history, row in pairs]
    answers = [[builder.answers[item] for item in row] for row in made.candidates.tolist()]
    close(variant_scores(made, LLM_ONLY), Scorer("naive")(bare, prompts, answers))
    assert made.builder.shows_user and not torch.allclose(scores(made), Scorer("naive")(bare, prompts, answers))


def test_every_variant_scores_differently_and_has_a_fingerprint_of_its_own(made: Made) -> None:
    found = {name: variant_scores(made, name) for name in made.model.variants()}
    assert list(found) == ["ALLMRec", "SASRec", TEXT_ONLY, LLM_ONLY] and torch.equal(found["ALLMRec"], scores(made))
    assert len({tuple(values.flatten().tolist()) for values in found.values()}) == 4
    fingerprints = {name: variant.fingerprint for name, variant in made.model.variants().items()}
    assert fingerprints.pop("SASRec") is None  # its scores cost less than reading them
    assert len({*fingerprints.values()}) == 3 and None not in fingerprints.values()


def test_a_run_reports_every_variant_beside_the_model(shared_settings: dict[str, Any], made: Made) -> None:
    result = run_recbole_llm("ALLMRec", "tiny", config_dict=shared_settings)
    record = json.loads(Path(result["record"]).read_text())
    assert list(record["results"]) == ["ALLMRec", "SASRec", TEXT_ONLY, LLM_ONLY]
    assert list(result["variants"]) == ["SASRec", TEXT_ONLY, LLM_ONLY]
    names = ["cf-SASRec", "builtin-text-encoder", "alignment", "projection"]
    assert record["stage_seconds"] == dict.fromkeys(names, 0.0)  # `made` has trained them
    assert all(len(ranks) == 60 for ranks in record["ranks"].values())
    made.trainer.evaluate(made.test)
    assert list(record["ranks"]["ALLMRec"].values()) == made.trainer.ranks.ranks


# -- without the prior of a title --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pmi_takes_off_what_the_lm_alone_finds_likely_without_a_history(trained: Any, prompt: str) -> None:
    made, plain = trained(**PROMPTS[prompt], normalize="pmi"), trained(**PROMPTS[prompt])
    model = made.model
    builder = model.parts.builder(made.causal.tokenizer, prompts=model.plain_prompts)
    rows = made.candidates.tolist()
    prompts = [builder.prompt([], row) for row in rows]
    answers = [[builder.answers[item] for item in row] for row in rows]
    prior = Scorer("naive")(made.causal.model, prompts, answers)  # [B, C]
    made.soft.load_state_dict(plain.soft.state_dict())  # pmi stops stage 2 elsewhere
    close(scores(made), scores(plain) - prior)
    assert prior.std() > 0.1
    assert model.variants()["ALLMRec"].fingerprint != plain.model.variants()["ALLMRec"].fingerprint
    alone = [score(made, [h], c[None], [u]) for h, c, u in zip(made.histories, made.candidates, made.users, strict=True)]
    close(torch.cat(alone), scores(made))


def test_pmi_holds_in_a_call_of_one_candidate_and_of_all(trained: Any) -> None:
    made = trained(normalize="pmi")
    for columns in (slice(0, 1), slice(2, 5)):
        close(score(made, candidates=made.candidates[:, columns]), scores(made)[:, columns])


# -- full ranking ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "NeuMF"])
def test_a_full_ranking_is_its_collaborative_models_with_the_top_in_the_llms_order(trained: Any, name: str) -> None:
    made = trained(cf_model=name, retriever_top=5, eval_args={"mode": {"valid": "candidates", "test": "full"}})
    interaction = next(iter(made.test))[0][:7]
    ranked, own = made.model.full_sort_predict(interaction), made.model.cf.scores(interaction)
    own[:, 0] = -torch.inf
    order, before = ranked.argsort(descending=True, stable=True), own.argsort(descending=True, stable=True)
    assert torch.equal(order[:, 5:], before[:, 5:]) and torch.equal(order[:, :5].sort().values, before[:, :5].sort().values)
    assert (made.model.score_candidates(interaction, order[:, :5]).diff(dim=1) <= 1e-4).all() and not torch.equal(order, before)
    own[:, 0] = made.model.cf.scores(interaction)[:, 0]
    assert torch.equal(made.model.variants()[name].score_catalogue(interaction), own)


@pytest.mark.slow
def test_histories_are_cut_to_what_a_collaborative_model_of_shorter_ones_can_read(trained: Any) -> None:
    changes = {"cf_config": {"MAX_ITEM_LIST_LENGTH": 4}, "eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    made = trained(**changes)
    assert 0 <= made.trainer.evaluate(made.test)["hit@1"] <= 1
