"""One list of checks for every model of the table, ours and RecBole's own."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.model.base import LLMRecommender
from recbole_llm.model.lora_ranker import LoRARanker
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.registry import MODELS

BASELINES = ["Pop", "BPR", "LightGCN", "NeuMF", "GRU4Rec", "NextItNet", "BERT4Rec", "SASRec"]
OWN = {"LlamaRec": {"lora_train_mode": "prefix"}}  # what the shared tiny settings say and a model cannot do
BACKBONES = [f"ALLMRec/{cf_model}" for cf_model in ("GRU4Rec", "NextItNet", "BERT4Rec", "NeuMF", "BPR")]
BACKBONES += ["Laser/GRU4Rec", "Laser/BERT4Rec"]
every_backbone = pytest.mark.parametrize("name", [*MODELS, *BASELINES, *BACKBONES], indirect=True, scope="module")
ours_on_every_backbone = pytest.mark.parametrize("name", [*MODELS, *BACKBONES], indirect=True, scope="module")
ours_only = pytest.mark.parametrize("name", [*MODELS], indirect=True, scope="module")
CAPABILITIES = ["uses_item_text", "uses_cf_model", "scores_unseen_items", "scores_full_catalogue"]


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
    made.name, made.folder, made.settings, made.ranks = name, folder, settings, made.trainer.ranks
    return made


@pytest.fixture(scope="module")
def asked(made) -> tuple:
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


def test_the_same_seed_gives_bit_equal_metrics(made, tmp_path):
    again = run_recbole_llm(made.name, "tiny", config_dict={**made.settings, "checkpoint_dir": str(tmp_path)})
    assert dict(again["test_result"]) == dict(made.result)


def test_what_is_kept_gives_bit_equal_ranks(made, assemble):
    loaded = assemble(made.name, made.settings)
    if hasattr(loaded.model, "run_stages"):
        loaded.trainer.fit(loaded.train, loaded.valid)
        assert not any(loaded.model.cache.seconds.values())
        result = loaded.trainer.evaluate(loaded.test)
    else:
        loaded.trainer.eval_collector.data_collect(loaded.train)
        result = loaded.trainer.evaluate(loaded.test, model_file=made.trainer.saved_model_file)
    assert dict(result) == dict(made.result) and loaded.trainer.ranks.ranks == made.ranks.ranks


def test_evaluation_leaves_its_input_as_it_was(made, asked):
    batch, _ = asked
    before = {key: tensor.clone() for key, tensor in batch[0].interaction.items()}
    made.trainer._full_sort_batch_eval(batch)
    after = batch[0].interaction
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@every_backbone
@torch.no_grad()
def test_a_users_scores_depend_on_nobody_else(made, asked):
    (interaction, *_), candidates = asked
    together = made.trainer._candidate_scores(interaction[:7], candidates[:7])
    alone = [made.trainer._candidate_scores(interaction[i : i + 1], candidates[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=0)
    assert together.shape == candidates[:7].shape and torch.isfinite(together).all()


# -- our own -----------------------------------------------------------------------------------------------------------


@ours_only
def test_what_a_model_needs_and_can_do_stands_in_its_class(made):
    assert all(isinstance(getattr(type(made.model), flag), bool) for flag in CAPABILITIES)


@ours_on_every_backbone
def test_the_loss_of_one_batch_falls_and_only_what_trains_moves(made, assemble):
    model = assemble(made.name, made.settings).model.train()
    if model.uses_cf_model:
        model.run_stages()  # they are kept; without the first of them, every item is the same
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = isinstance(model, LLMRecommender)  # a language model, which AlphaRec has none of
    assert 0 < len(trained) <= len(before) - frozen
    others = model.cf.model.state_dict() if model.uses_cf_model else {}
    others_before = {key: tensor.clone() for key, tensor in others.items()}
    assert bool(others) == model.uses_cf_model
    batch = next(iter(made.train))[:16]
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    left = 0.7 if isinstance(model, LoRARanker) else 0.9  # in front of a frozen LM that is random, there is less to win
    assert losses[-1] < left * losses[0]
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != (key in trained), key
    assert all(torch.equal(tensor, others_before[key]) for key, tensor in others.items())


@ours_on_every_backbone
def test_nothing_of_the_base_model_is_kept_on_disk(made, tiny_lm):
    """No tensor of it by name, and none by content; what is constant, such as a fresh norm, tells nothing."""
    base = load_file(tiny_lm / "model.safetensors")
    contents = {_content(tensor) for tensor in base.values() if tensor.unique().numel() > 1}
    kept = {file: load_file(file) for file in (made.folder / "stages").rglob("*.safetensors")}
    assert kept and contents
    for file, tensors in kept.items():
        assert not base.keys() & tensors.keys(), file
        assert not contents & {_content(tensor) for tensor in tensors.values()}, file
    if isinstance(made.model, LoRARanker):
        size = (tiny_lm / "model.safetensors").stat().st_size
        assert all(file.stat().st_size < size / 2 for file in kept)
        assert all("lora_" in key for tensors in kept.values() for key in tensors)
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
