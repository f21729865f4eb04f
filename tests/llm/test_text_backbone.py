"""Which text encoder a run has, what identifies it before it is there, and the vectors of a catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.llm import text_backbone as module
from recbole_llm.llm.builtin_text_encoder import builtin_stage
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import load_text_encoder
from recbole_llm.store.stages import StageCache

SENTENCES = ["", "The red river", "The blue house", "The old wolf", "The red river"]
BUILTIN = {"dim": 8, "vocab_size": 300}


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "text_encoder_path": "builtin",
        "text_encoder_revision": None,
        "builtin_text_encoder": BUILTIN,
        "seed": 1,
        "device": "cpu",
        "show_progress": False,
        "checkpoint_dir": str(folder / "saved"),
    }
    return values | changes


def test_the_builtin_encoder_is_a_stage_and_vectors_are_cached_by_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, cache = TextBackbone(config(tmp_path), SENTENCES), StageCache(tmp_path / "stages")
    assert backbone.stages == (builtin_stage(SENTENCES, **BUILTIN, seed=1),) and backbone.name == "builtin"
    cache.run(*backbone.stages)
    encoder = backbone.load(cache)
    assert backbone.name == encoder.name and backbone.name.startswith("builtin ") and encoder is not backbone.load(cache)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    vectors = backbone.vectors(encoder)
    assert vectors.shape == (5, 8) and not vectors[0].any() and vectors[1:].any(1).all() and torch.equal(vectors[1], vectors[4])
    torch.testing.assert_close(vectors[1:], encoder.encode(SENTENCES[1:], show_progress=False), atol=1e-6, rtol=0)
    monkeypatch.setattr(type(encoder), "encode", lambda *_, **__: pytest.fail("a text was encoded again"))
    assert torch.equal(backbone.vectors(backbone.load(cache)), vectors)


def test_the_fingerprint_follows_encoder_and_sentences_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_text_encoder", lambda *_, **__: pytest.fail("the encoder was loaded"))
    monkeypatch.setattr(module, "identity", lambda path, revision: f"{path}@{revision}")

    def found(sentences: list[str] = SENTENCES, **changes: Any) -> str:
        return TextBackbone(config(tmp_path, **changes), sentences).fingerprint

    assert found() == found(checkpoint_dir="elsewhere", show_progress=True)
    others = [
        found(SENTENCES[:-1]),
        found(seed=2),
        found(builtin_text_encoder={**BUILTIN, "dim": 9}),
        found(text_encoder_path="org/sbert"),
        found(text_encoder_path="org/sbert", text_encoder_revision="v2"),
        found([*SENTENCES[:-1], "Winter"], text_encoder_path="org/sbert"),
    ]
    assert len({found(), *others}) == 7


def test_another_encoder_needs_no_stage(tmp_path: Path) -> None:
    backbone, cache = TextBackbone(config(tmp_path), SENTENCES), StageCache(tmp_path / "stages")
    folder = cache.run(*backbone.stages)
    other = TextBackbone(config(tmp_path, text_encoder_path=str(folder)), SENTENCES)
    assert other.stages == () and other.fingerprint != backbone.fingerprint
    assert torch.equal(other.vectors(other.load(cache)), backbone.vectors(backbone.load(cache)))


@pytest.mark.parametrize("named", [True, False])
def test_an_encoder_has_the_name_that_it_has_once_it_is_loaded(tmp_path: Path, named: bool) -> None:
    """A run that reuses its stages loads none, and its table has the same name as that of the first run."""
    backbone, cache = TextBackbone(config(tmp_path), SENTENCES), StageCache(tmp_path / "stages")
    folder = cache.run(*backbone.stages).rename(tmp_path / "mine")
    if not named:
        (folder / "text_encoder.json").unlink()
    other = TextBackbone(config(tmp_path, text_encoder_path=str(folder)), SENTENCES)
    name = other.name
    assert name == other.load().name and (name == "mine") != named
    assert TextBackbone(config(tmp_path, text_encoder_path="org/sbert"), SENTENCES).name == "org/sbert"


def test_a_frozen_encoder_has_the_precision_of_the_device_and_a_trained_one_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, cache = TextBackbone(config(tmp_path), SENTENCES), StageCache(tmp_path / "stages")
    folder = cache.run(*backbone.stages)
    asked = []

    def load(path: Any, *, dtype: torch.dtype, device: Any, **options: Any) -> Any:
        asked.append(dtype)
        return load_text_encoder(path, dtype=dtype, device="cpu", **options)

    monkeypatch.setattr(module, "load_text_encoder", load)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    made = [
        TextBackbone(config(tmp_path, text_encoder_path=str(folder), device=device), SENTENCES, trained=trained)
        for device, trained in (("cpu", False), ("cuda", False), ("cuda", True))
    ]
    encoders = [own.load(cache) for own in made]
    assert asked == [torch.float32, torch.bfloat16, torch.float32]
    assert [next(encoder.model.parameters()).dtype for encoder in encoders] == asked
    assert made[0].fingerprint == made[2].fingerprint != made[1].fingerprint
    assert encoders[0].fingerprint == encoders[2].fingerprint != encoders[1].fingerprint  # of cached vectors
    full, half = (own.vectors(encoder) for own, encoder in zip(made[:2], encoders[:2], strict=True))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(half, full, atol=2e-2, rtol=2e-2)
