"""Whatever changes, exactly what depends on it is computed again: stages and cached scores, by data, settings and code.

Each run is trained once; a change is then planned on top of it, and names of stages and of rows whose fingerprint differs are
compared with the table. Nothing is trained for that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import recbole_llm
from recbole_llm.data import candidate_sets
from recbole_llm.llm import backbones
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store import code
from recbole_llm.store.stages import in_order
from tests.conftest import assembled, tiny_settings

PACKAGE = Path(recbole_llm.__file__).parent
BUILTIN = {"llm_path": "builtin", "builtin_lm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 2000}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "TALLRec": ("TALLRec", {}),
    "LoRACocktail": ("LoRACocktail", {}),
    "builtin": ("LoRACocktail", BUILTIN),
    "ALLMRec": ("ALLMRec", {}),
    "Laser": ("Laser", {}),
    "AlphaRec": ("AlphaRec", {}),
}
STAGES = {
    "TALLRec": "ingredient",
    "LoRACocktail": "base-spirit ingredient cocktail",
    "builtin": "builtin-lm base-spirit ingredient cocktail",
    "ALLMRec": "cf-SASRec builtin-text-encoder alignment projection",
    "Laser": "cf-SASRec phase-1 phase-2",
    "AlphaRec": "builtin-text-encoder",
}
COCKTAIL = {"LoRACocktail", "uniform mix", "base spirit", "ingredient", "no adapter"}
ROWS = {  # those whose scores are cached
    "TALLRec": {"TALLRec", "no adapter"},
    "LoRACocktail": COCKTAIL,
    "builtin": COCKTAIL,
    "ALLMRec": {"ALLMRec", "text vectors", "LLM only"},
    "Laser": set(),
    "AlphaRec": set(),
}
ALL = "all"
"""All rows of a run; a run that a case leaves out recomputes nothing."""


class Trained:
    """A run that was trained once, and what a change of it would compute again."""

    def __init__(self, name: str, settings: dict[str, Any]):
        self.model, own = RUNS[name]
        self.settings = settings | own
        run = assembled(self.model, self.settings)
        run.trainer.fit(run.train, run.valid)
        run.trainer.evaluate(run.test)
        self.stages, self.rows = self._stages(run), self._rows(run)
        assert list(self.stages) == STAGES[name].split() and self.rows.keys() == ROWS[name]

    def changed(self, *, rows: bool = True, **changes: Any) -> tuple[set[str], set[str]]:
        """Stages and rows that are computed again with other settings, or with the data and code of this moment."""
        run = assembled(self.model, self.settings, **changes)
        stages, links = self._stages(run), []
        try:
            for name, folder in stages.items():  # a stand-in for what would be trained, so that rows can be made
                if rows and not folder.exists():
                    folder.symlink_to(self.stages[name])
                    links.append(folder)
            found = {}
            if rows:
                run.trainer.recommender.load(run.trainer.cache)
                found = self._rows(run)
        finally:
            for link in links:
                link.unlink()
        return _differing(self.stages, stages), _differing(self.rows, found) if rows else set()

    @staticmethod
    def _stages(run: Any) -> dict[str, Path]:
        return {stage.name: run.trainer.cache.folder(stage) for stage in in_order(run.trainer._stages)}

    @staticmethod
    def _rows(run: Any) -> dict[str, str]:
        found = {}
        for name, variant in run.trainer.recommender.variants().items():
            run.trainer._variant, run.trainer._candidates = variant, run.test.candidates
            if (scores := run.trainer._cached_scores()) is not None:
                found[name] = scores._folder.name
        return found


def _differing(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    assert before.keys() == now.keys()
    return {name for name in now if now[name] != before[name]}


def _check(found: tuple[set[str], set[str]], expected: dict[str, tuple[str, Any]], name: str) -> None:
    stages, rows = expected.get(name, ("", ()))
    assert found[0] == set(STAGES[name].split() if stages == ALL else stages.split())
    assert found[1] == (ROWS[name] if rows == ALL else set(rows))


@pytest.fixture(scope="module")
def data(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the data that tests may change."""
    return Path(shutil.copytree(data_path, tmp_path_factory.mktemp("changing") / "data"))


