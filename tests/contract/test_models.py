"""One list of checks for every model of the table, ours and RecBole's own."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.utils import ModelType
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_llm.evaluation.recommender import Recommender, recommender_of
from recbole_llm.llm.generation import Generator
from recbole_llm.llm.scoring import Scorer
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import MODELS, SHORTCUTS
from recbole_llm.store.stages import Stage, Work, in_order
from recbole_llm.training.loop import TrainingLoop
from tests.contract.models import BASELINES, OWN, PUBLISHED, TRAINED, TRAINING_STAGES

PRODUCTS = ["BPR", "LightGCN", "GRU4Rec", "NextItNet", "BERT4Rec", "SASRec", "Cascade", "Laser", "AlphaRec"]
NO_RANKING = ["TALLRec", "LlamaRec", "LoRACocktail", "MoLoRec", "WeaveRec", "ALLMRec", "NeuMF"]  # of the whole catalogue
RANKING = [name for name in (*MODELS, *BASELINES) if name not in NO_RANKING]
BACKBONES = [f"ALLMRec/{cf_model}" for cf_model in ("GRU4Rec", "NextItNet", "BERT4Rec", "NeuMF", "BPR")]
BACKBONES += ["Laser/GRU4Rec", "Laser/BERT4Rec"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]
every_backbone = pytest.mark.parametrize("name", [*MODELS, *BASELINES, *OTHERS], indirect=True, scope="module")
trained_on_every_backbone = pytest.mark.parametrize("name", [*TRAINED, *OTHERS], indirect=True, scope="module")
every_ranking = pytest.mark.parametrize("name", RANKING, indirect=True, scope="module")
ours_only = pytest.mark.parametrize("name", [*MODELS], indirect=True, scope="module")
CAPABILITIES = [
    "uses_item_text",
    "uses_cf_model",
    "scores_unseen_items",
    "scores_full_catalogue",
    "supports_init_from",
    "trained_in_stages",
    "shortcut",
]


@pytest.fixture(scope="module", params=[*MODELS, *BASELINES])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(name, module_settings, tmp_path_factory, assemble) -> SimpleNamespace:
    """A model trained and tested once, for all checks; ``MODEL/BACKBONE`` is one on another collaborative model."""
    name, _, cf_model = name.partition("/")
    folder = tmp_path_factory.mktemp(name)
    settings = {**module_settings, "checkpoint_dir": str(folder), **OWN.get(name, {})}
    if cf_model:
        settings |= {"cf_model": cf_model, "cf_config": {**settings["cf_config"], "embedding_size": 16}}
    made = assemble(name, settings)
    made.trainer.fit(made.train, made.valid)
    made.result = made.trainer.evaluate(made.test)
    made.name, made.folder, made.settings, made.ranks = name, folder, settings, deepcopy(made.trainer.ranks)
    return made


def score(made: SimpleNamespace, interaction, candidates) -> torch.Tensor:
    """Scores by the model itself, none of them from a cache."""
    own = next(iter(made.trainer.recommender.variants().values()))
    return own.score(interaction, candidates)


def stages(made: SimpleNamespace) -> list[Stage]:
    """All stages of a model, inputs first."""
    return in_order(made.trainer.recommender.plan(made.candidates))


@pytest.fixture(scope="module")
def first_batch(made) -> tuple:
    """The first batch of the test split, with its candidates."""
    interaction, history, positive_u, positive_i = next(iter(made.test))
    candidates = made.test.candidates.lookup(interaction["user_id"], positive_i)
    return (interaction, history, positive_u, positive_i), candidates


# -- every model -------------------------------------------------------------------------------------------------------


@every_backbone
def test_every_evaluated_user_has_a_rank_and_every_metric_is_finite(made):
    assert all(np.isfinite(value) for value in made.result.values())
    users = sorted(made.test.candidates.users.tolist())
    assert sorted(made.ranks.users) == users and len(users) == 60
    assert all(1 <= rank <= 10 for rank in made.ranks.ranks)
    assert made.result["hit@1"] == pytest.approx(np.mean(np.array(made.ranks.ranks) == 1))


def test_candidates_are_the_same_for_every_model(made, module_settings, assemble):
    reference = assemble("Pop", module_settings)
    for phase in ("valid", "test"):
        assert getattr(made, phase).candidates.sha256 == getattr(reference, phase).candidates.sha256


@pytest.mark.parametrize("name", BASELINES, indirect=True, scope="module")
def test_the_same_seed_gives_bit_equal_metrics(made, tmp_path):
    """The models of this package: test_independence.py."""
    again = run_recbole_llm(made.name, "tiny", config_dict={**made.settings, "checkpoint_dir": str(tmp_path)})
    assert dict(again["test_result"]) == dict(made.result)


@pytest.mark.parametrize("name", [*BASELINES, "AlphaRec"], indirect=True, scope="module")
def test_saved_weights_give_bit_equal_ranks(made, assemble):
    """The models that are trained in stages: test_independence.py."""
    loaded = assemble(made.name, made.settings)
    if stages(loaded):
        loaded.trainer.cache.run(*stages(loaded))
    loaded.trainer.recommender.load(loaded.trainer.cache)
    loaded.trainer.eval_collector.data_collect(loaded.train)
    result = loaded.trainer.evaluate(loaded.test, model_file=made.trainer.saved_model_file)
    assert not any(loaded.trainer.cache.seconds.values())
    assert dict(result) == dict(made.result) and loaded.trainer.ranks.ranks == made.ranks.ranks


def test_evaluation_leaves_its_input_as_it_was(made, first_batch):
    batch, _ = first_batch
    before = {key: tensor.clone() for key, tensor in batch[0].interaction.items()}
    made.trainer._full_sort_batch_eval(batch)
    after = batch[0].interaction
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@every_backbone
@torch.no_grad()
def test_a_users_scores_depend_on_nobody_else(made, first_batch):
    (interaction, *_), candidates = first_batch
    together = score(made, interaction[:7], candidates[:7])
    alone = [score(made, interaction[i : i + 1], candidates[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=0)
    assert together.shape == candidates[:7].shape and torch.isfinite(together).all()


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.seen |= {tuple(found.shape) for found in tree_leaves(result) if isinstance(found, torch.Tensor)}
        return result


@every_ranking
@torch.no_grad()
def test_candidates_have_the_scores_of_a_full_ranking_without_its_cost(made, first_batch):
    """Where scores are products of vectors, no score of another item is computed."""
    (interaction, *_), candidates = first_batch
    variants = made.trainer.recommender.variants()
    variant = variants[made.settings.get("cheap_model", "SASRec") if made.name == "Cascade" else made.name]
    whole = variant.score_catalogue(interaction).view(len(interaction), -1).float()  # [B, I]
    variant.score(interaction, candidates)  # looks how the model scores
    with Shapes() as shapes:
        scores = variant.score(interaction, candidates).float()
    expected = whole.gather(1, candidates)
    largest = float(expected[expected.isfinite()].abs().max())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6 * largest)
    assert len({*whole.shape, *candidates.shape}) == 3
    assert not shapes.seen & {tuple(whole.shape), (whole.numel(),)} or made.name not in PRODUCTS


@every_backbone
@torch.no_grad()
def test_answers_are_generated_from_the_prompts_that_are_scored(made, first_batch, monkeypatch):
    """By the models whose papers rank by generated titles, and by no other."""
    (interaction, *_), candidates = first_batch
    variants = made.trainer.recommender.variants()
    protocol, rows = PUBLISHED.get(made.name, (None, []))
    assert [row for row, variant in variants.items() if variant.answers] == rows
    assert made.trainer.recommender.published == protocol
    read: dict[str, tuple] = {}
    answered = Generator.__call__

    def scorer(self, model, prompts, answers, soft=None):
        read["scored"] = model, prompts, soft
        return torch.zeros(len(answers), len(answers[0]))

    def generator(self, model, prompts, soft=None, complete=None):
        read["generated"] = model, prompts, soft
        return answered(replace(self, max_new_tokens=8), model, prompts, soft, complete)

    monkeypatch.setattr(Scorer, "__call__", scorer)
    monkeypatch.setattr(Generator, "__call__", generator)
    users = interaction["user_id"].tolist()[:7]
    for row in rows:
        variants[row].score(interaction[:7], candidates[:7])
        answers = variants[row].answers
        found = answers.generate(users, candidates[:7])
        (scored, prompts, soft), (generated, same, also) = read["scored"], read["generated"]
        assert scored is generated and prompts == same and len(found) == 7
        assert (soft is None) == (also is None) == (row != "ALLMRec") and (soft is None or torch.equal(soft, also))
        assert found == [answers.generate(users[i : i + 1], candidates[i : i + 1])[0] for i in range(7)]
        assert [*answers.titles][1:] == made.model.parts.domain.items.names[1:]


@pytest.mark.parametrize("mask_history", [True, False])
def test_a_full_ranking_lists_no_item_of_a_users_history(made, assemble, monkeypatch, mask_history):
    """Of no model, whatever it reads; a mask that RecBole leaves out for sequential models is missed."""
    changes = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "MAX_ITEM_LIST_LENGTH": 5, "retriever_top": 8}
    full = assemble(made.name, made.settings, **changes, mask_history=mask_history, retriever_config=made.settings["cf_config"])
    full.trainer.fit(full.train, full.valid)
    lists, collect = [], full.trainer.eval_collector.eval_batch_collect

    def listed(scores, interaction, positive_u, positive_i):
        for row, user, target in zip(scores, interaction["user_id"].tolist(), positive_i.tolist(), strict=True):
            lists.append((user, target, row.argsort(descending=True)[:20].tolist(), torch.isfinite(row).sum().item()))
        collect(scores, interaction, positive_u, positive_i)

    monkeypatch.setattr(full.trainer.eval_collector, "eval_batch_collect", listed)
    full.trainer.evaluate(full.test)
    histories = full.test._dataset.histories
    masked = mask_history or full.config["MODEL_TYPE"] != ModelType.SEQUENTIAL
    assert sorted(user for user, *_ in lists) == [*range(1, 61)] == sorted(full.trainer.ranks.users)
    ranks = dict(zip(full.trainer.ranks.users, full.trainer.ranks.ranks, strict=True))
    seen = 0
    for user, target, items, finite in lists:
        before = {*histories.before(user, "test").tolist()}
        assert target == histories.target(user, "test") and 0 not in items
        assert finite == 40 - (len(before) if masked else 0)  # the target is never masked
        assert ranks[user] <= finite and (ranks[user] > 20 or items[int(ranks[user]) - 1] == target)
        seen += len(before.intersection(items))
    assert (seen == 0) == masked


# -- our own -----------------------------------------------------------------------------------------------------------


@ours_only
def test_what_a_model_needs_and_can_do_stands_in_its_class(made):
    assert isinstance(made.model, Recommender) and recommender_of(made.model, made.config) is made.model
    assert all(isinstance(getattr(type(made.model), flag), bool) for flag in CAPABILITIES)


@pytest.mark.parametrize("name", [*SHORTCUTS], indirect=True, scope="module")
def test_a_shortcut_trains_nothing_and_its_record_says_what_it_is(made, tmp_path):
    assert made.model.shortcut and not [*made.model.parameters()] and not made.trainer.trained_parameters
    result = run_recbole_llm(made.name, "tiny", config_dict={**made.settings, "checkpoint_dir": str(tmp_path)})
    record = json.loads(Path(result["record"]).read_text())
    assert record["shortcut"] is True and record["trained_parameters"] == 0 and not [*tmp_path.glob("*.pth")]
    assert (record["backbone"] is not None) == (made.name == "NearestTexts") == bool(record["stages"])


@ours_only
def test_a_trained_and_evaluated_model_plans_the_same_stages_again(made):
    """Nothing that RecBole or torch does to a model in between (``eval``, ``to``) touches its parts."""
    made.model.train()
    made.model.eval()
    assert {stage.name for stage in stages(made)} == {*made.trainer.cache.seconds}
    assert all(made.trainer.cache.is_cached(stage) for stage in stages(made))


@ours_only
def test_variants_have_the_same_ranks_in_whichever_order_they_are_evaluated(made):
    variants = {name: replace(variant, fingerprint=None) for name, variant in made.trainer.recommender.variants().items()}
    assert next(iter(variants)) == made.name

    def ranks(names: Iterator[str]) -> dict[str, list[int]]:
        found = {}
        for name in names:
            made.trainer.evaluate(made.test, variant=variants[name])
            found[name] = made.trainer.ranks.ranks
        return found

    forward, backward = ranks(iter(variants)), ranks(reversed(variants))
    assert forward == backward and forward[made.name] == made.ranks.ranks
    identities = [variant.fingerprint for variant in made.trainer.recommender.variants().values() if variant.fingerprint]
    assert len({*identities}) == len(identities)  # cached scores of one are never taken for another's


def overfit(loop: TrainingLoop) -> list[float]:
    """Losses of 50 steps on one batch; everything that trains moves, and nothing else of what the loop holds."""
    before = {key: parameter.detach().clone() for key, parameter in loop.parameters.items()}
    trained = {key: parameter for key, parameter in loop.parameters.items() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = torch.stack([part() for part in loop.loss(1)]).sum()  # Laser renews its item matrix at others
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for key, parameter in loop.parameters.items():
        assert torch.equal(parameter, before[key]) != (key in trained), key
    return losses


@pytest.mark.parametrize("name", TRAINED, indirect=True, scope="module")
def test_the_loss_of_one_batch_falls_and_only_what_trains_moves(made, tmp_path, monkeypatch, assemble):
    """In every kind of stage that trains; AlphaRec is trained by RecBole's loop instead."""
    fresh, losses = assemble(made.name, made.settings), {}
    model, cache = fresh.model, fresh.trainer.cache
    if model.trained_in_stages:
        frozen = [model.parts.backbone.load(cache).model]
        if model.uses_cf_model:
            model.cf.load(cache.folder(model.cf.stage))
            frozen.append(model.cf.model)
        before = [_state(part) for part in frozen]
        monkeypatch.setattr(TrainingLoop, "run", lambda loop: losses.update({loop.name: overfit(loop)}))
        chosen = [stage for stage in stages(fresh) if stage.name in TRAINING_STAGES[made.name]]
        assert len(chosen) == len(TRAINING_STAGES[made.name])
        for stage in chosen:
            (tmp_path / stage.name).mkdir()
            torch.manual_seed(0)
            stage.build(Work(tmp_path / stage.name, tmp_path / f"{stage.name}.scratch", cache))
        assert len(losses) == len(chosen)
        for part, state in zip(frozen, before, strict=True):
            after = _state(part)
            assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    else:
        model.load(cache)
        batch = next(iter(fresh.train))[:16]
        parameters = dict(model.named_parameters())
        losses["RecBole"] = overfit(SimpleNamespace(parameters=parameters, loss=lambda _: [lambda: model.calculate_loss(batch)]))
    left = 0.9 if model.uses_cf_model else 0.7  # in front of a frozen LM that is random, there is less to win
    assert all(found[-1] < left * found[0] for found in losses.values()), losses


