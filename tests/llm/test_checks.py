"""The check of a backbone is made once, cached, and comes before anything is trained."""

from typing import Any

import pytest
import torch

from recbole_llm.llm.backbones import Backbone, BackboneSettings
from recbole_llm.llm.checks import BackboneCheck
from recbole_llm.llm.exactness import NotExactError
from tests.llm import families
from tests.llm.conftest import tiny_tokenizer


@pytest.fixture
def saved(tmp_path: Any) -> Any:
    def save(family: str, **changes: Any) -> Backbone:
        folder = tmp_path / f"{family}{len(changes)}"
        families.build(family, **changes).save_pretrained(folder)
        tiny_tokenizer(eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
        settings = BackboneSettings(str(folder), None, "float32", "cpu", None, "sdpa", False)
        check = BackboneCheck("tree", max_prompt_tokens=60, max_title_tokens=8, attention="sdpa", folder=str(tmp_path))
        return Backbone(settings, check=check)

    return save


def test_a_backbone_knows_how_it_is_run(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    causal = saved("mistral").load(None)
    assert (causal.reading.scorer, causal.pad_token_id) == ("prefix", 0)
    assert "mistral0: scorer: tree is not exact with a window of 8 tokens (the run reads up to 69)" in caplog.text
    assert saved("bart", is_decoder=True).load(None).pad_token_id is None


def test_the_check_is_cached_with_the_backbones_identity(saved: Any, tmp_path: Any, monkeypatch: Any, caplog: Any) -> None:
    first = saved("mistral")
    first.check(68)
    (file,) = (tmp_path / "readings").iterdir()
    caplog.clear()
    again = saved("mistral")  # the same weights
    monkeypatch.setattr("recbole_llm.llm.backbones.load_causal_lm", lambda *_, **__: pytest.fail("loaded again"))
    again.check(68)
    assert "prefix takes its place" in caplog.text  # every run is told
    assert [*(tmp_path / "readings").iterdir()] == [file]
    monkeypatch.undo()
    saved("mistral", sliding_window=200).check(68)
    assert len([*(tmp_path / "readings").iterdir()]) == 2


def test_a_damaged_reading_is_named_and_made_anew(saved: Any, tmp_path: Any, caplog: Any) -> None:
    saved("mistral").check(68)
    (file,) = (tmp_path / "readings").iterdir()
    whole = file.read_text()
    file.write_text(whole.replace('"padding": true', '"padding": false'))
    assert file.read_text() != whole
    saved("mistral").check(68)
    assert f"{file} is damaged: its values are not those that were written; the backbone is checked again" in caplog.text
    assert file.read_text() == whole


def test_rows_beyond_the_context_are_refused_before_training(saved: Any) -> None:
    backbone = saved("gpt2")
    backbone.check(families.CONTEXT)
    with pytest.raises(ValueError, match=f"max_prompt_tokens.* up to 99 tokens.*context of gpt20, {families.CONTEXT}.*by 3"):
        backbone.check(families.CONTEXT + 3)


def test_what_is_not_exact_is_refused_and_not_cached(saved: Any, tmp_path: Any) -> None:
    for _ in range(2):
        with pytest.raises(NotExactError, match="model_type bert.*not causal"):
            saved("bert").check(20)
    assert not (tmp_path / "readings").exists()


def test_random_states_are_preserved(saved: Any) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    backbone = saved("llama")
    torch.manual_seed(7)
    backbone.check(20)
    assert torch.equal(torch.rand(3), expected)
