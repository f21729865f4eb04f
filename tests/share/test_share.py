"""A shared run recommends what the run does, and has no rows of data, no users and no paths."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

import recbole_llm
from recbole_llm.classical.imported_checkpoint import read_checkpoint
from recbole_llm.evaluation.record_files import read_record
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.share.base_models import BaseModel
from recbole_llm.share.card import card
from recbole_llm.share.public_record import anonymous, without_paths
from recbole_llm.share.sharing import share
from recbole_llm.store.files import MANIFEST, sha256_file
from recbole_llm.store.json_files import CHECKSUM, sealed

QUICK: dict[str, Any] = {"train_samples": 8, "lora_epochs": 1, "retriever_config": {"epochs": 1}}


def trained(name: str, settings: dict[str, Any], **changes: Any) -> Path:
    return Path(run_recbole_llm(name, "tiny", config_dict={**settings, **changes})["record"]).parent


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def reseal(folder: Path) -> None:
    """Write the manifest anew, as whoever makes such a folder can."""
    sums = {name: digest for name, digest in contents(folder).items() if not name.endswith(MANIFEST) and name != "README.md"}
    (folder / MANIFEST).write_text(json.dumps(sums))


@pytest.fixture(scope="module")
def sasrec(module_settings: dict[str, Any]) -> Path:
    return trained("SASRec", module_settings, epochs=2)


@pytest.fixture(scope="module")
def tallrec(module_settings: dict[str, Any]) -> Path:
    return trained("TALLRec", module_settings, **QUICK)


@pytest.fixture
def shared(sasrec: Path, tmp_path: Path) -> Path:
    share(sasrec, str(tmp_path / "shared"))
    return tmp_path / "shared"


def check_private(folder: Path, run: Path, lm: Path) -> None:
    """No user, title or path of this machine is in any file."""
    record = read_record(next(folder.glob("runs/*/record.json")))
    assert record["slice_users"] == {} and {*record["ranks"]} == {*record["results"]}
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        content = file.read_bytes()
        for secret in (str(run.parents[2]), str(lm.parent), str(Path.home()) + "/", str(Path.cwd())):
            assert secret.encode() not in content, file
        if file.suffix in (".json", ".md"):
            assert not re.search(rb'"u\d+"|"i\d+"|The (red|blue|green|old|new) ', content), file


def test_a_classical_model(sasrec: Path, shared: Path, data_path: Path, tiny_lm: Path, tmp_path: Path) -> None:
    check_private(shared, sasrec, tiny_lm)
    before = contents(shared)
    expected = recbole_llm.load(sasrec).recommend(users=["u1", "u7"], k=5)
    moved = shared.rename(tmp_path / "elsewhere")
    for given in (moved, moved / "runs" / sasrec.name, moved / "runs" / sasrec.name / "record.json"):
        assert recbole_llm.load(given, data_path=str(data_path)).recommend(users=["u1", "u7"], k=5).equals(expected)
    assert contents(moved) == before  # nothing is written into it
    record, own = read_record(next(moved.glob("runs/*/record.json"))), read_record(sasrec / "record.json")
    assert record["results"] == own["results"] and record["fingerprint"] == own["fingerprint"]
    assert sorted(record["ranks"]["SASRec"].values()) == sorted(own["ranks"]["SASRec"].values())
    assert not {"data_path", "checkpoint_dir", "gpu_id"} & {*record["config"]}
    assert json.loads((moved / "settings.json").read_text()) == record["config"]
    passport = json.loads((moved / "passport.json").read_text())
    assert passport["sha256"] == own["passport"]["sha256"] and "sketches" not in passport


def test_shared_weights_are_a_checkpoint_of_a_collaborative_model(sasrec: Path, shared: Path) -> None:
    """With the settings that they were trained with, ``train_mode`` among them."""
    (weights,) = shared.rglob("weights.safetensors")
    own = read_record(sasrec / "record.json")
    theirs = read_checkpoint(sasrec.parents[1] / own["checkpoint"]["file"])
    found = read_checkpoint(weights)
    assert found.state_dict.keys() == theirs.state_dict.keys() and "item_embedding.weight" in found.state_dict
    assert all(torch.equal(value, theirs.state_dict[name]) for name, value in found.state_dict.items())
    assert found.settings("SASRec") == theirs.settings("SASRec") and found.settings("SASRec")["train_mode"] == "auto"


def test_the_card_has_the_measured_table(sasrec: Path, shared: Path) -> None:
    found, own = ModelCard.load(shared / "README.md"), read_record(sasrec / "record.json")
    assert {one.metric_name: one.metric_value for one in found.data.eval_results} == own["results"]["SASRec"]
    assert {one.dataset_name for one in found.data.eval_results} == {"tiny"}
    assert found.data.model_name == "SASRec on tiny" and found.data.license is None
    assert f"{own['results']['SASRec']['ndcg@5']:.4f}" in found.text and "(curves.png)" in found.text


@pytest.mark.slow
def test_a_merge(module_settings: dict[str, Any], tiny_lm: Path, tmp_path: Path) -> None:
    beside = {"merge_beside": {"even": {"merge": "uniform"}}, "placebos": ["zero"]}
    run = trained("LoRACocktail", module_settings, merge="grid", merge_prompts=4, **beside, **QUICK)
    folder = tmp_path / "shared"
    share(run, str(folder))
    check_private(folder, run, tiny_lm)
    own, record = read_record(run / "record.json"), read_record(next(folder.glob("runs/*/record.json")))
    lattice = [stage for stage in own["stages"] if "lattice" in stage]
    assert lattice and {*own["stages"]} - {*record["stages"]} == {*lattice}  # scores of single users
    merged = folder / "stages" / own["stages"]["cocktail"] / "merged"
    assert json.loads((merged / "merge.json").read_text())["weights"] == own["merge"]["weights"]
    text = ModelCard.load(folder / "README.md").text
    assert "The model is a merge of adapters by grid" in text and f"subfolder='{merged.relative_to(folder)}'" in text
    assert recbole_llm.load(folder, data_path=module_settings["data_path"], llm_path=str(tiny_lm)).run.variants.keys() == {
        *own["results"]
    }


def test_an_adapter(tallrec: Path, data_path: Path, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shared"
    lines = share(tallrec, str(folder), licence="mit")
    assert any("licence of tiny-llama: not found" in line for line in lines)
    check_private(folder, tallrec, tiny_lm)
    adapter = next(folder.glob("stages/ingredient-*"))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    lm = AutoModelForCausalLM.from_pretrained(tiny_lm)
    PeftModel.from_pretrained(lm, folder, subfolder=adapter.relative_to(folder).as_posix())  # as the card says
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "mit"
    assert f"subfolder='{adapter.relative_to(folder)}'" in card.text

    with pytest.raises(
        ValueError, match="trained on tiny-llama, which is not shared with it; give --llm_path=FOLDER of tiny-llama"
    ):
        recbole_llm.load(folder, data_path=str(data_path))
    expected = recbole_llm.load(tallrec).recommend(users=["u1"], k=3)
    monkeypatch.chdir(tallrec.parents[2].parent)  # with its retriever
    found = recbole_llm.load(folder, data_path=str(data_path), llm_path=str(tiny_lm)).recommend(users=["u1"], k=3)
    assert found.equals(expected)


def test_another_base_model_is_refused(tallrec: Path, data_path: Path, tiny_lm: Path, tmp_path: Path) -> None:
    share(tallrec, str(tmp_path / "shared"))
    other = shutil.copytree(tiny_lm, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="this is not tiny-llama, on which the run was trained"):
        recbole_llm.load(tmp_path / "shared", data_path=str(data_path), llm_path=str(other))


def test_users_stay_if_that_is_asked_for(sasrec: Path, tmp_path: Path) -> None:
    share(sasrec, str(tmp_path / "shared"), user_ids=True)
    record, own = read_record(next((tmp_path / "shared").glob("runs/*/record.json"))), read_record(sasrec / "record.json")
    assert record["ranks"] == own["ranks"] and record["slice_users"] == own["slice_users"]


def test_rows_can_be_compared_user_by_user_without_their_ids() -> None:
    one = {"model": {"ann": 3, "bob": None, "cy": 1}, "control": {"ann": 1, "bob": 2, "cy": 2}}
    renamed = {
        row: {{"ann": "z", "bob": "y", "cy": "x"}[user]: rank for user, rank in ranks.items()} for row, ranks in one.items()
    }
    expected = {"model": {"1": 1, "2": 3, "3": None}, "control": {"1": 2, "2": 1, "3": 2}}
    assert anonymous(one) == anonymous(renamed) == expected


def test_paths_lose_their_folders_and_other_texts_stay(tmp_path: Path) -> None:
    given = {
        "llm": str(tmp_path / "models" / "lm"),
        "note": f"imported from {tmp_path}/models/a.pth, and more",
        "windows": r"C:\Users\ann\lm",
        "home": "~/secret/lm",
        "separator": "/",
        "prompt": "/INST\n{history} and/or [/INST]",
        "rate": "12 MB/s",
        "numbers": [1, 2.5, None, True],
    }
    assert without_paths(given, [str(tmp_path)]) == given | {
        "llm": "lm",
        "note": "imported from a.pth, and more",
        "windows": "lm",
        "home": "lm",
    }


# -- what is not as it was shared --------------------------------------------------------------------------------------


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = next(folder.glob("runs/*/record.json"))
    record = read_record(path)
    change(record)
    record.pop(CHECKSUM)
    path.write_text(sealed(record))
    reseal(folder)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a byte": (lambda folder: (folder / "settings.json").open("a").write(" "), "its SHA-256 is not the one"),
    "a file more": (lambda folder: (folder / "more.json").write_text("{}"), "it is not in MANIFEST.json"),
    "a file less": (lambda folder: (folder / "passport.json").unlink(), "the file passport.json is missing"),
    "another kind": (
        lambda folder: ((folder / "model.pth").write_bytes(b"x"), reseal(folder)),
        "no kind of file that a shared run",
    ),
    "elsewhere": (lambda folder: (folder / MANIFEST).write_text('{"../secret.json": "0"}'), "which is elsewhere|not in MANIFEST"),
    "a manifest of nothing": (lambda folder: (folder / MANIFEST).write_text("{}"), "names no file"),
    "two runs": (
        lambda folder: (shutil.copytree(next(folder.glob("runs/*")), folder / "runs" / "two"), reseal(folder)),
        "a shared run has one record, and this has 2",
    ),
    "a class": (
        lambda folder: ((folder / "modules.json").write_text('[{"type": "os.system"}]'), reseal(folder)),
        "names the class os.system, which is not one of sentence_transformers",
    ),
    "a function": (
        lambda folder: change_record(folder, lambda record: record["config"].update(merge="antigravity:fly")),
        "names 'antigravity:fly', code of its author",
    ),
    "a model": (
        lambda folder: change_record(folder, lambda record: record["config"].update(cf_model="antigravity:Fly")),
        "names 'antigravity:Fly', code of its author",
    ),
    "a stage elsewhere": (
        lambda folder: change_record(folder, lambda record: record.update(stages={"x": "../../x"})),
        "does not have the form of a record",
    ),
    "weights": (
        lambda folder: ((folder / "weights.safetensors").write_bytes(b"x"), reseal(folder)),
        "has changed since the run wrote it",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_shared_run_is_read_only_as_it_was_written(name: str, shared: Path, data_path: Path) -> None:
    damage, message = DAMAGES[name]
    damage(shared)
    with pytest.raises(ValueError, match=message):
        recbole_llm.load(shared, data_path=str(data_path))


def test_the_card_may_be_edited(shared: Path, data_path: Path) -> None:
    (shared / "README.md").write_text("# Mine\n")
    assert recbole_llm.load(shared, data_path=str(data_path))
    (shared / "README.md").unlink()
    assert recbole_llm.load(shared, data_path=str(data_path))


def test_other_data_is_named(shared: Path, data_path: Path, tmp_path: Path) -> None:
    shutil.copytree(data_path / "tiny", tmp_path / "data" / "tiny")
    table = tmp_path / "data" / "tiny" / "tiny.inter"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(
        ValueError, match=r"this machine's tiny .* is not the data .*: .* interactions against .*the test targets diff"
    ):
        recbole_llm.load(shared, data_path=str(tmp_path / "data"))


# -- what is not shared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("EASE", {}, "keeps interaction_matrix beside its weights, which contains interactions of users"),
        ("Imported", {}, "has the predictions of another system, and no weights"),
    ],
)
def test_runs_that_are_not_shared(
    name: str, changes: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = trained(name, settings, **changes)
    with pytest.raises(ValueError, match=message):
        share(run, str(tmp_path / "shared"))
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cf_checkpoint": "model.pth"}, r"made with a file of yours \(cf_checkpoint\)"),
        ({"candidates": {"source": "file"}}, r"made with a file of yours \(candidates.file\)"),
        ({"adapters": {"ingredient": "."}}, r"made with a file of yours \(adapters.ingredient\)"),
        ({"cheap_checkpoint": "model.pth"}, r"made with a file of yours \(cheap_checkpoint\)"),
        *(({"merge": name}, rf"uses code of yours \({name}\), which others lack") for name in ("mine:merge", "mine.merge")),
        (
            {"candidate_phases": [], "full_phases": ["valid"]},
            r"was evaluated by labels or drawn negatives, and",
        ),
        ({"merge_beside": {"mine": {"merge": "mine:merge"}}}, r"uses code of yours \(mine:merge\)"),
        *(({key: "mine:Model"}, r"uses code of yours \(mine:Model\)") for key in ("cf_model", "cheap_model", "retriever")),
    ],
)
def test_what_others_lack_is_named(values: dict[str, Any], message: str, sasrec: Path, tmp_path: Path) -> None:
    record = read_record(sasrec / "record.json")
    record["config"] |= values
    record.pop(CHECKSUM)
    path = tmp_path / "saved" / "runs" / "run" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(sealed(record))
    with pytest.raises(ValueError, match=message):
        share(path, str(tmp_path / "shared"))


def test_a_folder_that_exists_stays(sasrec: Path, shared: Path) -> None:
    before = contents(shared)
    with pytest.raises(ValueError, match="it exists already; give a folder that does not, or hub:user/name"):
        share(sasrec, str(shared))
    with pytest.raises(ValueError, match="was shared with you; copy its folder"):
        share(shared, str(shared.parent / "again"))
    assert contents(shared) == before


def test_hostile_names_are_text_in_the_card(sasrec: Path) -> None:
    record = read_record(sasrec / "record.json")
    record["dataset"] = "x`\n\n# [click](http://a) <script> |\n---\nlicense: mit"
    record["results"] = {"a | b\n---": record["results"]["SASRec"]}
    text = card(record, [], {}, name="here", licence=None, left_out=["all"], picture=False)
    found = ModelCard(text)
    assert found.data.license is None and "\n# [click]" not in text and text.count("\n---\n") == 1
    assert "| a \\| b --- |" in found.text and "# SASRec on x\\` \\# \\[click\\](http://a) \\<script\\>" in found.text


def test_both_ways_of_loading_name_the_folder_that_is_not_shared(sasrec: Path) -> None:
    record = read_record(sasrec / "record.json")
    base = BaseModel("backbone", "tiny-llama", False, None, "llm_path")
    text = card(record, [base], {}, name="my run", licence=None, left_out=["all"], picture=False)
    assert "recbole-llm recommend --run='my run' --llm_path=FOLDER --user=ID" in text
    assert "recbole_llm.load('my run', llm_path='FOLDER')" in text