@ours_only
def test_recboles_loss_is_there_for_models_that_recbole_trains_and_for_no_others(made):
    batch = next(iter(made.train))[:16]
    if made.model.trained_in_stages:
        with pytest.raises(NotImplementedError):
            made.model.calculate_loss(batch)
    else:
        assert torch.isfinite(made.model.calculate_loss(batch))


@pytest.mark.parametrize(
    ("model", "training", "key"),
    [
        ("ALLMRec", "alignment", "stage1_learning_rate"),
        ("ALLMRec", "projection", "stage2_learning_rate"),
        *(("Laser", name, f"{name}_learning_rate") for name in ("warmup", "phase1", "phase2")),
    ],
)
def test_a_training_that_diverges_names_its_own_learning_rate(model, training, key, settings, assemble, monkeypatch):
    step = TrainingLoop._step

    def spoiled(loop):
        sound = loop.loss
        if loop.name == training:
            loop.loss = lambda step: [lambda part=part: part() * float("nan") for part in sound(step)]
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_step", spoiled)
    made = assemble(model, settings, train_samples=16, valid_users=8, warmup_epochs=1)
    with pytest.raises(ValueError, match=f"{training}: the loss is nan at step 0; lower `{key}`"):
        made.trainer.cache.run(*stages(made))


