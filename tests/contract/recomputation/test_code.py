"""A changed line of code computes again what runs it, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.data import candidate_sets
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import assembled
from tests.contract.recomputation.conftest import (
    ADAPTED,
    ALL,
    CANDIDATES,
    PACKAGE,
    PROJECTED,
    ROUTED,
    VALIDATED,
    WOVEN,
    Trained,
    _check,
    every_run,
)

CODE: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, Any]]]] = {
    # module, and the line in it -> run: stages, rows
    "another sign in the scorer": (
        ("llm.scoring", 'if self.normalize == "mean" else total', 'if self.normalize == "mean" else -total'),
        {
            "TALLRec": ("ingredient", ALL),
            "LoRACocktail": ("ingredient cocktail", ALL),
            "builtin": ("ingredient cocktail", ALL),
            "ALLMRec": ("projection", ALL),
            "Cascade": ("ingredient routing", ALL),
            "WeaveRec": ("weave", ALL),
        },
    ),
    "another order in the prompt": (
        ("data.prompts", "zip(self._numbers, reversed(kept), strict=False)", "zip(self._numbers, kept, strict=False)"),
        {
            "TALLRec": ("ingredient", ALL),
            "LoRACocktail": (ALL, ALL),
            "builtin": ("base-spirit ingredient cocktail", ALL),
            "ALLMRec": ("projection", ALL),
            "Laser": ("phase-1 phase-2", ()),
            "Cascade": ("ingredient routing", ALL),
            "WeaveRec": (ALL, ALL),
        },
    ),
    "a flipped gradient": (
        ("training.loop", "(loss if scale == 1 else loss * scale).backward()", "(-loss * scale).backward()"),
        {
            "TALLRec": ("ingredient", {"TALLRec"}),
            "LoRACocktail": (ALL, ADAPTED),
            "builtin": (ALL, ALL),
            "ALLMRec": ("alignment projection", PROJECTED),
            "Laser": ("phase-1 phase-2", ()),
            "Cascade": ("ingredient routing", ALL),
            "WeaveRec": (ALL, WOVEN),
        },
    ),
    "the builtin LM": (("llm.builtin_lm",), {"builtin": (ALL, ALL)}),
    "sequence training": (
        ("classical.sequence",),
        {"ALLMRec": ("cf-SASRec alignment projection", PROJECTED), "Laser": (ALL, ()), "Cascade": ("cf-SASRec routing", ROUTED)},
    ),
    "the classical trainer": (
        ("classical.trainer",),
        {"ALLMRec": ("cf-SASRec alignment projection", PROJECTED), "Laser": (ALL, ()), "Cascade": ("cf-SASRec routing", ROUTED)},
    ),
    "coefficients of merges": (
        ("merging.coefficients",),
        {
            "LoRACocktail": ("cocktail", {"LoRACocktail"}),
            "builtin": ("cocktail", {"LoRACocktail"}),
            "WeaveRec": ("weave", {"WeaveRec"}),
        },
    ),
    "ranks": (
        ("evaluation.ranks",),
        {
            "TALLRec": ("ingredient", {"TALLRec"}),
            "LoRACocktail": ("ingredient cocktail", VALIDATED),
            "builtin": ("ingredient cocktail", VALIDATED),
            "ALLMRec": ("cf-SASRec alignment projection", PROJECTED),
            "Laser": (ALL, ()),
            "Cascade": (ALL, ALL),
            "WeaveRec": ("weave", {"WeaveRec"}),
        },
    ),
    "candidates, drawn as before": (("data.candidates",), {}),
    "the builtin text encoder": (
        ("llm.builtin_text_encoder",),
        {"ALLMRec": ("builtin-text-encoder alignment projection", PROJECTED), "AlphaRec": (ALL, ())},
    ),
    "the rows of Cascade": (("model.cascade",), {"Cascade": ("", ROUTED)}),
    "routing": (("model.cascade.routing",), {"Cascade": ("routing", ROUTED)}),
    "pictures": (("evaluation.plots",), {}),
}


@pytest.mark.parametrize("case", CODE)
@every_run
def test_a_changed_line_recomputes_what_runs_it(
    name: str, case: str, trained: Callable[[str], Trained], edit: Callable[..., Path]
) -> None:
    run, (line, expected) = trained(name), CODE[case]
    edit(*line)
    _check(run.changed(), expected, name)


@every_run
def test_other_candidates_recompute_what_validates_on_them(
    name: str, trained: Callable[[str], Trained], edit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(name)
    file = edit("data.candidates", "sha256(key.encode())", "sha256(key.encode()[1:])")
    spec = importlib.util.spec_from_file_location("edited_candidates", file)
    assert spec and spec.loader
    monkeypatch.setitem(sys.modules, spec.name, edited := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(edited)
    monkeypatch.setattr(candidate_sets, "draw", edited.draw)
    _check(run.changed(), CANDIDATES, name)


def test_a_changed_retriever_has_its_candidates_ranked_again(
    trained: Callable[[str], Trained], edit: Callable[..., Path], tmp_path: Path
) -> None:
    settings = trained("TALLRec").settings | {
        "checkpoint_dir": str(tmp_path),
        "candidates": {"num_negatives": 9, "source": "retriever"},
        "retriever": "BPR",
        "retriever_config": {"epochs": 1},
    }

    def ran() -> tuple[list[str], int]:
        """Names of the folders of the retriever and of the adapter, and how many candidate files there are."""
        run = assembled("TALLRec", settings)
        run.trainer._run_stages()
        stages = run.trainer._retriever.stage, *run.trainer._stages
        assert run.test.candidates.items.shape == (60, 10)
        files = [file for file in (tmp_path / "candidates").glob("[!.]*") if file.suffix != ".json"]
        return [run.trainer.cache.folder(stage).name for stage in stages], len(files)

    before, files = ran()
    assert ran() == (before, files) and files == 2
    edit("classical.retriever")
    after, more = ran()
    assert after[0] == before[0] and after[1] != before[1]  # its training does not run that file
    assert more == 4


def test_a_changed_text_encoder_encodes_its_texts_again(trained: Callable[[str], Trained], edit: Callable[..., Path]) -> None:
    run = trained("AlphaRec")
    vectors = Path(run.settings["checkpoint_dir"]) / "text_vectors"

    def cached() -> set[Path]:
        model = assembled("AlphaRec", run.settings)
        model.trainer._run_stages()
        return set(vectors.glob("[!.]*"))

    before = cached()
    edit("data.prompts")
    assert cached() == before
    edit("llm.text_encoder")
    assert cached() > before


@pytest.mark.slow
def test_a_changed_likelihood_gives_other_numbers_under_another_code(
    trained: Callable[[str], Trained], tmp_path: Path, tiny_lm: Path
) -> None:
    """End to end, in a process that runs the changed package on what the unchanged one has left."""
    settings = trained("TALLRec").settings
    before = json.loads(Path(run_recbole_llm("TALLRec", "tiny", config_dict=settings)["record"]).read_text())
    assert not any(before["stage_seconds"].values())
    shutil.copytree(PACKAGE, tmp_path / "recbole_llm", ignore=shutil.ignore_patterns("__pycache__"))
    properties = PACKAGE.parent / "properties"
    if properties.is_dir():
        (tmp_path / "properties").symlink_to(properties)
    # a step after the scorer, since the check of the backbone refuses a scorer that is not exact
    changed = tmp_path / "recbole_llm" / "llm" / "likelihood.py"
    changed.write_text(changed.read_text().replace("return self.scorer(self.lm", "return -self.scorer(self.lm"))
    script = "import json, sys; from recbole_llm.quick_start import run_recbole_llm as run; "
    script += "print(run('TALLRec', 'tiny', config_dict=json.load(sys.stdin))['record'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    told = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(settings), env=environment, cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    after = json.loads(Path(told.stdout.split()[-1]).read_text())
    assert after["stage_seconds"]["ingredient"] > 0
    assert after["users_per_second"] and not before["users_per_second"]
    assert after["code"] != before["code"] and after["stages"] != before["stages"]
    last = 1 + before["config"]["candidates"]["num_negatives"]
    assert {user: last + 1 - rank for user, rank in before["ranks"]["no adapter"].items()} == after["ranks"]["no adapter"]
