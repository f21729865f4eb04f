"""What the evaluation may ask of any model: defaults, models of RecBole's own, and ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.evaluation.recommender import ClassicalRecommender, Facts, Recommender, Variant, recommender_of
from recbole_llm.evaluation.record import RunRecord
from recbole_llm.quick_start import evaluate_variants
from recbole_llm.store.locks import locked
from recbole_llm.store.stages import Stage, StageCache, Work


def test_defaults_plan_and_report_nothing(tmp_path: Path) -> None:
    model, cache = Recommender(), StageCache(tmp_path / "stages")
    assert list(model.plan({})) == [] and model.report(tmp_path) == [] and model.facts() == Facts(None, None, None)
    model.load(cache)
    assert not cache.root.exists()
    assert model.scores_full_catalogue and not (model.uses_item_text or model.uses_cf_model or model.scores_unseen_items)
    assert not (model.supports_init_from or model.trained_in_stages)
    with pytest.raises(NotImplementedError):
        model.variants()


def test_the_scores_of_a_variant_are_cached_only_if_it_says_what_they_depend_on() -> None:
    variant = Variant(lambda interaction, candidates: candidates, lambda interaction: interaction)
    assert variant.fingerprint is None


def test_a_model_of_recboles_has_itself_as_the_one_variant(settings: dict[str, Any], assemble: Callable[..., Any]) -> None:
    run = assemble("BPR", settings)
    found = recommender_of(run.model, run.config)
    assert isinstance(found, ClassicalRecommender) and found.facts() == Facts() and list(found.plan(run.candidates)) == []
    ((name, variant),) = found.variants().items()
    assert name == "BPR" and variant.fingerprint is None
    interaction, _, _, targets = next(iter(run.test))
    candidates = run.test.candidates.lookup(interaction["user_id"], targets)
    with torch.no_grad():
        whole = variant.score_catalogue(interaction).view(len(interaction), -1)
        torch.testing.assert_close(variant.score(interaction, candidates), whole.gather(1, candidates), rtol=1e-6, atol=1e-6)


def test_a_model_of_ours_is_its_own_recommender() -> None:
    model = Recommender()
    assert recommender_of(model, {}) is model


# -- what the trainer makes of it --------------------------------------------------------------------------------------


class Constant(Recommender, nn.Module):
    """A model that trains one stage and then ranks by a number that the stage wrote."""

    trained_in_stages = True

    def __init__(self) -> None:
        super().__init__()
        self.sign = 0.0
        self.stage = Stage("constant", {}, self.build)

    def build(self, work: Work) -> None:
        (work.out / "sign").write_text("-1")

    def plan(self, candidates: Any) -> list[Stage]:
        self.phases = sorted(candidates)
        return [self.stage]

    def load(self, cache: StageCache) -> None:
        self.sign = float((cache.folder(self.stage) / "sign").read_text())

    def variants(self) -> dict[str, Variant]:
        def ranked(sign: float) -> Variant:
            return Variant(lambda interaction, candidates: sign * candidates.float(), lambda interaction: interaction)

        return {"Constant": ranked(self.sign), "reversed": ranked(-self.sign)}


@pytest.fixture
def run(settings: dict[str, Any], assemble: Callable[..., Any]) -> SimpleNamespace:
    run = assemble("Pop", settings)
    run.model = Constant()
    run.trainer = ProtocolTrainer(run.config, run.model)
    return run


def test_a_plan_runs_nothing_and_fit_runs_it_before_the_model_loads(run: SimpleNamespace) -> None:
    stages = run.trainer.plan(run.candidates)
    assert [stage.name for stage in stages] == ["constant"] and run.model.phases == ["test", "valid"]
    assert not run.trainer.cache.is_cached(stages[0]) and run.trainer.optimizer is None
    score, result = run.trainer.fit(run.train, run.valid)
    assert run.model.sign == -1 and run.trainer.cache.is_cached(stages[0]) and score == result["ndcg@5"]
    assert run.trainer.trained_parameters == 0


def test_the_first_variant_is_evaluated_unless_another_is_given(run: SimpleNamespace) -> None:
    run.trainer.plan(run.candidates)
    run.trainer.fit(run.train, run.valid)
    own, other = run.model.variants().values()
    first = run.trainer.evaluate(run.test)
    ranks = run.trainer.ranks
    assert run.trainer.evaluate(run.test, variant=own) == first
    second = run.trainer.evaluate(run.test, variant=other)
    assert second != first
    assert [a + b for a, b in zip(ranks.ranks, run.trainer.ranks.ranks, strict=True)] == [11] * 60  # of 10 candidates, reversed


def test_a_row_that_another_run_computes_comes_last_and_stands_in_its_place(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.trainer.plan(run.candidates)
    run.trainer.fit(run.train, run.valid)
    rows = {"Pop": "Constant", "reversed": "reversed", "third": "reversed"}  # the first has the name of the configuration
    variants = {name: replace(run.model.variants()[row], fingerprint=name) for name, row in rows.items()}
    monkeypatch.setattr(run.model, "variants", lambda: variants)
    users, order = run.test.candidates.users, []
    folders = {v.scores_folder(run.config["checkpoint_dir"], run.test.candidates.sha256, users): n for n, v in variants.items()}
    evaluate, held = run.trainer.evaluate, contextlib.ExitStack()
    held.enter_context(locked(next(iter(folders)), "the other run"))

    def observed(*args: Any, variant: Variant, **kwargs: Any) -> Any:
        order.append(variant.fingerprint)
        if variant.fingerprint == "Pop":
            held.close()
        return evaluate(*args, variant=variant, **kwargs)

    monkeypatch.setattr(run.trainer, "evaluate", observed)
    record = RunRecord(run.config, run.trainer, run.valid, run.test)
    evaluate_variants(run, record, saved=False, main=True)
    assert order == ["reversed", "third", "Pop"] and [row.name for row in record.rows] == [*rows]
    assert all(folder.is_dir() for folder in folders) and run.trainer.waited == 0


def test_the_retriever_is_planned_first_run_and_loaded(run: SimpleNamespace) -> None:
    loaded: list[Path] = []
    stage = Stage("cf-retriever", {}, lambda work: None)
    retriever: Any = SimpleNamespace(stage=stage, load=loaded.append)
    assert list(run.trainer.plan(run.candidates, retriever)) == [stage, run.model.stage]
    run.trainer.fit(run.train, run.valid)
    assert loaded == [run.trainer.cache.folder(stage)] and loaded[0].is_dir()
