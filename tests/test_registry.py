"""Names are found here first, then in RecBole; nothing heavy or absent is imported on the way."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recbole_llm
from recbole_llm import registry
from recbole_llm.merging.stage import resolve


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has imported after ``code``."""
    script = f"import json, sys\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    paths = [str(Path(recbole_llm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", sorted(registry.MODELS))
def test_our_models(name: str) -> None:
    assert registry.get_model(name).__name__ == name
    assert registry.get_model(name).__module__ == registry.MODELS[name]


@pytest.mark.parametrize("name", ["Pop", "BPR", "NeuMF", "LightGCN", "SASRec", "BERT4Rec", "FM"])
def test_recboles_models(name: str) -> None:
    model = registry.get_model(name)
    assert model.__name__ == name and model.__module__.startswith("recbole.model.")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("sasrec", "SASRec"),
        ("bpr", "BPR"),
        ("loracocktail", "LoRACocktail"),
        ("SASREK", "SASRec"),
        ("TALRec", "TALLRec"),
    ],
)
def test_wrong_names_are_answered_with_near_ones(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"--model={wrong}: no such model\. Did you mean .*\b{right}\b"):
        registry.get_model(wrong)


def test_a_name_like_none_is_answered_with_ours() -> None:
    with pytest.raises(ValueError, match=", ".join(registry.MODELS)):
        registry.get_model("zzzzzzzz")


@pytest.mark.slow
def test_looking_names_up_imports_neither_ray_nor_lightgbm_nor_transformers() -> None:
    code = """
from recbole_llm import registry, quick_start
registry.get_model("SASRec")
for wrong in ("sasrec", "LightGBM", "nonsense"):
    try:
        registry.get_model(wrong)
    except ValueError:
        continue
    raise SystemExit(f"{wrong} was found")
"""
    assert not modules_after(code) & {"ray", "lightgbm", "xgboost", "recbole.quick_start", "transformers", "peft"}


def test_a_name_is_checked_without_importing_a_model() -> None:
    code = """
from recbole_llm import registry
registry.check_name("SASRec"), registry.check_name("Random"), registry.check_name("Laser")
try:
    registry.check_name("SASREK")
except ValueError as error:
    assert "--model=SASREK: no such model. Did you mean SASRec" in str(error)
else:
    raise SystemExit("SASREK was found")
"""
    assert not modules_after(code) & {"torch", "numpy", "recbole.model", "transformers"}


def test_every_model_of_recbole_has_a_name_that_passes() -> None:
    known = {name.lower() for name in registry._recbole_class_names()}
    packages = [f"recbole.model.{kind}_recommender" for kind in ("general", "context_aware", "sequential", "knowledge_aware")]
    modules = [pkgutil.iter_modules(importlib.import_module(package).__path__) for package in packages]
    assert known == {module.name for found in modules for module in found}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import torch\n\ntorch.no_such", "AttributeError: module 'torch' has no attribute 'no_such' .FILE, line 3.$"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package' .FILE, line 1.$"),
        ("from json import no_such", "ImportError: cannot import name 'no_such' from 'json' .* .FILE, line 1.$"),
        ("def broken(:", "SyntaxError: invalid syntax .broken_model.py, line 1.$"),
        ("import json\njson.loads('')", "JSONDecodeError: Expecting value: .* .FILE, line 2.$"),
    ],
)
def test_an_error_within_a_users_module_is_shown_with_its_line(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    expected = message.replace("FILE", re.escape(str(tmp_path / "broken_model.py")))
    for ask, given in (
        (lambda: registry.get_model("broken_model:Mine"), "--model=broken_model:Mine"),
        (lambda: resolve("broken_model:merge"), "merge: 'broken_model:merge'"),
    ):
        with pytest.raises(ValueError, match=f"^{given}: broken_model cannot be imported: {expected}"):
            ask()


def test_a_users_module_or_class_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole_model.py").write_text("Mine = 3")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nowhere:Mine", "nowhere.model:Mine", "whole_model.inside:Mine"):
        with pytest.raises(
            ValueError, match=rf"^--model={name}: No module named .* must be on the Python path or in the current"
        ):
            registry.get_model(name)
    for name in ("whole_model:Mine", "whole_model:Other"):
        with pytest.raises(ValueError, match=rf"^--model={name}: the module 'whole_model' has no class '{name[12:]}'$"):
            registry.get_model(name)
