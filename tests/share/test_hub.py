"""Runs on the hub, against a stand-in on localhost that answers what huggingface_hub asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import recbole_llm
from recbole_llm.leaderboard.forecast import forecast
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.share.sharing import share
from recbole_llm.store import hub as hub_module
from recbole_llm.store.files import MANIFEST, sha256_file
from tests.leaderboard.test_forecast import record
from tests.share.hub_server import TOKEN, Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as (found, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template[template.index("/{repo_id}") :])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose servers are others than the hub's
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def run(module_settings: dict[str, Any]) -> Path:
    return Path(run_recbole_llm("SASRec", "tiny", config_dict={**module_settings, "epochs": 2})["record"]).parent


def test_a_run_is_shared_on_the_hub_and_read_back(run: Path, hub: Hub, data_path: Path, tmp_path: Path) -> None:
    lines = share(run, "hub:me/films", private=True)
    assert lines[-1].endswith("/me/films") and hub.private == {"me/films"}
    files = hub.files["me/films"]
    assert {"README.md", "MANIFEST.json", "weights.safetensors", "curves.png"} < {*files}
    assert {*hub.large} == {"weights.safetensors", "curves.png"}
    assert b"recbole-llm recommend --run=hub:me/films" in files["README.md"]
    kept = [name for name in json.loads(files["MANIFEST.json"]) if name.startswith("runs/")]
    assert kept == [f"runs/{run.name}/record.json"]

    expected = recbole_llm.load(run).recommend(users=["u1", "u2"], k=3)
    found = recbole_llm.load("hub:me/films", data_path=str(data_path)).recommend(users=["u1", "u2"], k=3)
    assert found.equals(expected)
    asked = len(hub.asked)
    recbole_llm.load("hub:me/films", data_path=str(data_path))
    assert not [line for line in hub.asked[asked:] if "/resolve/" in line]  # the cache has it

    files["README.md"] += b"\nMore about it, written on the hub's page.\n"
    assert recbole_llm.load("hub:me/films", data_path=str(data_path))
    files["settings.json"] += b" "
    with pytest.raises(ValueError, match=r"--run=hub:me/films is not a shared run as it was written: .*settings.json"):
        recbole_llm.load("hub:me/films", data_path=str(data_path))


def test_a_second_run_takes_the_place_of_the_first(run: Path, hub: Hub, module_settings: dict[str, Any]) -> None:
    share(run, "hub:me/films")
    other = Path(run_recbole_llm("Pop", "tiny", config_dict=module_settings)["record"]).parent
    share(other, "hub:me/films")
    assert [name for name in hub.files["me/films"] if name.endswith("record.json")] == [f"runs/{other.name}/record.json"]
    assert "curves.png" not in hub.files["me/films"]  # of the first


def test_a_merge_on_the_hub_is_a_point_of_a_forecast(hub: Hub, tmp_path: Path) -> None:
    made = record(tmp_path, 0, {"LoRACocktail": 26}, {"cosine": 0.5})
    (tmp_path / "shared").mkdir()
    made.parent.rename(tmp_path / "shared" / "runs")
    files = {
        file.relative_to(tmp_path / "shared").as_posix(): file for file in (tmp_path / "shared").rglob("*.*") if file.is_file()
    }
    manifest = json.dumps({name: sha256_file(file) for name, file in files.items()})
    hub.files["me/mix"] = {MANIFEST: manifest.encode()} | {name: file.read_bytes() for name, file in files.items()}
    (merged,) = forecast(["hub:me/mix"]).merges
    assert len(merged.adapters) == 2 and merged.features["cosine of the updates"] == 0.5
    hub.files["me/mix"]["runs/0-1/record.json"] += b" "
    with pytest.raises(ValueError, match=r"^forecast=hub:me/mix is not a shared run as it was written: .*record.json"):
        forecast(["hub:me/mix"])


def test_a_repository_with_something_else_stays_as_it_is(run: Path, hub: Hub) -> None:
    hub.files["me/thesis"] = {".gitattributes": b"", "chapter1.tex": b"x", "weights.bin": b"y"}
    with pytest.raises(ValueError, match=r"--to=hub:me/thesis: the repository has other files, such as chapter1.tex; give a new"):
        share(run, "hub:me/thesis")
    assert {*hub.files["me/thesis"]} == {".gitattributes", "chapter1.tex", "weights.bin"}


def test_only_kinds_of_files_that_execute_nothing_are_downloaded(run: Path, hub: Hub, data_path: Path, tmp_path: Path) -> None:
    share(run, "hub:me/films")
    hub.files["me/films"] |= {"weights.pth": b"pickled", "model.py": b"raise SystemExit"}
    assert recbole_llm.load("hub:me/films", data_path=str(data_path))
    assert not [*tmp_path.rglob("*.pth"), *tmp_path.rglob("*.py")]


def test_what_the_hub_refuses_is_one_sentence(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse = 403
    with pytest.raises(
        ValueError, match=r"^--to=hub:me/films: you may not write it \(HTTP 403\); use a token that may \(HF_TOKEN\)$"
    ):
        share(run, "hub:me/films")
    with pytest.raises(
        ValueError, match=r"^--run=hub:me/none: there is no such repository, or you may not see it; check the name"
    ):
        recbole_llm.load("hub:me/none")
    monkeypatch.delenv("HF_TOKEN")
    hub.refuse = 0
    with pytest.raises(ValueError, match=r"--to=hub:me/films: .* or set HF_TOKEN$"):
        share(run, "hub:me/films")
    assert not hub.files


@pytest.mark.parametrize("given", ["hub:films", "hub:", "hub:me/films/more", "hub:../films", "hub:me/films@"])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(given: str, run: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match=rf"--to={given}: give hub:user/name, or hub:user/name@revision"):
        share(run, given)
    with pytest.raises(ValueError, match=rf"--run={given}: give hub:user/name, or hub:user/name@revision"):
        recbole_llm.load(given)
    assert not hub.asked


def test_a_commit_is_read_and_not_written() -> None:
    assert hub_module.parse("hub:me/films@v1.0", "--run") == ("me/films", "v1.0")
    with pytest.raises(ValueError, match="a commit cannot be written; give hub:user/name"):
        hub_module.upload(Path(), "hub:me/films@v1.0", "--to", marker="x", private=False)


def test_offline(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for offline, message in (
        (True, "HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or"),
        (False, "cannot be reached"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        with pytest.raises(ValueError, match=f"^--run=hub:me/films: .*{message}"):
            recbole_llm.load("hub:me/films")
        with pytest.raises(ValueError, match=f"^--to=hub:me/films: .*{message}"):
            share(run, "hub:me/films")
