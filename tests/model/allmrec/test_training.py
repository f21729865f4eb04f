"""Both stages train what they should and nothing else: the LM, the collaborative model and held-out items are not touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.model.allmrec import alignment
from recbole_llm.model.allmrec.projection import SoftTokens
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.model.parts import histories_of
from recbole_llm.store.files import sha256_file
from recbole_llm.store.stages import Work
from recbole_llm.training.loop import TrainingLoop
from tests.model.allmrec.conftest import LISTWISE, PROMPTS, Made, codes, equal, run_stages, scores


@pytest.fixture
def projection(shared_settings: dict[str, Any], assemble: Any, tmp_path: Path) -> Callable[..., Made]:
    """``projection(**changes)``: stage 2 as it is before its first step, on the cached alignment: its loop, its soft tokens."""

    def projection(**changes: Any) -> Made:
        made, fill = assemble("ALLMRec", shared_settings, **changes), SoftTokens.fill
        made.trainer.cache.run(made.model.projection.alignment)

        def noted(soft: SoftTokens, *arguments: Any) -> Any:
            made.soft = soft
            return fill(soft, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingLoop, "run", lambda loop: setattr(made, "loop", loop))
            patch.setattr(SoftTokens, "fill", noted)
            made.model.projection_stage.build(Work(tmp_path, tmp_path / "scratch", made.trainer.cache))
            [part() for part in made.loop.loss(0)]
        made.causal = made.model.parts.backbone.load(made.trainer.cache)
        return made

    return projection


def batch_loss(made: Made, soft: SoftTokens, batch: Any) -> float:
    """Mean loss of the titles of the next items over their tokens, through the scorer."""
    targets = batch["item_id"]
    likelihood = made.model.projection.likelihood(made.causal, soft)
    with torch.no_grad():
        found = likelihood(histories_of(made.model, batch), targets[:, None], batch["user_id"].tolist())  # [B, 1]
    return -found.sum().item() / sum(len(likelihood.prompts.answers[item]) for item in targets.tolist())


def folder_sums(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# -- what is frozen ----------------------------------------------------------------------------------------------------


def test_stages_leave_the_lm_and_every_stage_before_them_as_they_were(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("ALLMRec", settings)
    model, cache = made.model, made.trainer.cache
    causal, read, fill = model.parts.backbone.load(cache), [], SoftTokens.fill
    lm = state(causal.model)
    model.cf.load(cache.run(model.cf.stage))
    known, files = state(model.cf.model), folder_sums(cache.folder(model.cf.stage))
    aligned = folder_sums(cache.run(model.projection.alignment))
    assert equal(state(model.cf.model), known)
    monkeypatch.setattr(SoftTokens, "fill", lambda soft, *given: (read.append(soft._codes.clone()), fill(soft, *given))[1])
    cache.run(model.projection_stage)
    joint = codes(made)["joint"]
    assert read and all(torch.equal(found[1:], joint[1:]) for found in read)  # what stage 1 has left
    assert not any(cache.seconds[name] == 0 for name in ("alignment", "projection"))
    model.load(cache)
    assert equal(state(causal.model), lm) and equal(state(model.cf.model), known)
    assert folder_sums(cache.folder(model.cf.stage)) == files and folder_sums(cache.folder(model.projection.alignment)) == aligned
    assert len(files) == 4 and len(aligned) > 7  # with their manifests, curves, and how much they trained
    projectors = load_file(cache.folder(model.projection_stage) / "projectors.safetensors")
    assert set(projectors) == {name for name, _ in model.soft.named_parameters()}


def test_nothing_trains_the_collaborative_model_whatever_the_model_around_it_does(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = assemble("ALLMRec", settings), []
    model, states = made.model, CollaborativeModel.user_states
    assert model.cf.model.hidden_dropout_prob == 0.5

    def spy(cf: CollaborativeModel, *asked: Any) -> torch.Tensor:
        found = states(cf, *asked)
        training = any(module.training for module in cf.model.modules())
        seen.append((training, torch.equal(found, states(cf, *asked)), found.requires_grad))
        return found

    monkeypatch.setattr(CollaborativeModel, "user_states", spy)
    model.train()
    made.trainer.fit(made.train, made.valid)
    model.train()
    scores(
        SimpleNamespace(model=model, interaction=next(iter(made.test))[0][:3], candidates=torch.tensor([[1, 2], [3, 4], [5, 6]]))
    )
    assert len(seen) > 12 and {*seen} == {(False, True, False)}
    assert not {name for name, _ in model.named_parameters() if "cf" in name}


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> Path:
    """A tiny OPT with half of everything dropped in training, whose embeddings are narrower than its layers."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("lm") / "opt", AutoTokenizer.from_pretrained(tiny_lm)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        init_std=0.2,
        num_attention_heads=4,
        max_position_embeddings=512,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_lm_is_read_without_dropout_also_in_training(
    settings: dict[str, Any], assemble: Any, opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, loops = assemble("ALLMRec", settings, llm_path=str(opt)), []
    monkeypatch.setattr(TrainingLoop, "run", lambda loop: loops.append(loop))
    made.model.train()
    run_stages(made)
    lm, (_, projection) = made.model.parts.backbone.load(made.trainer.cache).model, loops
    assert projection.name == "projection" and not any(module.training for module in lm.modules())
    losses = [sum(part().item() for part in projection.loss(0)) for _ in range(3)]
    assert len({*losses}) == 1
    lm.train()
    assert sum(part().item() for part in projection.loss(0)) != losses[0]  # there is dropout, had it been left on


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stage_2_reaches_the_projectors_and_nothing_else(projection: Any, prompt: str) -> None:
    made = projection(**PROMPTS[prompt])
    made.model.cf.model.zero_grad(set_to_none=True)  # of its own training
    sum(part() for part in made.loop.loss(0)).backward()
    reached = {name: parameter.grad for name, parameter in made.loop.parameters.items()}
    assert len(reached) == 12  # two linear layers and a norm each, with biases
    assert all(name.startswith(("project_user", "project_item")) for name in reached)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in reached.values())
    assert all(p.grad is None for part in (made.causal.model, made.model.cf.model) for p in part.parameters())
    assert not made.soft._codes.requires_grad and not made.soft._text_codes.requires_grad


