"""Which LM a run has: one by folder, or the builtin one of its own data or of the run that it is initialised from."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.evaluation.record import RunRecord
from recbole_llm.llm import backbones as module
from recbole_llm.llm.backbones import Backbone, BackboneSettings
from recbole_llm.model.tallrec import TALLRec
from recbole_llm.store.stages import Stage, StageCache, Work

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 500, "batch_tokens": 256, "vocab_size": 300}


def settings_of(path: Path | str, **changes: Any) -> BackboneSettings:
    values = BackboneSettings(str(path), None, "auto", "cpu", None, None, False)
    return replace(values, **changes)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(module, "load_causal_lm", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


# -- what identifies it ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_loads")
def test_the_fingerprint_follows_the_precision_that_is_resolved(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {dtype: Backbone(settings_of(tiny_lm, dtype=dtype)).fingerprint for dtype in ("auto", "float32", "bfloat16")}
    assert found["auto"] == found["float32"] != found["bfloat16"]  # on a CPU
    four_bits = Backbone(settings_of(tiny_lm, load_in_4bit=True)).fingerprint
    assert four_bits not in found.values()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert Backbone(settings_of(tiny_lm, device="cuda")).fingerprint == found["bfloat16"]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert Backbone(settings_of(tiny_lm, device="cuda")).fingerprint == found["float32"]
    tf32 = [settings_of(tiny_lm, device=device, float32_matmul_precision="high") for device in ("cpu", "cuda")]
    assert [Backbone(own).fingerprint == found["float32"] for own in tf32] == [True, False]  # rounds where there is TF32


@pytest.mark.usefixtures("nothing_loads")
def test_where_and_how_it_runs_does_not_identify_it(tiny_lm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_lm, tmp_path / "moved")
    first = Backbone(settings_of(tiny_lm)).fingerprint
    for other in (settings_of(tmp_path / "moved"), settings_of(tiny_lm, attn_implementation="eager", device_map="auto")):
        assert Backbone(other).fingerprint == first


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json", "config.json", "model.safetensors"])
def test_the_fingerprint_follows_weights_tokenizer_and_chat_template(file: str, tiny_lm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_lm, tmp_path / "lm"))
    before = Backbone(settings_of(folder)).fingerprint
    if file == "chat_template.jinja":
        (folder / file).write_text("{{ messages }}")
    else:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Backbone(settings_of(folder)).fingerprint != before
    (folder / "README.md").write_text("nothing that is read")
    changed = Backbone(settings_of(folder)).fingerprint
    (folder / "README.md").unlink()
    assert Backbone(settings_of(folder)).fingerprint == changed


@pytest.mark.usefixtures("nothing_loads")
def test_a_trained_backbone_is_identified_by_its_stage_before_it_runs() -> None:
    def build(work: Work) -> None:
        pytest.fail("it was trained")

    stages = [Stage("builtin-lm", {"seed": seed}, build) for seed in (1, 2)]
    first, second = (Backbone(settings_of("builtin"), stage) for stage in stages)
    assert first.stages == (stages[0],) and first.name == "builtin" and first.tokenizer is None
    assert first.fingerprint == Backbone(settings_of("builtin"), stages[0]).fingerprint != second.fingerprint


def test_an_unknown_precision_is_refused_by_the_fingerprint(tiny_lm: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'float12' is unknown"):
        Backbone(settings_of(tiny_lm, dtype="float12")).fingerprint  # noqa: B018


# -- loading -----------------------------------------------------------------------------------------------------------


def test_it_is_loaded_once_frozen_and_without_a_change_to_random_states(tiny_lm: Path, tmp_path: Path) -> None:
    backbone, cache = Backbone(settings_of(tiny_lm)), StageCache(tmp_path)
    assert backbone.stages == () and backbone.name == "tiny-llama" and backbone.tokenizer.pad_token == "<pad>"
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    causal = backbone.load(cache)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], expected[0]) and (drawn[1] == expected[1]).all() and drawn[2] == expected[2]
    assert backbone.load(cache) is causal and not causal.model.training
    assert not any(parameter.requires_grad for parameter in causal.model.parameters())


def test_random_states_stay_also_where_loading_draws(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[..., Any] = module.load_causal_lm

    def drawing(*arguments: Any, **options: Any) -> Any:
        torch.rand(7), np.random.rand(7), random.random()
        return load(*arguments, **options)

    monkeypatch.setattr(module, "load_causal_lm", drawing)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    Backbone(settings_of(tiny_lm)).load(StageCache(tmp_path))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


# -- the builtin one of another run ------------------------------------------------------------------------------------


def write_record(run: Any) -> str:
    return str(RunRecord(run.config, run.trainer, run.valid, run.test).write())


def test_a_run_that_is_initialised_from_another_has_its_builtin_lm(
    settings: dict[str, Any], assemble: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TALLRec, "supports_init_from", True)
    builtin = {**settings, "llm_path": "builtin", "builtin_lm": SMALL}
    first = assemble("TALLRec", builtin)
    first.trainer.cache.run(*first.model.parts.backbone.stages)
    given = {**settings, "init_from": write_record(first), "checkpoint_dir": str(tmp_path / "elsewhere")}
    given.pop("llm_path")  # that of the other run
    second, apart = assemble("TALLRec", given, "other"), assemble("TALLRec", builtin, "other")
    assert second.config["builtin_lm"].items() >= SMALL.items()
    apart.trainer.cache.run(*apart.model.parts.backbone.stages)
    parts = [run.model.parts.backbone for run in (first, second, apart)]
    assert parts[1].stages == () and parts[1].tokenizer is not None and not (tmp_path / "elsewhere" / "stages").exists()
    weights = [
        backbone.load(run.trainer.cache).model.get_input_embeddings().weight
        for backbone, run in zip(parts, (first, second, apart), strict=True)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert parts[0].name == parts[1].name and parts[0].name.startswith("builtin 0.")
    assert len({backbone.fingerprint for backbone in parts}) == 3  # a stage, its folder, another stage


def test_a_run_without_a_builtin_lm_has_none_to_give(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TALLRec, "supports_init_from", True)
    run = write_record(assemble("TALLRec", settings))
    with pytest.raises(ValueError, match=r"init_from: .* has no stage builtin-lm \(it has: none\); give the run that trained it"):
        assemble("TALLRec", settings, init_from=run, llm_path="builtin")
    assert assemble("TALLRec", settings, init_from=run).model.parts.backbone.name == "tiny-llama"


@pytest.mark.parametrize(("key", "value"), [("load_in_4bit", True), ("device_map", "auto")])
def test_a_sharded_lm_is_neither_in_4_bits_nor_placed_by_layer(tiny_lm, key, value):
    with pytest.raises(ValueError, match=rf"fsdp: True \(or accelerate launch --use_fsdp\) excludes {key}: {value}; give one"):
        settings_of(tiny_lm, fsdp=True, **{key: value}).check()
    assert settings_of(tiny_lm, fsdp=True).precision == settings_of(tiny_lm).precision
