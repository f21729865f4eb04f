"""Names are found here first, then in RecBole; nothing heavy or absent is imported on the way."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import recbole_llm
from recbole_llm import registry


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
