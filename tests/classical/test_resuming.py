"""A training of RecBole's trainer that is killed between two epochs ends as one that was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.trainer import Trainer

from recbole_llm import run_results
from recbole_llm.classical import resuming
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.leftovers import unfinished
from recbole_llm.store.locks import only_one

SMALL = {"hidden_size": 16, "n_layers": 1, "n_heads": 2, "inner_size": 16, "embedding_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {},
    "SASRec": {
        "sequence_ema_decay": 0.9,
        "sequence_warmup_steps": 5,
        "sequence_loss": "sampled_softmax",
        "sequence_negatives": 20,
    },
    "BERT4Rec": {"train_mode": "sequence"},
    "GRU4Rec": {"train_mode": "prefix", "loss_type": "BPR"},
    "SGL": {},  # draws a graph for each epoch
    "MultiVAE": {"anneal_cap": 0.2, "total_anneal_steps": 20, "latent_dimension": 8, "mlp_hidden_size": [16]},  # counts its steps
    "DiffRec": {
        "noise_schedule": "linear",
        "reweight": True,
        "mean_type": "x0",
        "sampling_steps": 0,
        "steps": 5,
    },  # keeps its losses
    "AlphaRec": {},
}
EPOCHS = 5


def run(model: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record, without what times and names of files change, and the best weights."""
    values = {
        **settings,
        **SMALL,
        "epochs": EPOCHS,
        "stopping_step": 10,
        "use_gpu": False,
        "learning_rate": 0.01,
        **MODELS[model],
    }
    record = json.loads(Path(run_recbole_llm(model, "tiny", config_dict=values)["record"]).read_text())
    state = torch.load(Path(settings["checkpoint_dir"]) / record["checkpoint"]["file"], weights_only=True)
    kept = ("results", "ranks", "best_valid_result")
    return {name: record[name] for name in kept}, {**state["state_dict"], "epoch": torch.tensor(state["epoch"])}


def killed(monkeypatch: pytest.MonkeyPatch, epoch: int, model: str, settings: Mapping[str, Any]) -> None:
    """A run that ends in place of its ``epoch``-th epoch, counted from where it starts."""
    train, calls = Trainer._train_epoch, count(1)

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return train(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", dying)
        with pytest.raises(KeyboardInterrupt):
            run(model, settings)


@pytest.mark.parametrize(("model", "eval_step"), [("BPR", 1), ("MultiVAE", 1), *((model, 0) for model in MODELS)])
def test_a_killed_training_ends_as_an_uninterrupted_one(
    model: str,
    eval_step: int,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings["eval_step"] = eval_step  # 0: RecBole keeps the weights of the last epoch
    whole = run(model, {**settings, "checkpoint_dir": str(tmp_path / "whole")})
    own = {**settings, "save_every_seconds": 0}
    killed(monkeypatch, 3, model, own)  # in place of the third epoch, which is number 2
    killed(monkeypatch, 2, model, own)
    root = Path(own["checkpoint_dir"])
    assert len(unfinished(root)) == 1
    with caplog.at_level("INFO"):
        again = run(model, own)
    assert [line.partition(" of ")[0] for line in caplog.messages if "resuming" in line] == [
        "resuming from epoch 2",
        "resuming from epoch 3",
    ]
    assert again[0] == whole[0]
    assert again[1].keys() == whole[1].keys() and all(torch.equal(again[1][name], whole[1][name]) for name in whole[1])
    assert not unfinished(root)


@pytest.mark.parametrize(
    ("lost", "message"),
    [("unfinished/*/epoch/values.json", "is missing; delete the folder"), ("BPR-*.pth", "the best weights so far, is missing")],
)
def test_a_state_that_lacks_a_file_is_named_and_the_training_starts_anew(
    lost: str,
    message: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = run("BPR", {**settings, "checkpoint_dir": str(tmp_path / "whole")})
    own = {**settings, "save_every_seconds": 0}
    killed(monkeypatch, 3, "BPR", own)
    (file,) = Path(own["checkpoint_dir"]).glob(lost)
    file.unlink()
    assert run("BPR", own)[0] == whole[0]
    assert [line for line in caplog.messages if message in line] and not [line for line in caplog.messages if "resuming" in line]


def test_the_same_run_beside_it_neither_reads_nor_writes_the_state(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = {**settings, "save_every_seconds": 0}
    killed(monkeypatch, 3, "BPR", own)
    (folder,) = Path(own["checkpoint_dir"]).glob("unfinished/[!.]*")
    with only_one(folder) as held:
        assert held and not unfinished(Path(own["checkpoint_dir"]))
        run("BPR", own)
    assert (folder / "epoch").is_dir() and not [line for line in caplog.messages if "resuming" in line]


def test_the_curve_and_the_seconds_go_on(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own, curves = {**settings, "save_every_seconds": 0}, []
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "time", SimpleNamespace(monotonic=count(0, 1000).__next__))  # a clock of 1,000 s a look
        killed(monkeypatch, 3, "BPR", own)
    monkeypatch.setattr(run_results, "write_curves", lambda *given: curves.append(given[2]))
    run("BPR", own)
    assert [epoch for epoch, _ in curves[0].points["loss"]] == list(range(EPOCHS))
    (record,) = Path(own["checkpoint_dir"]).glob("runs/*/record.json")
    assert json.loads(record.read_text())["seconds"]["train"] > 1000
