"""``scoring: published`` end to end: a run that generates titles, its table and record, what is cached and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from recbole_llm.evaluation import generated
from recbole_llm.evaluation.published import entries
from recbole_llm.llm.generation import Generator
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import assembled

# an LM that has read the titles, so that its answers are titles
BUILTIN = {
    "llm_path": "builtin",
    "builtin_lm": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "tokens": 60_000, "epochs": 60, "batch_tokens": 256},
    "lora_learning_rate": 1e-3,
    "scoring": "published",
    "published_max_new_tokens": 40,
}


@pytest.fixture(scope="module")
def run(module_settings: dict[str, Any]) -> dict[str, Any]:
    result = run_recbole_llm("TALLRec", "tiny", config_dict=module_settings | BUILTIN)
    return result | {"settings": module_settings | BUILTIN, "record": json.loads(Path(result["record"]).read_text())}


def answers(run: dict[str, Any], row: str) -> dict[int, str]:
    folder = Path(run["settings"]["checkpoint_dir"]) / "answers" / run["record"]["published"]["rows"][row]["answers"]
    from recbole_llm.store.files import load_state

    tensors, values = load_state(folder)
    return dict(zip(tensors["users"].tolist(), values["answers"], strict=True))


def test_ranks_are_the_places_of_the_targets_among_the_generated_titles(run: dict[str, Any]) -> None:
    made = assembled("TALLRec", run["settings"])
    candidates, names = made.test.candidates, made.model.parts.domain.items.names
    users = made.test._dataset.histories.user_ids
    for row, found in run["record"]["published"]["rows"].items():
        texts, ranks, named, first = answers(run, row), {}, [], []
        for user, target, listed in zip(
            candidates.users.tolist(), candidates.targets.tolist(), candidates.items.tolist(), strict=True
        ):
            lines = [line.strip() for line in texts[user].split("\n")][:3]
            ranks[users[user]] = lines.index(names[target]) + 1 if names[target] in lines else None
            named.append({*lines} & {names[item] for item in listed})
            first.append(lines[0] in {names[item] for item in listed})
        assert found["ranks"] == ranks and found["users"] == 60
        assert found["unmatched"] == pytest.approx(np.mean([not some for some in named]))
        assert found["several_matches"] == pytest.approx(np.mean([len(some) > 1 for some in named]))
        assert found["unmatched_first"] == pytest.approx(1 - np.mean(first))
        places = np.array([rank or math.inf for rank in ranks.values()])
        assert found["results"]["published_hr@1"] == pytest.approx(np.mean(places == 1))
        assert found["results"]["published_hr@3"] == pytest.approx(np.mean(places <= 3))
        assert found["results"]["published_ndcg@3"] == pytest.approx(np.mean((places <= 3) / np.log2(1 + places)))
        titles = [title for text in texts.values() for title in entries(text, "\n")[:3]]
        assert np.mean([title in names for title in titles]) > 0.5  # what is generated are titles
        assert 0 < found["unmatched"] < 1 and {1, None} < {*ranks.values()}


def test_the_difference_from_the_likelihood_is_paired(run: dict[str, Any]) -> None:
    record = run["record"]
    assert [*record["published"]["rows"]] == ["TALLRec", "no adapter"]
    for row, found in record["published"]["rows"].items():
        hits = [(found["ranks"][user] == 1) - float(rank == 1) for user, rank in record["ranks"][row].items()]
        assert len(hits) == 60
        hit = found["hit@1"]
        assert hit["likelihood"] == pytest.approx(record["results"][row]["hit@1"])
        assert hit["difference"] == pytest.approx(np.mean(hits)) == pytest.approx(hit["generated"] - hit["likelihood"])
        assert hit["half_width_95"] == pytest.approx(1.96 * np.std(hits) / np.sqrt(60)) and 0 < hit["p_value"] <= 1
        assert found["users_per_second"] == pytest.approx(60 / found["seconds"])


def test_the_published_metrics_change_nothing_else(run: dict[str, Any]) -> None:
    plain = run_recbole_llm("TALLRec", "tiny", config_dict=run["settings"] | {"scoring": "likelihood"})
    assert plain["test_result"] == run["test_result"] and plain["variants"] == run["variants"] and plain["published"] == {}
    record = json.loads(Path(plain["record"]).read_text())
    assert record["published"] is None and record["stages"] == run["record"]["stages"]
    assert not any(record["stage_seconds"].values())  # the key changes no stage
    assert not [name for metrics in (run["test_result"], *run["variants"].values()) for name in metrics if "published" in name]
    assert run["published"] == {row: found["results"] for row, found in run["record"]["published"]["rows"].items()}


def test_the_table_shows_what_the_record_has(run: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    run_recbole_llm("TALLRec", "tiny", config_dict=run["settings"])
    (shown,) = [message for message in caplog.messages if message.startswith("published protocol")]
    heading, _, _, *lines = shown.splitlines()
    assert heading == "published protocol, RecCocktail (arXiv 2502.08271): greedy answers of at most 40 tokens, 60 users"
    for line, (row, found) in zip(lines, run["record"]["published"]["rows"].items(), strict=True):
        assert line.startswith(row) and f"{found['results']['published_ndcg@3']:.4f}" in line
        assert f"{found['unmatched']:.1%}" in line and f"{found['hit@1']['difference']:+.4f}" in line


def test_answers_are_cached_and_a_killed_generation_resumes(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = assembled("TALLRec", run["settings"])
    made.trainer._run_stages()
    ranks = {row: made.trainer.ranks for row in run["record"]["published"]["rows"]}
    asked: list[int] = []
    generate = Generator.__call__

    def count(self: Generator, lm: Any, prompts: Any, *rest: Any) -> list[str]:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(self, lm, prompts, *rest)

    monkeypatch.setattr(Generator, "__call__", count)
    evaluate = lambda: generated.evaluate(made.config, made.model, made.candidates["test"], ranks)  # noqa: E731
    cached = evaluate()
    assert cached and asked == []
    before = {row: (found.ranks, found.matched) for row, found in cached.rows.items()}
    made.config["checkpoint_dir"] = str(tmp_path)
    monkeypatch.setattr(generated, "USERS_AT_ONCE", 16)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    again = evaluate()
    assert again and asked == [16, 16, 16, 16, 12, 16, 16, 16, 12]
    assert {row: (found.ranks, found.matched) for row, found in again.rows.items()} == before


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({}, False),
        ({"scoring": "likelihood"}, False),
        ({"scorer": "prefix"}, False),
        ({"published_max_new_tokens": 41}, True),
        ({"max_history": 4}, True),
        ({"metrics": ("hr@1", "ndcg@3")}, False),
        ({"metrics": ("hr@1", "ndcg@5")}, True),  # of a protocol that reads five titles of an answer
    ],
)
def test_cached_answers_are_named_by_what_they_depend_on(run: dict[str, Any], changes: dict[str, Any], changed: bool) -> None:
    def names(metrics: Any = None, **changes: Any) -> list[str]:
        made = assembled("TALLRec", run["settings"] | changes)
        folders = {stage.name: folder for stage, folder in zip(first.trainer._stages, kept, strict=True)}
        made.model.adapters = lambda results: {"tuned": folders["ingredient"]}
        made.model.published = replace(made.model.published, metrics=metrics or made.model.published.metrics)
        made.trainer.cache.run(*made.model.parts.backbone.stages)
        made.model.load(made.trainer.cache)
        return [variant.answers.fingerprint for variant in made.model.variants().values()]

    first = assembled("TALLRec", run["settings"])
    kept = [first.trainer.cache.folder(stage) for stage in first.trainer._stages]
    before, after = names(), names(**changes)
    assert len({*before}) == 2
    assert all((one != other) == changed for one, other in zip(before, after, strict=True))


# -- before anything is trained ----------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_and_what_adds_nothing_is_said(
    settings: dict[str, Any], assemble: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="scoring: 'generate' .*is not one of likelihood, published"):
        assemble("TALLRec", settings, scoring="generate")
    full = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    with pytest.raises(ValueError, match=r"scoring: published .* the test of this run has none; give --eval_args="):
        assemble("TALLRec", settings, scoring="published", **full)
    label = {"scorer": "label", "lora_train_mode": "prefix"}
    for model, changes in (("SASRec", {}), ("TALLRec", label), ("LlamaRec", {"lora_train_mode": "prefix"})):
        caplog.clear()
        assemble(model, settings, scoring="published", **changes)
        assert f"scoring: published adds nothing, since {model} ranks by scores and generates no titles" in caplog.messages


def test_a_prompt_that_is_not_the_papers_is_named(
    settings: dict[str, Any], assemble: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assemble("WeaveRec", settings, scoring="published")
    assert (
        "scoring: not as in WeaveRec (arXiv 2510.26546): prompt: 'history' instead of 'reccocktail', "
        "chat: False instead of True, candidate_separator: '\\n' instead of '||', top_k_target: 1 instead of 5"
    ) in caplog.messages
    assert "scoring: the prompt lists no candidates, so answers may name any title of the catalogue" in caplog.messages


def test_an_lm_that_cannot_generate_is_refused_before_anything_is_trained(
    settings: dict[str, Any], assemble: Callable[..., Any], tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("TALLRec", settings, scoring="published")
    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", lambda self, input_ids: {})
    with pytest.raises(ValueError, match="scoring: published generates answers from vectors, which LlamaForCausalLM"):
        made.trainer.fit(made.train, made.valid)
    assert not list((tmp_path / "saved").glob("stages/*-*"))
    assemble("TALLRec", settings).model.check()  # without generated answers, nothing is asked


def test_the_answers_of_an_lm_that_cannot_read_padding_are_generated_without_it(
    settings: dict[str, Any], assemble: Callable[..., Any]
) -> None:
    made = assemble("TALLRec", settings, scoring="published")
    causal = made.model.parts.backbone.load(made.trainer.cache)
    for padding in (True, False):
        generator = made.model.generator(replace(causal, reading=replace(causal.reading, padding=padding)))
        assert generator.padding == padding