def test_the_loss_is_the_mean_over_the_tokens_of_the_targets(projection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read, encode = projection(), [], ExampleEncoder.__call__
    monkeypatch.setattr(
        ExampleEncoder, "__call__", lambda self, items, *rest, **more: (read.append(items), encode(self, items, *rest, **more))[1]
    )
    found = sum(part().item() for part in made.loop.loss(0))
    assert len(read) == 16
    targets = torch.tensor([items[-1] for items in read])
    likelihood = made.model.projection.likelihood(made.causal, made.soft)
    with torch.no_grad():
        likelihoods = likelihood([items[:-1] for items in read], targets[:, None], [1] * 16)  # [B, 1]
    tokens = sum(len(likelihood.prompts.answers[item]) for item in targets.tolist())
    assert found == pytest.approx(-likelihoods.sum().item() / tokens, abs=1e-4)


@pytest.mark.parametrize("stage", ["alignment", "projection"])
@pytest.mark.parametrize("every", [False, True])
def test_no_validation_or_test_item_is_trained_on_and_states_are_those_before_the_target(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, stage: str, every: bool
) -> None:
    made = assemble("ALLMRec", settings, all_positions=every, train_samples=None, stage1_epochs=1, stage2_epochs=1)
    model, cache, read, targets = made.model, made.trainer.cache, [], []
    cache.run(model.cf.stage)
    if stage == "projection":
        cache.run(model.projection.alignment)
    encode, states = ExampleEncoder.__call__, CollaborativeModel.user_states

    def spy(cf: CollaborativeModel, users: Any, histories: Any) -> torch.Tensor:
        read.extend(zip(users, map(list, histories), strict=True))
        return states(cf, users, histories)

    monkeypatch.setattr(CollaborativeModel, "user_states", spy)
    monkeypatch.setattr(
        ExampleEncoder,
        "__call__",
        lambda self, items, *rest, **more: (targets.append(items), encode(self, items, *rest, **more))[1],
    )
    monkeypatch.setattr(EvalUsers, "score", lambda self, score: 0.0)  # it reads the states of validation users
    cache.run(model.projection_stage if stage == "projection" else model.projection.alignment)
    trained_items = {user: model.parts.histories.items[user][:-2].tolist() for user in range(1, 61)}
    read = [(user, history) for user, history in read if history]  # an empty one was read for its width
    assert read and all(history == trained_items[user][: len(history)] for user, history in read)
    assert all(len(history) < len(trained_items[user]) for user, history in read)
    places = {(user, len(history)) for user, history in read}
    last = {(user, len(items) - 1) for user, items in trained_items.items() if len(items) > 1}
    assert places <= last if not every else len(places - last) > 60
    if stage == "projection":
        whole = [tuple(items) for items in trained_items.values()]
        known = {items[:end] for items in whole for end in range(2, len(items) + 1)} if every else {*whole}
        assert targets and {*map(tuple, targets)} <= known


def test_an_answer_is_a_title_and_its_end_without_soft_tokens(trained: Any) -> None:
    for changes in ({}, LISTWISE, {**LISTWISE, "top_k_target": 3}):
        made = trained(**changes)
        encoder = ExampleEncoder(made.model.parts.domain, made.builder, made.model.parts.examples)
        row, mask = encoder([3, 1, 4, 15], np.random.default_rng(0), made.model.n_items, known=[3, 1, 4, 15])
        answer = [token for token, wanted in zip(row.ids, mask, strict=True) if wanted]
        assert mask == sorted(mask) and row.soft_slots and not any(mask[place] for place in row.soft_slots)
        first = made.builder.answers[15][:-1]
        assert answer[: len(first)] == first
        assert len(answer) == len(first) + 1 or changes.get("top_k_target") == 3


def test_training_learns(trained: Any, assemble: Any, shared_settings: dict[str, Any]) -> None:
    """Stage 2's loss on training rows, before and after it."""
    made = trained(stage2_epochs=8, all_positions=True, train_samples=200)
    fresh = made.model.projection.soft_tokens(made.trainer.cache, made.causal)
    batch = next(iter(made.train))[:60]
    assert batch_loss(made, made.soft, batch) < 0.95 * batch_loss(made, fresh, batch)


@pytest.mark.parametrize(("changes", "told"), [({"stage1_learning_rate": 1e-6}, True), ({"stage1_epochs": 60}, False)])
def test_a_stage_1_that_is_hardly_trained_is_told(
    projection: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: bool
) -> None:
    projection(checkpoint_dir=str(tmp_path), all_positions=True, **changes)
    assert "vectors of items differ by" in caplog.text and ("raise stage1_epochs" in caplog.text) == told


@pytest.mark.parametrize(("bias", "told"), [(0.0, False), (50.0, True)])
def test_a_stage_2_that_makes_one_vector_of_all_items_is_told(
    trained: Any, caplog: pytest.LogCaptureFixture, bias: float, told: bool
) -> None:
    made = trained()
    soft = copy.deepcopy(made.soft)
    with torch.no_grad():
        soft._codes = torch.randn_like(soft._codes)  # as different as codes can be
        soft.project_item[-1].bias += bias
    caplog.set_level("INFO")
    caplog.clear()
    made.model.projection._report(soft)
    assert "soft tokens of items differ by" in caplog.text and ("a lower stage2_learning_rate" in caplog.text) == told


@pytest.mark.parametrize(("more", "beta"), [(0, 0.5), (1, 0.2)])
def test_beta_follows_the_size_of_the_whole_data_set_which_the_paper_counts(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, more: int, beta: float
) -> None:
    """Not that of the training split, which lacks two interactions of each user."""
    rows = sum(len(items) for items in assemble("ALLMRec", settings).model.parts.histories.items)
    monkeypatch.setattr(alignment, "LARGE", rows + more)
    assert assemble("ALLMRec", settings).model.alignment.config.weights.text_reconstruction == beta
