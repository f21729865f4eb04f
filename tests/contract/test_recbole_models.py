"""Every model of RecBole trains for an epoch and is evaluated; those that start from checkpoints read them safely."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pickle
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recbole.model
import torch
from recbole.trainer import Trainer

from recbole_llm import registry
from recbole_llm.classical.building import NEEDS
from recbole_llm.config import LLMConfig
from recbole_llm.quick_start import plan_run, run_recbole_llm
from recbole_llm.store.trials import trials
from tests.contract import recbole_data

Settings = Callable[..., dict[str, Any]]
KINDS = {
    file.stem: kind
    for kind in ("general", "sequential", "context_aware", "knowledge_aware")
    for file in (Path(recbole.model.__file__).parent / f"{kind}_recommender").glob("[a-z]*.py")
}
NAMES = registry._recbole_class_names()


def recbole_keys(name: str) -> str:
    """The text of RecBole's property file of a model."""
    file = Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


FAST = ["CFKG", "EASE", "FM", "KSR", "MKR", "RecVAE", "SGL", "SINE"]  # each of another loader, trainer, loss or data
SOFTMAX = [  # sequential models whose default is a softmax, and which have a pairwise loss, too
    name
    for name in NAMES
    if KINDS[name.lower()] == "sequential"
    and name not in ("CORE", "GRU4RecCPR", "SASRecCPR")
    and "loss_type" in recbole_keys(name)
]
DEAR = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in FAST]