@pytest.fixture(scope="module")
def trained(data: Path, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Runs by name, each trained when it is first asked for."""
    settings, runs = tiny_settings(data, tiny_lm, tmp_path_factory.mktemp("runs")), dict[str, Trained]()

    def get(name: str) -> Trained:
        if name not in runs:
            runs[name] = Trained(name, settings)
        return runs[name]

    return get


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Changes a module of the package, in a copy that fingerprints of code read from then on."""
    copies: dict[str, Path] = {}
    tree, find = code._tree, code._file

    def changed(name: str) -> Any:
        if name not in copies:
            return tree(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(code, "_file", lambda other: copies.get(other) or find(other))
            return tree.__wrapped__(name)  # type: ignore[attr-defined]

    monkeypatch.setattr(code, "_tree", changed)

    def change(module: str, old: str | None = None, new: str = "EDITED = 1") -> Path:
        source = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        text = source.read_text()
        assert old is None or text.count(old) == 1, f"{module} has no line {old!r} any more; choose another one"
        file = tmp_path / f"{module}.py"
        file.write_text(f"{text}\n\n{new}\n" if old is None else text.replace(old, new))
        copies[f"recbole_llm.{module}"] = file
        return file

    return change


every_run = pytest.mark.parametrize("name", RUNS)

# -- code --------------------------------------------------------------------------------------------------------------

ADAPTED = {"LoRACocktail", "uniform mix", "base spirit", "ingredient"}
VALIDATED = {"LoRACocktail", "uniform mix", "ingredient"}  # by an early stop on validation users, or made of what was
PROJECTED = {"ALLMRec", "text vectors"}
CODE: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, Any]]]] = {
    # module, and the line in it -> run: stages, rows
    "another sign in the scorer": (
        ("llm.scoring", 'if self.normalize == "mean" else total', 'if self.normalize == "mean" else -total'),
        {
            "TALLRec": ("ingredient", ALL),
            "LoRACocktail": ("ingredient cocktail", ALL),
            "builtin": ("ingredient cocktail", ALL),
            "ALLMRec": ("projection", ALL),
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
        },
    ),
    "a flipped gradient": (
        ("training.loop", "    loss.backward()", "    (-loss).backward()"),
        {
            "TALLRec": ("ingredient", {"TALLRec"}),
            "LoRACocktail": (ALL, ADAPTED),
            "builtin": (ALL, ALL),
            "ALLMRec": ("alignment projection", PROJECTED),
            "Laser": ("phase-1 phase-2", ()),
        },
    ),
    "the builtin LM": (("llm.builtin_lm",), {"builtin": (ALL, ALL)}),
    "sequence training": (
        ("classical.sequence",),
        {"ALLMRec": ("cf-SASRec alignment projection", PROJECTED), "Laser": (ALL, ())},
    ),
    "the classical trainer": (
        ("classical.trainer",),
        {"ALLMRec": ("cf-SASRec alignment projection", PROJECTED), "Laser": (ALL, ())},
    ),
    "coefficients of merges": (
        ("merging.coefficients",),
        {"LoRACocktail": ("cocktail", {"LoRACocktail"}), "builtin": ("cocktail", {"LoRACocktail"})},
    ),
    "ranks": (
        ("evaluation.ranks",),
        {
            "TALLRec": ("ingredient", {"TALLRec"}),
            "LoRACocktail": ("ingredient cocktail", VALIDATED),
            "builtin": ("ingredient cocktail", VALIDATED),
            "ALLMRec": ("cf-SASRec alignment projection", PROJECTED),
            "Laser": (ALL, ()),
        },
    ),
    "candidates, drawn as before": (("data.candidates",), {}),
    "the builtin text encoder": (
        ("llm.builtin_text_encoder",),
        {"ALLMRec": ("builtin-text-encoder alignment projection", PROJECTED), "AlphaRec": (ALL, ())},
    ),
    "pictures": (("evaluation.plots",), {}),
    "a comment": (("llm.scoring", "total = logp", "# a comment\n        total = logp"), {}),
    "a docstring": (("llm.scoring", "Four strategies compute the same number.", "Four strategies."), {}),
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
    monkeypatch.setattr(candidate_sets, "draw_of", edited.draw_of)
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


# -- data and settings -------------------------------------------------------------------------------------------------

CANDIDATES: dict[str, tuple[str, Any]] = {
    "TALLRec": ("ingredient", ALL),
    "LoRACocktail": ("ingredient cocktail", ALL),
    "builtin": ("ingredient cocktail", ALL),
    "ALLMRec": ("projection", ALL),
}
BACKBONE: dict[str, tuple[str, Any]] = {
    "TALLRec": (ALL, ALL),
    "LoRACocktail": (ALL, ALL),
    "builtin": ("base-spirit ingredient cocktail", ALL),
    "ALLMRec": ("projection", ALL),
    "Laser": ("phase-1 phase-2", ()),
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
    """Changes lines of a file of ``tiny``, which is as before after the test."""
    before = {file: file.read_text() for file in (data / "tiny").iterdir()}

    def change(suffix: str, edit: Callable[[list[str]], None]) -> None:
        file = data / "tiny" / f"tiny.{suffix}"
        lines = file.read_text().splitlines()
        edit(lines)
        file.write_text("\n".join(lines) + "\n")

    yield change
    for file, text in before.items():
        file.write_text(text)


@every_run
def test_a_changed_title_recomputes_what_reads_titles(
    name: str, trained: Callable[[str], Trained], rewrite: Callable[..., None]
) -> None:
    def title(lines: list[str]) -> None:
        lines[6] = lines[6].replace("The ", "A ")

    run = trained(name)
    rewrite("item", title)
    expected = {
        "TALLRec": (ALL, ALL),
        "LoRACocktail": (ALL, ALL),
        "builtin": (ALL, ALL),
        "ALLMRec": ("builtin-text-encoder alignment projection", ALL),
        "Laser": ("phase-1 phase-2", ()),
        "AlphaRec": (ALL, ()),
    }
    _check(run.changed(), expected, name)


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
