"""What goes wrong for users, as they meet it: one test for each row of the table of bad input, under its name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.cli import main
from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.llm.lora import attach_lora, load_adapters, save_adapter
from recbole_llm.quick_start import assemble, run_recbole_llm


def run(model: str, settings: dict[str, Any], **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Result and run record."""
    result = run_recbole_llm(model, "tiny", config_dict={**settings, **values})
    return result, json.loads(Path(result["record"]).read_text())


@pytest.fixture
def own_data(data_path: Path, tmp_path: Path, settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """``own_data(inter=..., item=...)``: settings for a copy of ``tiny`` whose files went through these functions."""

    def make(**changes: Callable[[str], str]) -> dict[str, Any]:
        folder = tmp_path / "own" / "tiny"
        shutil.copytree(data_path / "tiny", folder)
        for kind, change in changes.items():
            file = folder / f"tiny.{kind}"
            file.write_text(change(file.read_text()))
        return {**settings, "data_path": str(folder.parent)}

    return make


def test_unknown_key(
    settings: dict[str, Any], data_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Error naming the key, the file it stands in and the nearest known key; on the command line in one line."""
    Path("mine.yaml").write_text("max_histroy: 5\n")
    with pytest.raises(ValueError, match=r"unknown key `max_histroy` in mine\.yaml; did you mean `max_history`\?"):
        run_recbole_llm("TALLRec", "tiny", ["mine.yaml"], settings)
    command = ["--model=Pop", "--dataset=tiny", f"--data_path={data_path}", "--topkk=5"]
    monkeypatch.delenv("RECBOLE_LLM_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert capsys.readouterr().err.endswith("error: unknown key `topkk` in the command line; did you mean `topk`?\n")
    monkeypatch.setenv("RECBOLE_LLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key"):
        main(command)


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [("ml-1m", ConnectionError, "could not be fetched"), ("mine", FileNotFoundError, "RecBole knows no download")],
)
def test_dataset_not_on_disk_and_not_downloadable(
    name: str, error: type[Exception], reason: str, settings: dict[str, Any]
) -> None:
    """Error with the folder and files expected, and the embedded dataset to try."""
    with pytest.raises(error) as caught:
        run_recbole_llm("LoRACocktail", name, config_dict=settings)
    for part in (reason, f"{name}.inter", f"{name}.item", str(Path(settings["data_path"]) / name), "--dataset=ml-100k"):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["title_field", "year_field", "brand_field", "category_field"])
def test_a_named_field_that_is_absent(key: str, settings: dict[str, Any]) -> None:
    """Error naming the columns of the .item file that exist."""
    columns = "its columns are item_id, title, year, genre"
    with pytest.raises(ValueError, match=rf"{key}: .*'nosuch' in .*tiny\.item; {columns}"):
        run("TALLRec", settings, **{key: "nosuch"})


def test_no_title_field(own_data: Callable[..., dict[str, Any]]) -> None:
    """Error naming the columns there are; classical models need no title and run."""
    settings = own_data(item=lambda text: text.replace("title:token_seq", "caption:token_seq"))
    with pytest.raises(ValueError, match=r"title_field: .*'title' in .*; its columns are item_id, caption, year, genre"):
        run("TALLRec", settings)
    assert len(run("Pop", settings)[1]["ranks"]["Pop"]) == 60


def test_no_domain_field(settings: dict[str, Any]) -> None:
    """Error naming the columns there are."""
    with pytest.raises(ValueError, match=r"domain_field: tiny\.item has no column 'nosuch', only year, genre"):
        run("LoRACocktail", settings, domain_field="nosuch")


def test_an_item_without_a_title(own_data: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    """Its other texts, else ``item <id>``; counted in one warning."""

    def blank(text: str) -> str:
        text = re.sub(r"(?m)^(i3)\t[^\t]*", r"\1\t", text)
        return re.sub(r"(?m)^(i4)\t.*$", r"\1\t\t\t", text)

    settings = own_data(item=blank)
    run("NearestTitles", settings)
    assert len(re.findall("2 of 40 items have no title", caplog.text)) == 1
    texts = create_dataset(LLMConfig("TALLRec", "tiny", config_dict=settings)).item_texts
    assert "drama film, 1983" in texts.titles and "item i4" in texts.titles


def test_duplicate_titles(own_data: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    """Told apart by year, brand or id in prompts; counted; never two of them among a user's candidates."""

    def repeat(text: str) -> str:
        text = re.sub(r"(?m)^(i[1-4])\t[^\t]*", r"\1\tCape Fear", text)  # years 1981 to 1984
        return text.replace("\t1984\t", "\t1983\t")  # and two of them in the same year

    settings = own_data(item=repeat)
    run("NearestTitles", settings)
    assert "4 items share their title with another one" in caplog.text
    config = LLMConfig("TALLRec", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    names = dataset.item_texts.names
    assert len(set(names)) == len(names) == 41
    assert {"Cape Fear (1981)", "Cape Fear (1982)", "Cape Fear (1983) (i3)", "Cape Fear (1983) (i4)"} <= set(names)
    titles = dataset.item_texts.titles
    for row in assemble(config).candidates["test"].items.tolist():
        assert len({titles[item] for item in row}) == len(row)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("org/nosuch", ["cannot load org/nosuch", "the local cache (HF_HOME) and the hub", "llm_path: builtin"]),
        ("/nosuch/folder", ["there is no folder /nosuch/folder", "'builtin'"]),
    ],
)
def test_backbone_not_found_offline(path: str, parts: list[str], settings: dict[str, Any]) -> None:
    """Error naming the id, what was tried, and ``builtin``."""
    with pytest.raises(FileNotFoundError) as caught:
        run("TALLRec", settings, llm_path=path)
    assert all(part in str(caught.value) for part in parts)


def test_prompt_that_cannot_fit(settings: dict[str, Any]) -> None:
    """Error with the lengths and the key to change."""
    lengths = r"the prompt has \d+ tokens without history, \d+ of them in its candidates; raise it"
    with pytest.raises(ValueError, match=f"max_prompt_tokens: 20 is too small, {lengths}"):
        run("TALLRec", settings, max_prompt_tokens=20, prompt="listwise", lora_train_mode="prefix")


@pytest.mark.slow
def test_damaged_cache(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A cached stage is named, refused and computed again."""
    first = run("TALLRec", settings)[0]["test_result"]
    (weights,) = Path(settings["checkpoint_dir"]).glob("stages/ingredient-*/*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7] + b"damaged")
    assert run("TALLRec", settings)[0]["test_result"] == first
    assert weights.read_bytes() == whole
    assert re.search(rf"{weights.parent.name}.*{weights.name}: its SHA-256 .*computed again", caplog.text)


def test_damaged_checkpoint(settings: dict[str, Any]) -> None:
    """Refused by name: there is nothing to rebuild it from."""
    run = assemble(LLMConfig("BPR", "tiny", config_dict=settings))
    trainer = run.trainer
    trainer.fit(run.train, run.valid, show_progress=False)
    file = Path(trainer.saved_model_file)
    half = file.with_name("half.pth")
    half.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half\.pth: not a checkpoint that can be loaded .*train the model again"):
        trainer.evaluate(run.test, model_file=str(half))


def test_damaged_candidate_file(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Our own is named and regenerated; a user's is an error that names the line."""
    _, before = run("Pop", settings)
    (file,) = Path(settings["checkpoint_dir"]).glob("candidates/*test*.candidates")
    whole = file.read_text()
    file.write_text(whole[:-100])
    _, after = run("Pop", settings)
    assert f"{file.name} is regenerated" in caplog.text
    assert after["candidates_sha256"] == before["candidates_sha256"] and after["ranks"] == before["ranks"]

    Path("mine.tsv").write_text(whole.replace("\ti1", "\tx1", 1))
    source = {"source": "file", "file": {"valid": "mine.tsv", "test": "mine.tsv"}}
    with pytest.raises(ValueError, match=r"mine\.tsv, line \d+: .*x1"):
        run("Pop", settings, candidates=source)


def test_two_adapters_of_different_base_models(tiny_lm: Path, tmp_path: Path) -> None:
    """Refused with both names."""
    folders = {}
    for name in ("one", "two"):
        model = load_causal_lm(tiny_lm).model
        model = attach_lora(model, name=name, r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"], seed=0)
        folders[name] = tmp_path / name
        save_adapter(model, name, folders[name])
    file = folders["two"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/other"}))
    with pytest.raises(ValueError) as caught:
        load_adapters(load_causal_lm(tiny_lm).model, folders)
    assert all(part in str(caught.value) for part in ("one", "two", tiny_lm.name, "org/other"))


@pytest.mark.parametrize("model", ["Pop", "BPR", "ItemKNN", "NeuMF", "SASRec", "TALLRec"])
def test_item_never_seen_in_training(model: str, own_data: Callable[..., dict[str, Any]]) -> None:
    """It is ranked like any other candidate: ``new`` is the test item of one user and nothing else's."""
    late = 2_000_000_000
    settings = own_data(
        inter=lambda text: f"{text}u0\tnew\t{late}\n",
        item=lambda text: f"{text}new\tThe unseen thing\t2030\tdrama film\n",
    )
    _, record = run(model, settings)
    assert 1 <= record["ranks"][model]["u0"] <= 10 and len(record["ranks"][model]) == 60


@pytest.mark.parametrize("model", ["Pop", "BPR", "NeuMF", "SASRec", "TALLRec"])
def test_user_with_too_little_history(model: str, own_data: Callable[..., dict[str, Any]]) -> None:
    """Users with fewer than four interactions train but are not evaluated, by any model."""
    few = "".join(f"few{n}\ti{item}\t{item}\n" for n in (1, 2, 3) for item in range(n))
    _, record = run(model, own_data(inter=lambda text: text + few))
    assert set(record["ranks"][model]) == {f"u{user}" for user in range(60)}


def test_user_with_no_history(settings: dict[str, Any]) -> None:
    """An LLM ranks by the titles alone: the scores are those of an empty prompt, and finite."""
    run = assemble(LLMConfig("TALLRec", "tiny", config_dict=settings))
    run.trainer.fit(run.train, show_progress=False)
    candidates = torch.tensor([[3, 1, 2], [1, 2, 3]])
    fields = {
        "user_id": torch.tensor([1, 2]),
        "item_id_list": torch.zeros(2, 5, dtype=int),
        "item_length": torch.zeros(2, dtype=int),
    }
    with torch.no_grad():
        scores = run.model.score_candidates(Interaction(fields), candidates)
    assert torch.isfinite(scores).all()
    assert torch.allclose(scores[0].roll(-1), scores[1], atol=1e-5)
