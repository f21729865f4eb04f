"""What cannot work is refused with its key and a remedy before anything is trained or loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.llm import backbones
from recbole_llm.model import assembly
from recbole_llm.quick_start import Run
from recbole_llm.store.stages import StageCache
from recbole_llm.training.loop import TrainingLoop

LISTWISE = {"prompt": "listwise", "lora_train_mode": "prefix"}
LABELS = {"lora_train_mode": "prefix"}
FLASH = {"attn_implementation": "flash_attention_2"}
FULL = {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "tree with flash attention": (
        "TALLRec",
        FLASH,
        r"scorer: tree needs attn_implementation: sdpa or eager, not flash_attention_2",
    ),
    "flash attention on a CPU": (
        "TALLRec",
        FLASH | {"scorer": "prefix"},
        r"attn_implementation: flash_attention_2 needs an accel",
    ),
    "4 bits without bitsandbytes": ("TALLRec", {"load_in_4bit": True}, r"load_in_4bit: True needs bitsandbytes: `pip install"),
    "4 bits without bitsandbytes, in an encoder": ("Laser", {"load_in_4bit": True}, r"load_in_4bit: True needs bitsandbytes"),
    "heads that do not divide the width": (
        "SASRec",
        {"n_heads": 3, "hidden_size": 16, "epochs": 2},
        r"^SASRec cannot be built with [a-z_=0-9, ]*n_heads=3[a-z_=0-9, ]* \(The hidden size \(16\) is not a multiple of",
    ),
    "a loss that no training has": ("GRU4Rec", {"loss_type": "BCE"}, r"^loss_type: 'BCE': GRU4Rec has CE and BPR; .*gbce"),
    "an unknown dtype": ("TALLRec", {"dtype": "float12"}, r"dtype: 'float12' in .* is not one of auto"),
    "a size that is none": ("TALLRec", {"max_memory": {"cpu": "much"}}, r"max_memory: 'much' is not a size; give bytes or text"),
    "a device that is none": (
        "TALLRec",
        {"max_memory": {"0": "20GiB"}},
        r"max_memory: '0' is no device; give the number of",
    ),
    "an unknown precision": (
        "SASRec",
        {"float32_matmul_precision": "low"},
        r"float32_matmul_precision: 'low' in .* is not one of highest",
    ),
    "a longer list of a retriever than labels": (
        "LlamaRec",
        LABELS | FULL | {"retriever_top": 53},
        r"retriever_top: prompts list 53 candidates",
    ),
    "a slot for a soft token that a model does not have": (
        *("TALLRec", {"prompt": "allmrec", "lora_train_mode": "prefix"}),
        r"prompt: the slot \{user\} is for the soft token of a user, which only ALLMRec has",
    ),
    "a user representation without its slot": (
        "ALLMRec",
        {"soft_prompt": "listwise"},
        r"soft_prompt: listwise, .* needs the slot",
    ),
    "no soft token at all": (
        *("ALLMRec", {"user_representation": False, "joint_embedding": False}),
        r"user_representation and joint_embedding: without both there is no soft token",
    ),
    "candidates in the prompt of an encoder": ("Laser", {"prompt": "listwise"}, r"prompt: listwise has a slot for candidates"),
    "more negatives than a history leaves": (
        *("LoRACocktail", LISTWISE | {"candidates": {"num_negatives": 19}}),
        r"candidates.num_negatives: 19 is too large for list-wise training on tiny/\w+, where a history of \d+ items leaves \d+",
    ),
}


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever trains, runs a stage or loads weights fails."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("something is trained or loaded before the refusal")

    for owner, function in (
        (TrainingLoop, "run"),
        (ProtocolTrainer, "fit"),
        (StageCache, "_run"),
        (backbones, "load_causal_lm"),
    ):
        monkeypatch.setattr(owner, function, forbidden)
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, settings: dict[str, Any], assemble: Callable[..., Any]) -> None:
    model, changes, message = REFUSED[case]
    with pytest.raises((ValueError, ImportError), match=message):
        assemble(model, {**settings, **changes})


def test_more_candidates_than_labels(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assemble: Callable[..., Any]
) -> None:
    settings |= LABELS
    files = {phase: assemble("LlamaRec", settings).candidates[phase].items for phase in ("valid", "test")}
    assert {items.size(1) for items in files.values()} == {10}
    valid, test = (next((Path(settings["checkpoint_dir"]) / "candidates").glob(f"*{phase}*.candidates")) for phase in files)
    monkeypatch.setattr(assembly, "LABELS", assembly.LABELS[:8])
    with pytest.raises(
        ValueError, match=r"num_negatives: prompts list 10 candidates, but scorer: label has 8 labels .*lower it by 2"
    ):
        assemble("LlamaRec", settings)
    source = {"source": "file", "num_negatives": 5, "file": {"valid": str(valid), "test": str(test)}}
    with pytest.raises(ValueError, match=r"candidates.file: .* lists 10 candidates, but .* have 6 labels; give .*: 9"):
        assemble("LlamaRec", settings, candidates=source)


@pytest.mark.parametrize("case", ["TALLRec", "Laser", "ALLMRec"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    case: str, settings: dict[str, Any], tiny_lm: Path, tmp_path: Path, assemble: Callable[..., Any]
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_lm, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError) as caught:
        assemble(case, {**settings, "llm_path": str(folder)})
    message = str(caught.value)
    for part in ("pickled weights (*.bin) are not read", f"from_pretrained('{folder}', use_safetensors=False", "--llm_path="):
        assert part in message


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_missing_or_damaged_tokenizer_is_named(
    content: str | None, settings: dict[str, Any], tiny_lm: Path, tmp_path: Path, assemble: Any
) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(tiny_lm, folder)
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"llm_path: {folder}: its tokenizer cannot be read: .*; give a folder with the token"):
        assemble("TALLRec", settings, llm_path=str(folder))


def test_the_command_in_the_error_converts(settings: dict[str, Any], tiny_lm: Path, tmp_path: Path, assemble: Any) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_lm, folder)
    weights = AutoModelForCausalLM.from_pretrained(tiny_lm).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError) as caught:
        assemble("TALLRec", {**settings, "llm_path": str(folder)})
    message = str(caught.value)
    exec(message.split('python -c "')[1].split('"`')[0], {})  # what a user would run
    converted = message.split("--llm_path=")[1]
    found = load_file(Path(converted) / "model.safetensors")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in found.items())
    assert assemble("TALLRec", {**settings, "llm_path": converted}).model.parts.backbone.name == "pickled-safetensors"


def test_the_hub_is_asked_for_safetensors_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaConfig

    from recbole_llm.llm.causal_lm import check_weights, identity

    asked = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: LlamaConfig())
    monkeypatch.setattr("transformers.utils.has_file", lambda source, name, **_: asked.append(name) or False)
    with pytest.raises(FileNotFoundError) as caught:
        check_weights("facebook/opt-6.7b", "main")
    assert len(asked) == 2 and "facebook/opt-6.7b@main has no safetensors" in str(caught.value)
    assert "llm_revision" in str(caught.value) and "--llm_path=opt-6.7b-safetensors" in str(caught.value)
    monkeypatch.setattr("transformers.utils.has_file", lambda *_, **__: True)
    assert identity("facebook/opt-6.7b", "abc") == "facebook/opt-6.7b@abc"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            r"target_modules: .* LlamaForCausalLM has no module 'v_porj'; give",
        ),
        ({"target_modules": "q_proj"}, r"target_modules: 'q_proj': a text is a regular expression"),
    ],
)
def test_modules_that_the_lm_lacks_are_refused_by_the_plan(
    changes: dict[str, Any], message: str, settings: dict[str, Any], assemble: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):  # which every run makes before it trains
        Run(**vars(assemble("LoRACocktail", settings, **changes))).plan()


def test_a_full_model_that_cannot_be_folded_is_refused_before_its_adapters_are_trained(
    settings: dict[str, Any], tiny_lm: Path, tmp_path: Path, assemble: Callable[..., Any]
) -> None:
    lm = Path(shutil.copytree(tiny_lm, tmp_path / "lm"))
    wanted = {"llm_path": str(lm), "merge_full_model": str(tmp_path / "full"), "target_modules": ["q_proj", "lm_head"]}
    assert assemble("LoRACocktail", settings, **wanted).model.merge_rows.stages
    content = json.loads((lm / "config.json").read_text())
    (lm / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    with pytest.raises(
        ValueError, match="merge_full_model: an adapter changes lm_head, whose matrix the base model also uses as"
    ):
        assemble("LoRACocktail", settings, **wanted)
    assert assemble("LoRACocktail", settings, **{**wanted, "target_modules": "all-linear"}).model.merge_rows.stages
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    (lm / "config.json").write_text(json.dumps(content | quantised))
    with pytest.raises(ValueError, match="merge_full_model: the base model is quantised"):
        assemble("LoRACocktail", settings, **wanted)
