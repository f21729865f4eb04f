"""A run in two processes ends as that in one, with equal ranks for equal weights; also after the death of one of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from several import exit_codes, start

from recbole_llm import cli
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.files import sha256_file
from recbole_llm.training.loop import TrainingLoop

pytestmark = pytest.mark.slow

SHORT = {"lora_epochs": 2, "general_epochs": 2}
NO_DRAWS = {"lora_dropout": 0.0, "m_former_dropout": 0.0}
RECBOLES = ("SASRec", "GRU4Rec", "BERT4Rec")
CLASSICAL = {"train_mode": "sequence", "epochs": 2, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0}
SMALL_LM = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 2000, "batch_tokens": 256, "vocab_size": 300}
MODELS: dict[str, dict[str, Any]] = {
    "MoLoRec": {"merge_learning_rate": [0.5, 1.0]},  # of the class of LoRACocktail, which is below
    "WeaveRec": {"lora_learning_rate": 5e-3},  # at the rate of the others, the steps amplify rounding
    "TALLRec": {"llm_path": "builtin", "builtin_lm": SMALL_LM},
    "LlamaRec": {"lora_train_mode": "prefix"},
    "ALLMRec": {},
    "Laser": {"warmup_epochs": 1},
    "AlphaRec": {},
    "Cascade": {},
    "SASRec": CLASSICAL,
    "GRU4Rec": {**CLASSICAL, "loss_type": "BPR"},
    "BERT4Rec": CLASSICAL,
}
SHARDED: dict[str, dict[str, Any]] = {
    "TALLRec": {"scoring": "published", "published_max_new_tokens": 4, "gradient_checkpointing": True},
    "LoRACocktail": {},
    "ALLMRec": {},
    "Laser": {},
    "Cascade": {},
}
CASES = [*((model, {}) for model in MODELS), *((model, {"fsdp": True, **own}) for model, own in SHARDED.items())]
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # of weights after all steps; that of the gradients of one step is 1e-5


def changed(settings: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Settings for a model without random draws in training, so that one process and two compute the same."""
    own = {} if model in RECBOLES else NO_DRAWS
    cf = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    inner = {key: {**settings[key], **cf} for key in ("cf_config", "cheap_config")}
    return {**settings, **inner, **own, **SHORT, **MODELS.get(model, {}), "use_gpu": False, "checkpoint_dir": str(folder)}


def folder_of(settings: dict[str, Any]) -> Path:
    (file,) = Path(settings["checkpoint_dir"]).glob("runs/*/record.json")
    return file.parent


