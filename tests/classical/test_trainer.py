"""Which trainer a model gets, and checkpoints that are written whole and read without executing anything."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import recbole.trainer.trainer
import torch
from recbole.trainer import Trainer

from recbole_llm import quick_start, registry
from recbole_llm.classical.sequence import SequenceTraining
from recbole_llm.classical.train_modes import trainer_class
from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.config import LLMConfig


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def prepare(model: str, settings: dict[str, Any], **values: Any) -> tuple[Any, Any, Any, Any]:
    """A trainer and its loaders."""
    run = quick_start.assemble(LLMConfig(model, "tiny", config_dict={**settings, **values}))
    return run.trainer, run.train, run.valid, run.test


# -- which trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "mode", "sequence"),
    [
        ("SASRec", "auto", True),
        ("SASRec", "sequence", True),
        ("SASRec", "prefix", False),
        ("GRU4Rec", "auto", True),
        ("BERT4Rec", "auto", False),
        ("BPR", "auto", False),
        ("Pop", "prefix", False),
        ("EASE", "auto", False),
    ],
)
def test_whole_sequences_are_for_causal_models(model: str, mode: str, sequence: bool) -> None:
    trainer = trainer_class(LLMConfig(model, "tiny", config_dict={"train_mode": mode}))
    assert issubclass(trainer, ProtocolTrainer) and issubclass(trainer, Trainer)
    assert issubclass(trainer, SequenceTraining) == sequence


def test_other_models_refuse_whole_sequences(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train_mode: sequence needs .*STAMP is not one of .*Use train_mode: prefix"):
        prepare("STAMP", settings, train_mode="sequence")


def test_unknown_train_mode() -> None:
    with pytest.raises(ValueError, match="train_mode: 'whole' in config_dict is not one of auto, sequence, prefix"):
        trainer_class(LLMConfig("SASRec", "tiny", config_dict={"train_mode": "whole"}))


@pytest.mark.parametrize("model", sorted(registry.MODELS))
@pytest.mark.parametrize("mode", ["auto", "sequence", "prefix"])
def test_our_models_have_recboles_trainer_with_stages_and_no_train_mode_of_baselines(model: str, mode: str) -> None:
    trainer = trainer_class(LLMConfig(model, "tiny", config_dict={"train_mode": mode}))
    assert issubclass(trainer, ProtocolTrainer) and not issubclass(trainer, SequenceTraining)


@pytest.mark.parametrize(("model", "base"), [("Pop", "TraditionalTrainer"), ("RecVAE", "RecVAETrainer")])
def test_a_models_own_trainer_stays(model: str, base: str) -> None:
    bases = trainer_class(LLMConfig(model, "tiny")).__mro__
    assert base in [cls.__name__ for cls in bases]
    assert [cls.__name__ for cls in bases].index("ProtocolTrainer") == 1


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_names_are_unique_within_a_second(settings: dict[str, Any]) -> None:
    assert len({prepare("Pop", settings)[0].saved_model_file for _ in range(3)}) == 3


@pytest.mark.parametrize("model", ["ItemKNN", "EASE", "BPR"])
def test_own_checkpoints_reload(model: str, settings: dict[str, Any]) -> None:
    """ItemKNN and EASE keep scipy matrices, which only a pickle holds."""
    trainer, train, valid, test = prepare(model, settings)
    trainer.fit(train, valid, show_progress=False)
    before = trainer.evaluate(test)
    assert [path.suffix for path in Path(settings["checkpoint_dir"]).iterdir() if path.is_file()] == [".pth"]
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter)
    assert trainer.evaluate(test) == before


def test_a_checkpoint_of_another_process_reloads_as_data(settings: dict[str, Any]) -> None:
    first, train, valid, test = prepare("BPR", settings, epochs=2)
    first.fit(train, valid, show_progress=False)
    expected = first.evaluate(test)
    second, *_, test = prepare("BPR", settings, seed=5)  # another model; it did not write the file
    assert second.evaluate(test, load_best_model=False) != expected
    assert second.evaluate(test, model_file=first.saved_model_file) == expected


@pytest.mark.parametrize("use", ["evaluate", "resume_checkpoint"])
def test_a_malicious_checkpoint_is_refused_unexecuted(use: str, settings: dict[str, Any]) -> None:
    trainer, *_, test = prepare("BPR", settings)
    Path("plain.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save({"state_dict": trainer.model.state_dict(), "other_parameter": Trap()}, "zipped.pth")
    for file in ("plain.pth", "zipped.pth"):
        with pytest.raises(ValueError, match=f"{file}: not a checkpoint that can be loaded without executing code"):
            if use == "evaluate":
                trainer.evaluate(test, model_file=file)
            else:
                trainer.resume_checkpoint(file)
    assert not Path("executed").exists()
    torch.load("zipped.pth", weights_only=False)
    assert Path("executed").exists()  # the trap works


def test_a_resumed_training_ends_where_the_whole_one_does(settings: dict[str, Any]) -> None:
    def fit(epochs: int, resume: str | None = None) -> tuple[Any, Any]:
        still = {"attn_dropout_prob": 0, "hidden_dropout_prob": 0}
        trainer, train, valid, test = prepare("SASRec", settings, epochs=epochs, **still)
        if resume:
            trainer.resume_checkpoint(resume)
            assert trainer.start_epoch == 1
        trainer.fit(train, valid, show_progress=False)
        return trainer, test

    whole, test = fit(3)
    half, _ = fit(1)
    resumed, _ = fit(3, half.saved_model_file)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert whole.evaluate(test, load_best_model=False) == resumed.evaluate(test, load_best_model=False)


def test_a_killed_save_leaves_the_checkpoint_that_was_there(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, train, valid, _ = prepare("BPR", settings)
    trainer.fit(train, valid, show_progress=False)
    before = Path(trainer.saved_model_file).read_bytes()

    def killed(_: Any, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(1)
    assert Path(trainer.saved_model_file).read_bytes() == before
    assert [path for path in Path(settings["checkpoint_dir"]).iterdir() if ".tmp" in path.name] == []


# -- validation after training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [7, 1000])
def test_a_ranker_is_validated_after_training_on_the_users_of_early_stopping(settings: dict[str, Any], number: int) -> None:
    quick = {"train_samples": 8, "lora_epochs": 1, "valid_users": number}
    run = quick_start.assemble(LLMConfig("TALLRec", "tiny", config_dict={**settings, **quick}))
    score, result = run.trainer.fit(run.train, run.valid)
    users = run.model.parts.eval_users(run.candidates).draw(number).users
    assert sorted(run.trainer.ranks.users) == sorted(users) and run.trainer.validated == len(users) == min(number, 60)
    assert score == result["ndcg@5"] > 0
    run.trainer.evaluate(run.test)
    assert len(run.trainer.ranks.users) == 60  # the test has all users


def test_an_encoder_under_full_ranking_likewise(settings: dict[str, Any]) -> None:
    quick = {"train_samples": 8, "phase1_epochs": 1, "phase2_epochs": 0, "valid_users": 7, "eval_args": {"mode": "full"}}
    run = quick_start.assemble(LLMConfig("Laser", "tiny", config_dict={**settings, **quick, "eval_batch_size": 41}))
    score, _ = run.trainer.fit(run.train, run.valid)
    assert sorted(run.trainer.ranks.users) == sorted(run.model.valid_users())
    assert score == pytest.approx(run.model.valid_score(run.model.encode_histories, run.model.item_matrix), abs=1e-6)


def test_recboles_own_models_are_validated_on_all_users(settings: dict[str, Any]) -> None:
    run = quick_start.assemble(LLMConfig("BPR", "tiny", config_dict={**settings, "valid_users": 7}))
    run.trainer.fit(run.train, run.valid, show_progress=False)
    run.trainer.evaluate(run.valid)
    assert len(run.trainer.ranks.users) == 60 and run.trainer.validated is None


# -- scaled losses -----------------------------------------------------------------------------------------------------


def test_gradients_of_a_scaled_loss_are_clipped_once_they_are_unscaled(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RecBole clips the scaled ones, so that a step has gradients of 1e-4 of the norm; its scaler is for CUDA alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recbole.trainer.trainer.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu"))
    clip = {"max_norm": 0.01, "norm_type": 2}
    changes = {"enable_scaler": True, "clip_grad_norm": clip, "epochs": 1, "train_mode": "prefix", "use_gpu": False}
    trainer, train, *_ = prepare("SASRec", settings, **changes)
    norms: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None]))
        )
    )
    trainer._train_epoch(train, 0)
    assert len(norms) == len(train) and max(norms) == pytest.approx(0.01, rel=1e-3) and min(norms) > 0.005
