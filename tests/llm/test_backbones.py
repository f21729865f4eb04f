"""Which LM a run has: the builtin one of its own data, or that of a run it takes up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_llm.evaluation.record import RunRecord
from recbole_llm.model.tallrec import TALLRec

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 500, "batch_tokens": 256, "vocab_size": 300}


def write_record(made: Any) -> str:
    return str(RunRecord(made.config, made.model, made.trainer, made.valid, made.test).write())


def test_a_run_that_takes_up_another_has_its_builtin_lm(
    settings: dict[str, Any], assemble: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TALLRec, "supports_init_from", True, raising=False)
    builtin = {**settings, "llm_path": "builtin", "builtin_lm": SMALL}
    first = assemble("TALLRec", builtin)
    given = {**settings, "init_from": write_record(first), "checkpoint_dir": str(tmp_path / "elsewhere")}
    given.pop("llm_path")  # the kept run's
    second, apart = assemble("TALLRec", given, "other"), assemble("TALLRec", builtin, "other")
    assert second.config["builtin_lm"].items() >= SMALL.items()
    assert "builtin-lm" not in second.model.cache.folders and not (tmp_path / "elsewhere" / "stages").exists()
    assert second.model.backbone_name == first.model.backbone_name and first.model.backbone_name.startswith("builtin")
    assert second.model.backbone_fingerprint == first.model.backbone_fingerprint != apart.model.backbone_fingerprint
    weights = [made.model.lm.get_input_embeddings().weight for made in (first, second, apart)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_run_without_a_builtin_lm_has_none_to_give(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TALLRec, "supports_init_from", True, raising=False)
    run = write_record(assemble("TALLRec", settings))
    with pytest.raises(ValueError, match=r"init_from: .* has no stage builtin-lm \(it has: none\); give the run that trained it"):
        assemble("TALLRec", settings, init_from=run, llm_path="builtin")
    assert assemble("TALLRec", settings, init_from=run).model.backbone_name.startswith("tiny-llama")
