"""Warm-up, averaged weights, and the other keys of ``train_mode: sequence`` in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_llm import quick_start
from recbole_llm.classical.train_modes import trainer_class
from recbole_llm.config import LLMConfig

STILL = {"attn_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "train_batch_size": 64}


def prepare(settings: dict[str, Any], model: str = "SASRec", **values: Any) -> Any:
    return quick_start.assemble(LLMConfig(model, "tiny", config_dict={**settings, **STILL, **values}))


def test_the_learning_rate_rises_linearly_to_its_value(settings: dict[str, Any]) -> None:
    run = prepare(settings, sequence_warmup_steps=4, learning_rate=0.01, epochs=2)
    optimizer, rates = run.trainer.optimizer, []
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    run.trainer.fit(run.train, run.valid)
    assert rates[:6] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_averaged_weights_are_validated_saved_and_tested(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(settings, sequence_ema_decay=0.9, epochs=2)
    trainer, model = run.trainer, run.trainer.model
    expected: dict[str, torch.Tensor] = {}

    def average(*_: Any) -> None:  # the first step's weights, then an exponential average
        for name, weight in model.named_parameters():
            known = expected.get(name, weight.detach())
            expected[name] = 0.9 * known + 0.1 * weight.detach()

    trainer.optimizer.register_step_post_hook(average)
    seen = []
    evaluate = type(trainer).evaluate
    monkeypatch.setattr(
        type(trainer),
        "evaluate",
        lambda self, *args, **kwargs: seen.append(model.item_embedding.weight.clone()) or evaluate(self, *args, **kwargs),
    )
    trainer.fit(run.train, run.valid)
    torch.testing.assert_close(seen[-1], expected["item_embedding.weight"])  # in the last validation
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert not torch.allclose(own["item_embedding.weight"], seen[-1], atol=1e-4)  # the optimiser's go on
    trainer._save_checkpoint(1)
    trainer.load_best()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name])


def test_a_resumed_training_has_the_average_and_the_warm_up_of_the_whole_one(settings: dict[str, Any]) -> None:
    def fit(epochs: int, resume: str | None = None) -> Any:
        run = prepare(settings, sequence_ema_decay=0.9, sequence_warmup_steps=9, sequence_loss="softmax", epochs=epochs)
        if resume:
            run.trainer.resume_checkpoint(resume)
        run.trainer.fit(run.train, run.valid)
        return run.trainer

    whole, resumed = fit(3), fit(3, fit(1).saved_model_file)
    for one, other in ((whole.model, resumed.model), (whole._average, resumed._average)):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec"])
@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
def test_every_loss_trains(settings: dict[str, Any], model: str, loss: str) -> None:
    more = {"sequence_loss": loss, "sequence_negatives": 8, "train_mode": "sequence", "epochs": 4, "learning_rate": 0.003}
    run = prepare(settings, model, **more)
    run.trainer.fit(run.train, run.valid)
    first, second, *rest = run.trainer.train_loss_dict.values()  # BERT4Rec's masks are others in each epoch
    assert sum(rest) < first + second


@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec"])
def test_the_softmax_is_the_models_own_loss(settings: dict[str, Any], model: str) -> None:
    run = prepare(settings, model, train_mode="sequence")
    other = prepare(settings, model, train_mode="sequence", sequence_loss="softmax").config
    batch = next(iter(run.trainer.batches(run.config, run.model, run.train)[0]))
    found = []
    for config in (run.config, other):
        run.model.zero_grad()
        loss = run.trainer.batches(config, run.model, run.train)[1](batch)
        loss.backward()
        found.append((loss.detach(), run.model.item_embedding.weight.grad.clone()))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("key", ["sequence_loss", "sequence_warmup_steps", "sequence_ema_decay", "sequence_negatives", "gbce_t"])
def test_each_key_names_the_result_of_a_model_inside_a_run(key: str) -> None:
    values = {
        "sequence_loss": "gbce",
        "sequence_warmup_steps": 5,
        "sequence_ema_decay": 0.9,
        "sequence_negatives": 7,
        "gbce_t": 0.1,
    }
    plain, given = (LLMConfig("SASRec", "tiny", config_dict=one) for one in ({}, {key: values[key]}))
    assert plain.recbole_fingerprint != given.recbole_fingerprint and plain.fingerprint != given.fingerprint


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("BPR", {"sequence_loss": "softmax"}, "sequence_loss: softmax needs train_mode: sequence; BPR .*Remove sequence_loss"),
        (
            "SASRec",
            {"train_mode": "prefix", "sequence_warmup_steps": 3},
            "sequence_warmup_steps: 3 needs .* train_mode: prefix here",
        ),
        ("TALLRec", {"sequence_ema_decay": 0.9}, "sequence_ema_decay: 0.9 needs .*cf_config or retriever_config"),
    ],
)
def test_runs_that_would_not_read_a_key_refuse_it(model: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_class(LLMConfig(model, "tiny", config_dict=values))
