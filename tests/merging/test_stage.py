"""The hook: names and dotted paths, and the folder a merge leaves behind."""

import hashlib
import json
import sys
import types

import pytest
import torch

from recbole_llm.llm.adapter_folders import Adapter, read_adapter
from recbole_llm.merging import stage
from recbole_llm.merging.arithmetic import write_adapter
from recbole_llm.merging.coefficients import MergeProblem, MergeResult, entropy, uniform
from recbole_llm.merging.stage import merge_adapters, resolve

MODULES = ["model.q_proj", "model.v_proj"]


@pytest.fixture
def folders(tmp_path):
    found = {}
    for seed, name in enumerate(("base", "own")):
        torch.manual_seed(seed)
        tensors = {}
        for module in MODULES:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 6)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(5, 2)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
        found[name] = tmp_path / name
        write_adapter(Adapter(config, tensors, name), found[name], {})
    return found


@pytest.fixture
def users(monkeypatch):
    """A user's own module on the Python path."""
    module = types.ModuleType("users_own")
    module.mostly_base = lambda problem: MergeResult(problem.expand(torch.tensor([0.9, 0.1])), [])
    module.too_much = lambda problem: MergeResult(torch.tensor([2.0, 0.0]), [])
    module.number = 3
    monkeypatch.setitem(sys.modules, "users_own", module)
    return module


def problem(granularity="global", **settings):
    return MergeProblem(["base", "own"], MODULES, granularity, objective=lambda w: w.square().sum(), settings=settings)


def test_resolve_names_and_paths(users):
    assert resolve("uniform") is uniform and resolve("entropy") is entropy
    assert resolve("users_own:mostly_base") is resolve("users_own.mostly_base") is users.mostly_base


@pytest.mark.parametrize(
    "name, message",
    [
        ("entropie", "did you mean 'entropy'"),
        ("no_such_package.module:function", "'no_such_package.module:function'.*must be on the Python path"),
        ("users_own:absent", "'users_own' has no function 'absent'"),
        ("users_own:number", "'users_own' has no function 'number'"),
        (":function", "unknown"),
    ],
)
def test_resolve_explains(users, name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


@pytest.mark.parametrize("granularity", ["global", "module"])
def test_merge_writes_one_recorded_folder(folders, tmp_path, granularity):
    out = tmp_path / "out" / "merged"
    result = merge_adapters(folders, "uniform", problem(granularity), out, split="test")
    merged, sources = read_adapter(out), [read_adapter(folder) for folder in folders.values()]
    for module in MODULES:
        a, b = merged.factors(module)
        torch.testing.assert_close(b @ a, sum(0.5 * y @ x for x, y in (s.factors(module) for s in sources)))
    record = json.loads((out / "merge.json").read_text())
    expected = {"base": 0.5, "own": 0.5}
    assert record["weights"] == (expected if granularity == "global" else dict.fromkeys(MODULES, expected))
    assert (record["method"], record["granularity"], record["split"]) == ("uniform", granularity, "test")
    assert record["trace"] == result.trace and len(record["trace"]) == 3
    for source in record["sources"]:
        data = (folders[source["name"]] / "adapter_model.safetensors").read_bytes()
        assert source["sha256"] == hashlib.sha256(data).hexdigest()
    assert {"README.md", "MANIFEST.json"} <= {file.name for file in out.iterdir()}


def test_per_module_weights_reach_their_modules(folders, tmp_path, monkeypatch):
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    monkeypatch.setitem(stage._METHODS, "split", lambda problem: MergeResult(weights, []))
    merge_adapters(folders, "split", problem("module"), tmp_path / "merged")
    merged = read_adapter(tmp_path / "merged")
    for module, name in zip(MODULES, folders, strict=True):
        for got, expected in zip(merged.factors(module), read_adapter(folders[name]).factors(module), strict=True):
            torch.testing.assert_close(got, expected)


def test_users_method_is_checked_and_leaves_nothing_when_refused(folders, tmp_path, users):
    assert merge_adapters(folders, "users_own:mostly_base", problem(), tmp_path / "merged").weights[0] == 0.9
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        merge_adapters(folders, "users_own:too_much", problem(), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    merge_adapters(folders, "users_own:too_much", problem(extrapolate=True), tmp_path / "allowed")


def test_compressed_merge_records_its_energy(folders, tmp_path):
    merge_adapters(folders, "uniform", problem(), tmp_path / "merged", compress_rank=2)
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["compress_rank"] == 2 and 0.3 < record["retained_energy"] < 1
    assert read_adapter(tmp_path / "merged").config["r"] == 2


def test_folders_must_be_those_of_the_problem(folders, tmp_path):
    with pytest.raises(ValueError, match=r"\['own', 'base'\], but the merge problem \['base', 'own'\]"):
        merge_adapters(dict(reversed(folders.items())), "uniform", problem(), tmp_path / "merged")
