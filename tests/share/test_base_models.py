"""The base models of a run are named with the licences that can be found out without guessing."""

from __future__ import annotations

from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.share import base_models as module
from recbole_llm.share.base_models import base_models
from recbole_llm.store.runs import SavedRun


def record(**config: Any) -> dict[str, Any]:
    return {
        "model": "TALLRec",
        "backbone_identity": "abc",
        "config": {"llm_path": "builtin", "text_encoder_path": "builtin"} | config,
    }


def test_builtin_parts_are_no_base_models() -> None:
    assert base_models(record()) == []
    assert base_models({**record(llm_path="lm"), "backbone_identity": None}) == []  # a classical model, which reads no LM


def test_a_folder_has_its_name_and_the_licence_of_its_card(tmp_path: Path) -> None:
    (tmp_path / "My-LM").mkdir()
    (found,) = base_models(record(llm_path=str(tmp_path / "My-LM")))
    assert (found.name, found.on_hub, found.licence, found.key) == ("My-LM", False, None, "llm_path")
    (tmp_path / "My-LM" / "README.md").write_text("---\nlicense: llama3.1\n---\n# My LM\n")
    assert base_models(record(llm_path=str(tmp_path / "My-LM")))[0].licence == "llama3.1"
    (tmp_path / "My-LM" / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_models(record(llm_path=str(tmp_path / "My-LM")))[0].licence is None


def test_a_snapshot_of_the_hubs_cache_has_the_name_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen2-7B" / "snapshots" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (found,) = base_models(record(llm_path=str(folder)))
    assert (found.name, found.on_hub, found.licence) == ("Qwen/Qwen2-7B", True, None)  # offline


@pytest.mark.parametrize(
    ("values", "licence"),
    [
        ({"License-Expression": "Apache-2.0"}, "apache-2.0"),
        ({"License": "MIT"}, "mit"),
        ({"License": "Copyright (c) Somebody. All rights are reserved"}, None),
        ({}, None),
    ],
)
def test_a_package_has_the_licence_of_its_metadata(
    values: dict[str, str], licence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = Message()
    for name, value in values.items():
        metadata[name] = value
    monkeypatch.setattr(module.metadata, "metadata", lambda name: metadata)
    (found,) = base_models(record(llm_path="package:llm-small/file.gguf"))
    assert (found.name, found.on_hub, found.licence) == ("llm-small", False, licence)


def test_models_of_two_parts_have_both() -> None:
    two = {**record(llm_path="org/lm", text_encoder_path="org/encoder"), "backbone_identity": "abc, def", "model": "ALLMRec"}
    assert [(one.part, one.name) for one in base_models(two)] == [("backbone", "org/lm"), ("text encoder", "org/encoder")]


def test_init_from_takes_a_shared_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "Laser-tiny-1"
    run.mkdir(parents=True)
    (run / "record.json").write_text('{"model": "Laser", "dataset": "tiny", "config": {}, "stages": {}}')
    from recbole_llm.store.files import _write_manifest

    with pytest.raises(ValueError, match="init_from: there is no run at"):
        SavedRun.read(tmp_path)
    _write_manifest(tmp_path)
    assert SavedRun.read(tmp_path).root == tmp_path
    (run / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"init_from=.* is not a shared run as it was written: .*its SHA-256 is not"):
        SavedRun.read(tmp_path)