@trained_on_every_backbone
def test_nothing_of_the_base_model_is_written_to_disk(made, tiny_lm):
    """No tensor of it by name, and none by content; what is constant, such as a fresh norm, tells nothing."""
    base = load_file(tiny_lm / "model.safetensors")
    contents = {_content(tensor) for tensor in base.values() if tensor.unique().numel() > 1}
    written = {file: load_file(file) for file in (made.folder / "stages").rglob("*.safetensors")}
    assert written and contents
    for file, tensors in written.items():
        assert not base.keys() & tensors.keys(), file
        assert not contents & {_content(tensor) for tensor in tensors.values()}, file
    if not made.model.uses_cf_model and made.model.trained_in_stages:  # adapters alone
        own = {file: tensors for file, tensors in written.items() if not file.parent.name.startswith("cf-")}  # of a retriever
        size = (tiny_lm / "model.safetensors").stat().st_size
        assert all(file.stat().st_size < size / 2 for file in own)
        assert all("lora_" in key for tensors in own.values() for key in tensors)
    assert not [path.name for path in (made.folder / "stages").iterdir() if path.suffix in (".unfinished", ".tmp")]


@pytest.mark.parametrize("name", ["Laser"], indirect=True, scope="module")
def test_a_full_ranking_of_a_model_and_of_its_collaborative_model_stand_in_one_record(made):
    full = {"eval_args": {"mode": "full"}, "metrics": ["Recall", "NDCG", "MRR"], "topk": [10], "valid_metric": "NDCG@10"}
    result = run_recbole_llm(made.name, "tiny", config_dict={**made.settings, **full})
    record = json.loads(Path(result["record"]).read_text())
    assert record["candidates_sha256"] == {} and list(record["results"]) == [made.name, "SASRec"]
    names = {"recall@10", "ndcg@10", "mrr@10", "mrr"}
    for row, metrics in record["results"].items():
        ranks = np.array(list(record["ranks"][row].values()))
        assert len(ranks) == 60 and ranks.min() >= 1 and 10 < ranks.max() <= 40  # items that candidates leave out, too
        assert metrics.keys() == names and record["half_width_95"][row].keys() == names
        values = {"recall@10": ranks <= 10, "mrr@10": (ranks <= 10) / ranks, "mrr": 1 / ranks}
        for metric, by_user in values.items():
            assert metrics[metric] == pytest.approx(by_user.mean(), abs=1e-4), (row, metric)
            half_width = 1.96 * by_user.std(ddof=1) / np.sqrt(len(by_user))
            assert record["half_width_95"][row][metric] == pytest.approx(half_width, rel=0.03), (row, metric)
        assert metrics["mrr"] > metrics["mrr@10"]
    assert record["ranks"][made.name] != record["ranks"]["SASRec"]


def _content(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.float().numpy().tobytes()


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}
