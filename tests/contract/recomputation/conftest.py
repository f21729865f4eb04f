"""Whatever changes, exactly what depends on it is computed again: stages and cached scores, by data, settings and code.

Each run is trained once; a change is then planned on top of it, and names of stages and of rows whose fingerprint differs are
compared with a table. Nothing is trained for that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import recbole_llm
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
    "Cascade": ("Cascade", {"llm_ranker": "TALLRec"}),
    "WeaveRec": ("WeaveRec", {"source_datasets": ["other"]}),
}
STAGES = {
    "TALLRec": "ingredient",
    "LoRACocktail": "base-spirit ingredient cocktail",
    "builtin": "builtin-lm base-spirit ingredient cocktail",
    "ALLMRec": "cf-SASRec builtin-text-encoder alignment projection",
    "Laser": "cf-SASRec phase-1 phase-2",
    "AlphaRec": "builtin-text-encoder",
    "Cascade": "ingredient cf-SASRec routing",
    "WeaveRec": "lora-tiny lora-other+tiny weave lora-other",
}
WOVEN = {"WeaveRec", "data merging", "hybrid other", "naive merging", "other only", "target only"}
COCKTAIL = {"LoRACocktail", "uniform mix", "base spirit", "ingredient", "no adapter"}
ROWS = {  # those whose scores are cached
    "TALLRec": {"TALLRec", "no adapter"},
    "LoRACocktail": COCKTAIL,
    "builtin": COCKTAIL,
    "ALLMRec": {"ALLMRec", "text vectors", "LLM only"},
    "Laser": set(),
    "AlphaRec": set(),
    "Cascade": {"Cascade", "TALLRec", "random routing"},
    "WeaveRec": {*WOVEN, "no adapter"},
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
            if (scores := run.trainer._cached_scores(variant, run.test)) is not None:
                found[name] = scores._folder.name
        return found


def _differing(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    assert before.keys() == now.keys()
    return {name for name in now if now[name] != before[name]}


def _check(found: tuple[set[str], set[str]], expected: dict[str, tuple[str, Any]], name: str) -> None:
    stages, rows = expected.get(name, ("", ()))
    assert found[0] == set(STAGES[name].split() if stages == ALL else stages.split())
    assert found[1] == (ROWS[name] if rows == ALL else set(rows))


@pytest.fixture(scope="session")
def data(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the data that tests may change."""
    return Path(shutil.copytree(data_path, tmp_path_factory.mktemp("changing") / "data"))


@pytest.fixture(scope="session")
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
        source = find(f"recbole_llm.{module}")
        assert source, f"there is no module {module}"
        text = source.read_text()
        assert old is None or text.count(old) == 1, f"{module} has no line {old!r} any more; choose another one"
        file = tmp_path / f"{module}.py"
        file.write_text(f"{text}\n\n{new}\n" if old is None else text.replace(old, new))
        copies[f"recbole_llm.{module}"] = file
        return file

    return change


every_run = pytest.mark.parametrize("name", RUNS)


ADAPTED = {"LoRACocktail", "uniform mix", "base spirit", "ingredient"}
VALIDATED = {"LoRACocktail", "uniform mix", "ingredient"}  # by an early stop on validation users, or made of what was
PROJECTED = {"ALLMRec", "text vectors"}
ROUTED = {"Cascade", "random routing"}


CANDIDATES: dict[str, tuple[str, Any]] = {
    "TALLRec": ("ingredient", ALL),
    "LoRACocktail": ("ingredient cocktail", ALL),
    "builtin": ("ingredient cocktail", ALL),
    "ALLMRec": ("projection", ALL),
    "Cascade": ("ingredient routing", ALL),
    "WeaveRec": ("weave", ALL),
}