def trained(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    done = run_recbole_llm(name, "rich", config_dict=settings)
    assert done["test_result"] and all(np.isfinite(value) for value in done["test_result"].values())
    return done


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recbole_data.write(tmp_path_factory.mktemp("rich"))


@pytest.fixture
def settings(rich: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def made(name: str, **changes: Any) -> dict[str, Any]:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            pytest.skip(f"{name} imports {NEEDS[name]}, which is not installed")
        return recbole_data.settings(name, KINDS[name.lower()], rich, tmp_path) | changes

    return made


def test_every_model_of_recbole_is_in_the_list() -> None:
    assert sorted(KINDS) == sorted(name.lower() for name in NAMES)


@pytest.mark.parametrize("name", [*FAST, *DEAR])
def test_a_model_trains_and_is_evaluated(name: str, settings: Settings) -> None:
    done = trained(name, settings(name))
    record = json.loads(Path(done["record"]).read_text())
    assert record["model"] == name and record["results"] == {name: dict(done["test_result"])}
    if "hit@1" in done["test_result"]:
        ranks = list(record["ranks"][name].values())
        assert len(ranks) == recbole_data.USERS and np.mean(np.array(ranks) == 1) == pytest.approx(done["test_result"]["hit@1"])
    else:
        assert 0 <= done["test_result"]["auc"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", recbole_data.VARIANTS)
def test_the_other_form_of_a_model_trains_too(name: str, settings: Settings) -> None:
    trained(name, settings(name, **recbole_data.VARIANTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOFTMAX)
def test_a_sequential_model_trains_with_a_pairwise_loss(name: str, settings: Settings) -> None:
    trained(name, settings(name, loss_type="BPR"))


@pytest.mark.parametrize("name", ["SASRecCPR", "GRU4RecCPR"])
def test_a_loss_for_which_recbole_ends_the_process_is_refused(name: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match=f"loss_type: BPR: RecBole's {name} has no such loss; give --loss_type=CE"):
        run_recbole_llm(name, "rich", config_dict=settings(name, loss_type="BPR"))


@pytest.mark.parametrize("name", [*FAST, *DEAR])
def test_a_plan_tells_what_a_model_costs_or_that_it_is_not_estimated(
    name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_llm.quick_start.trials", lambda seconds, worth=0.0: trials(0.0))
    plan = str(plan_run(name, "rich", config_dict=settings(name)))
    assert re.search(r"\d epochs? of", plan) or f"RecBole's trainer of {name}, not estimated" in plan, plan


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_training_ends_as_an_uninterrupted_one(name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(folder: str) -> dict[str, torch.Tensor]:
        changes = {"epochs": 3, "eval_step": 0, "save_every_seconds": 0, "learning_rate": 0.01}
        given = settings(name, **changes, checkpoint_dir=f"{settings(name)['checkpoint_dir']}/{folder}")
        record = json.loads(Path(run_recbole_llm(name, "rich", config_dict=given)["record"]).read_text())
        file = Path(given["checkpoint_dir"]) / record["checkpoint"]["file"]
        return torch.load(file, weights_only=True)["state_dict"]

    train, calls = Trainer._train_epoch, count(1)

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **keywords)

    whole = weights("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", dying)
        with contextlib.suppress(KeyboardInterrupt):  # some have fewer epochs, or a loop of their own
            weights("killed")
    again = weights("killed")
    assert again.keys() == whole.keys() and all(torch.equal(again[part], whole[part]) for part in whole)


def test_a_package_that_a_model_imports_is_named_before_the_training(
    rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_llm.classical.building.NEEDS", {"BPR": "no_such_package"})
    with pytest.raises(ModuleNotFoundError, match="--model=BPR: RecBole's model imports no_such_package, which is not installed"):
        run_recbole_llm("BPR", "rich", config_dict=recbole_data.settings("BPR", "general", rich, tmp_path))
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("name", "key", "given", "most"), [("NCL", "num_clusters", 50, "36 users"), ("SASRecCPR", "reranker_CAN_NUM", 50, "40 items")]
)
def test_a_size_beyond_the_data_is_named(name: str, key: str, given: Any, most: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match=f"{key}: 50 is more than the {most} of rich; lower it"):
        run_recbole_llm(name, "rich", config_dict=settings(name, **{key: given}))


# -- models that start from a checkpoint ---------------------------------------------------------------------------------------

CHAINS: dict[str, list[tuple[str, dict[str, Any], dict[str, str]]]] = {  # model, settings, and paths by the step that made them
    "S3Rec": [("S3Rec", {}, {}), ("S3Rec", {"train_stage": "finetune"}, {"pre_model_path": "S3Rec"})],
    "RaCT": [
        ("RaCT", {}, {}),
        ("RaCT", {"train_stage": "critic_pretrain"}, {"pre_model_path": "RaCT"}),
        ("RaCT", {"train_stage": "finetune"}, {"pre_model_path": "RaCT"}),
    ],
    "ConvNCF": [("BPR", {}, {}), ("ConvNCF", {"train_method": "after_pretrain"}, {"pre_model_path": "BPR"})],
    "NAIS": [("FISM", {}, {}), ("NAIS", {}, {"pretrain_path": "FISM"})],
    "NeuMF": [
        ("NeuMF", {"mlp_train": False}, {}),
        ("NeuMF", {"use_pretrain": True}, {"mf_pretrain_path": "NeuMF", "mlp_pretrain_path": "NeuMF"}),
    ],
    "KD_DAGFM": [("KD_DAGFM", {}, {}), ("KD_DAGFM", {"phase": "distillation"}, {"warm_up": "KD_DAGFM"})],
}
STARTS = {  # the weights that come from another model; without an entry, all do
    "ConvNCF": ["user_embedding.weight", "item_embedding.weight"],
    "NAIS": ["item_src_embedding.weight", "item_dst_embedding.weight"],
    "NeuMF": ["user_mf_embedding.weight", "item_mlp_embedding.weight"],
}


def newest(folder: Path) -> str:
    return str(max(folder.glob("saved/*.pth"), key=lambda file: file.stat().st_mtime_ns))


@pytest.mark.parametrize("name", ["RaCT", *(pytest.param(name, marks=pytest.mark.slow) for name in CHAINS if name != "RaCT")])
def test_a_model_starts_from_a_checkpoint_of_an_earlier_run(
    name: str, settings: Settings, tmp_path: Path, assemble: Callable[..., SimpleNamespace]
) -> None:
    made: dict[str, str] = {}
    for model, changes, paths in CHAINS[name]:
        given, start = settings(model, **changes, **{key: made[step] for key, step in paths.items()}), dict(made)
        trained(model, given)
        made[model] = newest(tmp_path)
    state = torch.load(start[next(iter(paths.values()))], weights_only=True)["state_dict"]
    fresh = assemble(name, given, "rich").model.state_dict()
    for key in STARTS.get(name, fresh):
        assert torch.equal(fresh[key], state[key]), key


def test_pretraining_of_any_length_can_be_used_and_is_named_in_the_log(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RecBole evaluates the last file that it saved, of the last of save_step epochs; another run may have replaced it."""
    run_recbole_llm("RaCT", "rich", config_dict=settings("RaCT", pretrain_epochs=3, save_step=2))
    last = newest(tmp_path)
    assert (tmp_path / "saved" / "RaCT-rich-2.pth").is_file() and Path(last).name != "RaCT-rich-2.pth"
    assert f"starts from these weights with --pre_model_path={last}" in caplog.text
    assert torch.load(last, weights_only=True)["epoch"] == 2


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (None, "pre_model_path: given.pth is not a file"),
        (b"", "pre_model_path: given.pth is refused"),
        (pickle.dumps(_Evil()), "pre_model_path: given.pth is refused"),
        ({"state_dict": {"w": torch.zeros(2)}, "config": _Evil()}, "pre_model_path: given.pth does not fit S3Rec"),
        ({"state_dict": {"w": _Evil()}}, "pre_model_path: given.pth is refused"),
        ({"other": 1}, "pre_model_path: given.pth is refused"),
    ],
)
def test_a_foreign_checkpoint_is_named_and_nothing_in_it_is_executed(written: Any, told: str, settings: Settings) -> None:
    file = Path("given.pth")
    if isinstance(written, bytes):
        file.write_bytes(written)
    elif written is not None:
        torch.save(written, file)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        run_recbole_llm("S3Rec", "rich", config_dict=settings("S3Rec", train_stage="finetune", pre_model_path=str(file)))
    assert not Path("executed").exists() and not list(Path("saved").rglob("record.json"))


def test_a_model_without_its_checkpoint_asks_for_one(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"pre_model_path: S3Rec starts from a checkpoint here; give one, such as --pre_model"):
        run_recbole_llm("S3Rec", "rich", config_dict=settings("S3Rec", train_stage="finetune"))


def test_the_weights_of_a_checkpoint_and_not_its_path_alone_name_a_run(settings: Settings) -> None:
    def fingerprints() -> tuple[str, str]:
        config = LLMConfig("NAIS", "rich", config_dict=settings("NAIS", pretrain_path="given.pth"))
        return config.fingerprint, config.recbole_fingerprint

    Path("given.pth").write_bytes(b"one")
    first = fingerprints()
    assert fingerprints() == first
    Path("given.pth").write_bytes(b"two")
    assert all(one != two for one, two in zip(first, fingerprints(), strict=True))
