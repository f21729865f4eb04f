"""Other data or settings compute again what reads them, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.llm import backbones
from tests.conftest import assembled
from tests.contract.recomputation.conftest import (
    ADAPTED,
    ALL,
    CANDIDATES,
    PROJECTED,
    ROWS,
    VALIDATED,
    WOVEN,
    Trained,
    _check,
    every_run,
)

TARGET = "lora-tiny lora-other+tiny weave"  # WeaveRec's stages that read its target
BACKBONE: dict[str, tuple[str, Any]] = {
    "TALLRec": (ALL, ALL),
    "LoRACocktail": (ALL, ALL),
    "builtin": ("base-spirit ingredient cocktail", ALL),
    "ALLMRec": ("projection", ALL),
    "Laser": ("phase-1 phase-2", ()),
    "Cascade": ("ingredient routing", ALL),
    "WeaveRec": (ALL, ALL),
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, Any]]]] = {
    "nothing": ({}, {}),
    "dtype": ({"dtype": "bfloat16"}, BACKBONE),
    "candidates.seed": ({"candidates": {"num_negatives": 9, "seed": 7}}, CANDIDATES),
    "prompt template": (
        {"prompts": {"history": "Seen: {history}"}},
        {
            "TALLRec": (ALL, ALL),
            "LoRACocktail": (ALL, ALL),
            "builtin": ("base-spirit ingredient cocktail", ALL),
            "Laser": ("phase-1 phase-2", ()),
            "Cascade": ("ingredient routing", ALL),
            "WeaveRec": (ALL, ALL),
        },
    ),
    "soft prompt template": (
        {"prompts": {"allmrec_history": "{user}Seen: {history}"}},
        {"ALLMRec": ("projection", ALL)},
    ),
    "valid_metric": (
        {"valid_metric": "MRR@5"},
        {
            "TALLRec": (ALL, {"TALLRec"}),
            "LoRACocktail": ("ingredient cocktail", VALIDATED),
            "builtin": ("ingredient cocktail", VALIDATED),
            "ALLMRec": ("projection", PROJECTED),
            "Laser": ("phase-1 phase-2", ()),
            "Cascade": ("ingredient routing", ALL),
            "WeaveRec": ("weave", {"WeaveRec"}),
        },
    ),
    "seed": (
        {"seed": 7},
        {
            "TALLRec": (ALL, {"TALLRec"}),
            "LoRACocktail": (ALL, ADAPTED),
            "builtin": (ALL, ALL),
            "ALLMRec": (ALL, PROJECTED),
            "Laser": (ALL, ()),
            "AlphaRec": (ALL, ()),
            "Cascade": (ALL, ALL),
            "WeaveRec": (ALL, WOVEN),
        },
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
@every_run
def test_a_changed_setting_recomputes_what_reads_it(name: str, case: str, trained: Callable[[str], Trained]) -> None:
    changes, expected = SETTINGS[case]
    _check(trained(name).changed(**changes), expected, name)


@every_run
def test_a_quantised_backbone_is_another_backbone(
    name: str, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "check_bitsandbytes", lambda: None)
    stages, _ = trained(name).changed(rows=False, load_in_4bit=True)  # planned, not loaded
    _check((stages, ROWS[name] if name in BACKBONE else set()), BACKBONE, name)


@pytest.mark.parametrize("name", ["TALLRec", "LoRACocktail", "ALLMRec", "Laser"])
def test_a_copied_backbone_is_the_same_and_another_chat_template_is_not(
    name: str, trained: Callable[[str], Trained], tiny_lm: Path, tmp_path: Path
) -> None:
    run, folder = trained(name), Path(shutil.copytree(tiny_lm, tmp_path / "copied"))
    _check(run.changed(llm_path=str(folder)), {}, name)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    _check(run.changed(llm_path=str(folder)), BACKBONE, name)


@pytest.fixture
def rewrite(data: Path) -> Iterator[Callable[..., None]]:
    """Changes lines of a file of a dataset, which is as before after the test."""
    before = {file: file.read_text() for name in ("tiny", "other") for file in (data / name).iterdir()}

    def change(suffix: str, edit: Callable[[list[str]], None], name: str = "tiny") -> None:
        file = data / name / f"{name}.{suffix}"
        lines = file.read_text().splitlines()
        edit(lines)
        file.write_text("\n".join(lines) + "\n")

    yield change
    for file, text in before.items():
        file.write_text(text)


def _title(lines: list[str]) -> None:
    lines[6] = lines[6].replace("The ", "A ")


@every_run
def test_a_changed_title_recomputes_what_reads_titles(
    name: str, trained: Callable[[str], Trained], rewrite: Callable[..., None]
) -> None:
    run = trained(name)
    rewrite("item", _title)
    expected = {
        "TALLRec": (ALL, ALL),
        "LoRACocktail": (ALL, ALL),
        "builtin": (ALL, ALL),
        "ALLMRec": ("builtin-text-encoder alignment projection", ALL),
        "Laser": ("phase-1 phase-2", ()),
        "AlphaRec": (ALL, ()),
        "Cascade": ("ingredient routing", ALL),
        "WeaveRec": (TARGET, ALL),
    }
    _check(run.changed(), expected, name)


def test_a_changed_title_of_a_source_recomputes_what_reads_the_source(
    trained: Callable[[str], Trained], rewrite: Callable[..., None]
) -> None:
    run = trained("WeaveRec")
    rewrite("item", _title, "other")
    assert run.changed() == ({"lora-other", "lora-other+tiny", "weave"}, ROWS["WeaveRec"] - {"target only", "no adapter"})


def _swap(lines: list[str], first: int, second: int) -> None:
    """Exchange the items of two interactions; all items are known before, so that no internal id changes."""
    rows = {index: lines[index].split("\t") for index in (first, second)}
    rows[first][1], rows[second][1] = rows[second][1], rows[first][1]
    for index, row in rows.items():
        lines[index] = "\t".join(row)


@every_run
def test_another_order_in_training_recomputes_what_reads_histories(
    name: str, trained: Callable[[str], Trained], rewrite: Callable[..., None]
) -> None:
    def reorder(lines: list[str]) -> None:
        first = next(index for index, line in enumerate(lines) if line.startswith("u59\t"))
        _swap(lines, first, first + 2)

    run = trained(name)
    rewrite("inter", reorder)
    expected = {
        "TALLRec": (ALL, ALL),
        "LoRACocktail": (ALL, ALL),
        "builtin": (ALL, ALL),
        "ALLMRec": ("cf-SASRec alignment projection", ALL),
        "Laser": (ALL, ()),
        "Cascade": (ALL, ALL),
        "WeaveRec": (TARGET, ALL),
    }
    _check(run.changed(), expected, name)


@every_run
def test_another_test_item_recomputes_no_adapter(
    name: str, trained: Callable[[str], Trained], rewrite: Callable[..., None]
) -> None:
    """A collaborative model alone depends on the whole data set, whose numbering of items is RecBole's."""

    def target(lines: list[str]) -> None:
        own = {line.split("\t")[1] for line in lines if line.startswith("u59\t")}
        row = lines[-1].split("\t")
        row[1] = next(f"i{item}" for item in range(40) if f"i{item}" not in own)
        lines[-1] = "\t".join(row)

    run = trained(name)
    rewrite("inter", target)
    expected = {
        "TALLRec": ("", ALL),
        "LoRACocktail": ("", ALL),
        "builtin": ("", ALL),
        "ALLMRec": ("cf-SASRec alignment projection", ALL),
        "Laser": (ALL, ()),
        "Cascade": ("cf-SASRec routing", ALL),
        "WeaveRec": ("", ALL),
    }
    _check(run.changed(), expected, name)


def test_another_validation_item_is_another_history_at_test(
    trained: Callable[[str], Trained], rewrite: Callable[..., None]
) -> None:
    """The test candidates stay as they were; what the prompts show of the user does not."""

    def validated(lines: list[str]) -> None:
        row = lines[-2].split("\t")
        row[1] = other
        lines[-2] = "\t".join(row)

    run = trained("TALLRec")
    made = assembled(run.model, run.settings)
    tests, histories = made.test.candidates, made.test._dataset.histories
    user = histories.user_ids.index("u59")
    listed = tests.items[tests.users == user].flatten().tolist()
    other = next(
        token for item, token in enumerate(histories.item_ids) if item and item not in {*histories.items[user].tolist(), *listed}
    )
    rewrite("inter", validated)
    assert assembled(run.model, run.settings).test.candidates.sha256 == tests.sha256
    assert run.changed() == ({"ingredient"}, {"TALLRec", "no adapter"})
