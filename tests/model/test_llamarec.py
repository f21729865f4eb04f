"""LlamaRec: trained to name the label of the next item, ranks by the logits of the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import gammaincc
from scipy.stats import chisquare

from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.evaluation.ranks import Ranks
from recbole_llm.evaluation.record import Row
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.model.parts import histories_of
from recbole_llm.quick_start import run_recbole_llm


def chi_square_p(counts: list[int]) -> float:
    """By the definition: the upper tail of chi-square with n - 1 degrees of freedom."""
    expected = sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    return float(gammaincc((len(counts) - 1) / 2, statistic / 2))


@pytest.fixture(scope="module")
def settings(module_settings: dict[str, Any]) -> dict[str, Any]:
    return {**module_settings, "lora_train_mode": "prefix", "train_samples": 48, "lora_epochs": 2, "lora_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def made(settings: dict[str, Any], assemble: Any) -> Any:
    made = assemble("LlamaRec", settings)
    made.trainer.fit(made.train, made.valid)
    return made


def test_the_training_answer_is_the_targets_label(made: Any) -> None:
    parts, labels = made.model.parts, "ABCDEFGHIJ"
    tokenizer, history = parts.backbone.tokenizer, parts.domain.histories[3]
    encoder = ExampleEncoder(parts.domain, parts.builder(tokenizer), parts.examples)
    row, mask = encoder(history.tolist(), np.random.default_rng(1), known=history)
    assert mask[-3:] == [0, 1, 1] and sum(mask) == 2 and row.ids[-1] == tokenizer.eos_token_id
    listed = tokenizer.decode(row.ids[:-2]).split("Candidates:")[1]
    answer = tokenizer.decode(row.ids[-2:-1]).strip()
    title = parts.domain.items.names[int(history[-1])]
    assert answer in labels and f"({answer}) {title}" in listed and listed.count(") The") == len(labels)
    assert listed.endswith("\n\n### Response:\n")


def test_a_full_ranking_reads_no_candidate_files(settings: dict[str, Any], assemble: Any) -> None:
    files = {"source": "file", "file": {"valid": "none", "test": "none"}}
    whole, given = (
        assemble("LlamaRec", settings | {"lora_valid": "loss", "eval_args": {"mode": "full"}, "candidates": one})
        for one in (settings["candidates"], settings["candidates"] | files)
    )
    assert [stage.fingerprint for stage in given.stages] == [stage.fingerprint for stage in whole.stages]


def test_scores_are_the_logits_of_the_labels_behind_the_prompt(made: Any, tiny_lm: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, (interaction, _, _, targets) = made.model, next(iter(made.test))
    folder = model.adapters(made.trainer.cache)["tuned"]
    vanilla = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), str(folder)).eval()
    candidates = made.test.candidates.lookup(interaction["user_id"], targets)[:3]
    builder = model.parts.builder(model.parts.backbone.tokenizer)
    with torch.no_grad():
        scores = model.score_candidates(interaction[:3], candidates)
        for row, history in enumerate(histories_of(model, interaction[:3])):
            prompt = builder.prompt(history, candidates[row].tolist())
            logits = vanilla(torch.tensor([prompt.ids])).logits[0, -1]
            expected = logits.log_softmax(-1)[builder.label_tokens[: candidates.size(1)]]
            torch.testing.assert_close(scores[row] - scores[row, 0], expected - expected[0], atol=1e-4, rtol=0)


def test_the_record_counts_the_label_of_every_first_place(settings: dict[str, Any]) -> None:
    result = run_recbole_llm("LlamaRec", "tiny", config_dict=settings)
    record = read_record(Path(result["record"]))
    found, candidates = record["labels"], len("ABCDEFGHIJ")
    assert list(found) == ["LlamaRec", "no adapter"]
    for row, own in found.items():
        users, hit = len(record["ranks"][row]), record["results"][row]["hit@1"]
        assert own["labels"] == list("ABCDEFGHIJ") and len(own["first"]) == candidates
        assert sum(own["first"]) == sum(own["target"]) == users
        # the users whom the first place serves are at most those for whom both have the same label
        assert hit * users <= sum(min(pair) for pair in zip(own["first"], own["target"], strict=True)) + 1e-9
        assert own["p"] == pytest.approx(chi_square_p(own["first"]))
    assert found["LlamaRec"]["target"] == found["no adapter"]["target"]
    assert (Path(result["record"]).parent / "labels.png").stat().st_size > 1000


def test_first_places_are_those_of_the_labels(made: Any) -> None:
    """A row whose LM always says C."""
    ranks, scores = Ranks(), torch.zeros(4, 10)
    scores[:, 2] = 1.0
    ranks.add(torch.arange(4), scores, torch.tensor([2, 0, 9, 5]))
    found = made.model.findings([Row("always C", {}, ranks)])["labels"]["always C"]
    assert found["first"] == [0, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    assert found["target"] == [1, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert found["p"] < 1e-4
    few = Ranks()
    few.add(torch.arange(2), scores[:2], torch.tensor([2, 0]))
    found = made.model.findings([Row("of two users", {}, few)])["labels"]["of two users"]
    assert len(found["first"]) == 10 and found["p"] == pytest.approx(chisquare([2, *[0] * 9]).pvalue), "labels of no user count"
    assert not made.model.findings([])


def test_a_target_that_is_not_listed_has_no_label(made: Any) -> None:
    """As with candidates of a retriever; its slot would be that of A."""
    ranks = Ranks()
    ranks.add(torch.arange(3), torch.rand(3, 10), torch.tensor([4, 0, 0]), torch.tensor([False, True, True]))
    found = made.model.findings([Row("of a retriever", {}, ranks)])["labels"]["of a retriever"]
    assert sum(found["first"]) == 3 and found["target"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_a_full_ranking_puts_the_retrievers_top_in_the_order_of_the_labels(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mode = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "retriever_top": 6, "retriever_config": {"epochs": 1}}
    result = run_recbole_llm("LlamaRec", "tiny", config_dict={**settings, **mode, "train_batch_size": 64})
    assert 0 <= result["test_result"]["hit@5"] <= 1
    record = read_record(Path(result["record"]))
    assert "labels" not in record
    ranks, own = np.array([*record["ranks"]["LlamaRec"].values()]), record["reranked"]["LlamaRec"]
    assert own == {"top": 6, "reachable": pytest.approx((ranks <= 6).mean())} and {*record["reranked"]} == {*record["results"]}
    assert 0 < own["reachable"] < 1
    printed = capsys.readouterr()
    line = f"LlamaRec: the retriever's 6 items that are ranked anew contain the target of {own['reachable']:.1%} of the users"
    assert (printed.out + printed.err).count(line) == 1


def test_another_scorer_is_refused(settings: dict[str, Any], assemble: Any) -> None:
    with pytest.raises(ValueError, match="scorer: LlamaRec reads the logits of labels, not tree"):
        assemble("LlamaRec", settings, scorer="tree")