def record_of(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads((folder_of(settings) / "record.json").read_text())


def weights(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of all stages, by file."""
    root = Path(settings["checkpoint_dir"])
    files = [*root.glob("stages/**/*.safetensors")]
    return {str(file.relative_to(root)): load_file(file) for file in files if "/." not in str(file)}


def run(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    run_recbole_llm(model, "tiny", config_dict=settings)
    return record_of(settings)


@pytest.mark.parametrize(("model", "own"), CASES, ids=[f"{model}-fsdp" if own else model for model, own in CASES])
def test_two_processes_end_as_one(model: str, own: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    one, two, again = (changed(settings, model, tmp_path / name) | own for name in ("one", "two", "again"))
    expected = run(model, one | {"fsdp": False})
    assert exit_codes(start(lambda: run_recbole_llm(model, "tiny", config_dict=two))) == [0, 0]
    found = record_of(two)
    assert found["processes"] == 2 and expected["processes"] == 1
    assert weights(one).keys() == weights(two).keys()
    for file, tensors in weights(one).items():
        torch.testing.assert_close(weights(two)[file], tensors, **TOLERANCE, msg=lambda text, file=file: f"{file}: {text}")
    assert found["ranks"] == expected["ranks"] and found["results"] == expected["results"]
    if own:  # the key changes no name of a record
        assert any("fsdp: each of 2 processes holds" in file.read_text() for file in Path("log").rglob("*.log"))
        assert folder_of(two).name == folder_of(one).name
    assert found["best_valid_result"] == expected["best_valid_result"]
    assert all(len(ranks) == len({*ranks}) for ranks in found["ranks"].values())
    if (tmp_path / "one" / "stages").is_dir() and model != "AlphaRec":
        # the same weights: the scores of two processes are those of one to the bit
        shutil.copytree(tmp_path / "one" / "stages", tmp_path / "again" / "stages")
        assert exit_codes(start(lambda: run_recbole_llm(model, "tiny", config_dict=again))) == [0, 0]
        assert record_of(again)["ranks"] == expected["ranks"] and set(record_of(again)["stage_seconds"].values()) == {0.0}
        for file in (tmp_path / "one").glob("scores/*/tensors.safetensors"):
            assert sha256_file(file) == sha256_file(tmp_path / "again" / file.relative_to(tmp_path / "one"))


# -- errors and deaths -------------------------------------------------------------------------------------------------


def at_step(number: int, act: Callable[[], None]) -> Callable[[int], None]:
    """What process 1 does in place of that step of its training loops."""

    def before(rank: int) -> None:
        step, calls = TrainingLoop._step, count(1)

        def dying(loop: TrainingLoop) -> torch.Tensor:
            if next(calls) == number:
                act()
            return step(loop)

        if rank == 1:
            TrainingLoop._step = dying  # type: ignore[method-assign]

    return before


def command(settings: dict[str, Any], folder: Path, *more: str) -> Callable[[], None]:
    """A run by the command line, whose process writes its standard error to a file of its rank."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))

    def work() -> None:
        with open(folder / f"stderr-{os.environ['RANK']}", "w") as stderr, contextlib.redirect_stderr(stderr):
            cli.main(["run", "--model=TALLRec", "--dataset=tiny", f"--config_files={file}", *more])

    return work


def told(folder: Path) -> list[str]:
    """The errors that the processes told, and what any but the first wrote besides."""
    first, *others = ((folder / f"stderr-{rank}").read_text().splitlines() for rank in range(2))
    return [line for line in first if line.startswith(("error", "interrupted"))] + [line for lines in others for line in lines]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("fsdp", [False, True])
def test_after_the_death_of_one_the_other_ends_and_the_same_command_resumes(
    settings: dict[str, Any], tmp_path: Path, fsdp: bool
) -> None:
    settings = {**settings, "use_gpu": False, "save_every_seconds": 0, "fsdp": fsdp}
    whole, killed = ({**settings, "checkpoint_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    assert exit_codes(start(command(whole, tmp_path))) == [0, 0] and told(tmp_path) == []
    assert exit_codes(start(command(killed, tmp_path), before=at_step(6, die)), 60) == [2, -signal.SIGKILL]
    (line,) = told(tmp_path)
    assert line.startswith("error: another process of this run has ended")
    assert not (tmp_path / "killed" / "runs").exists()
    assert exit_codes(start(command(killed, tmp_path))) == [0, 0] and told(tmp_path) == []
    assert "ingredient: resuming from step 5 of 16" in (tmp_path / "stderr-0").read_text()
    assert record_of(killed)["ranks"] == record_of(whole)["ranks"]
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[file][name], tensor) for file, tensors in expected.items() for name, tensor in tensors.items())


def test_an_error_of_one_process_ends_all_with_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no memory is left")

    settings = {**settings, "use_gpu": False}
    assert exit_codes(start(command(settings, tmp_path), before=at_step(3, fail)), 60) == [2, 2]
    assert told(tmp_path) == ["error: process 1 of 2: no memory is left"]


def test_a_sharded_lm_needs_several_processes(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fsdp: True spreads the LM over the processes of a run, but there is one"):
        run_recbole_llm("TALLRec", "tiny", config_dict={**settings, "fsdp": True})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp: True spreads the LM"):
        run_recbole_llm("TALLRec", "tiny", config_dict=settings)
    assert run_recbole_llm("RecentPop", "tiny", config_dict={**settings, "fsdp": False})["test_result"], "a given key wins"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["--lora_batch_size=0"], "lora_batch_size"),
        (["--gpu_id=0,1"], "gpu_id: 0,1 is for one process"),
        (["--fsdp=True", "--device_map=auto"], "fsdp: True (or accelerate launch --use_fsdp) excludes device_map: auto"),
        (["--model=BPR", "--eval_args={'mode': 'full'}"], "--model=BPR: RecBole's own loop trains it in one process, not in 2"),
    ],
)
def test_an_error_of_all_processes_is_told_once(settings: dict[str, Any], tmp_path: Path, keys: list[str], said: str) -> None:
    assert exit_codes(start(command({**settings, "use_gpu": False}, tmp_path, *keys)), 60) == [2, 2]
    (line,) = told(tmp_path)
    assert line.startswith("error: ") and said in line
