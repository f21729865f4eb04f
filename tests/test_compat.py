"""Every shim adds what is missing, replaces nothing, and is told when RecBole no longer needs it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import psutil
import pytest
import recbole
from scipy.sparse import dok_matrix

from recbole_llm import compat
from recbole_llm.config import LLMConfig
from recbole_llm.quick_start import run_recbole_llm

ROOT = Path(__file__).resolve().parent.parent


def test_without_recbole_loading_a_run_names_the_command_in_one_line() -> None:
    hidden = "import sys; sys.modules['recbole'] = None; import recbole_llm; recbole_llm.load('saved/runs/none')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", hidden], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: RecBole-LLM needs RecBole, which is not installed; run: pip install --no-deps "recbole==1.2.1"'
    )


@pytest.mark.parametrize("version", ["1.1.1", "1.2.0", "1.3.0", "3.0"])
def test_another_version_of_recbole_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_recbole()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    for reads in (compat.check_recbole, lambda: LLMConfig("Pop", "ml-100k")):
        with pytest.raises(ImportError, match=rf'{version} is installed; run: pip install --no-deps "recbole==1\.2\.1"'):
            reads()


def test_peak_memory_is_in_bytes() -> None:
    resident = psutil.Process().memory_info().rss
    assert 0.9 * resident <= compat.peak_memory_bytes() <= 100 * resident  # a wrong unit is off by 1024


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no module resource")
@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_knows_the_unit_of_the_platform(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7000))
    assert compat.peak_memory_bytes() == 7000 * unit


def test_peak_memory_on_windows_comes_from_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails, as on Windows
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=5, peak_wset=7000))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert compat.peak_memory_bytes() == 7000


@pytest.mark.parametrize(("limit", "left"), [("3000", 1400), ("1000", 0), ("max", 10**6), ("9223372036854771712", 10**6)])
@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_that_of_the_container(
    version: int, limit: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own limit or that of a group above it; files that the system has cached give way."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    files = {"memory.max": limit, "memory.current": "2000", "memory.stat": "anon 1600\ninactive_file 400\n"}
    if version == 1:
        files = {
            "memory.limit_in_bytes": limit,
            "memory.usage_in_bytes": "2000",
            "memory.stat": "rss 1\ntotal_inactive_file 400\n",
        }
    own, root = tmp_path / "own", tmp_path / "groups" / ("memory" if version == 1 else "")
    line = "4:cpu,memory:/docker/abc\n2:pids:/docker/abc\n" if version == 1 else "0::/docker/abc\n"
    for inside, expected in (("docker/abc", left), ("docker", left), ("", left), ("other", 10**6)):
        folder = root / inside
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        own.write_text(line)
        assert compat.available_memory_bytes(tmp_path / "groups", own) == expected
        for name in files:
            (folder / name).unlink()
    assert compat.available_memory_bytes(tmp_path / "groups", tmp_path / "none") == 10**6  # not Linux


def test_missing_numpy_names_are_added_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    monkeypatch.setattr(np, "float_", own, raising=False)
    for name in ("complex_", "unicode_"):
        monkeypatch.setattr(np, name, None, raising=False)  # restored afterwards, whatever apply() does
        monkeypatch.delattr(np, name)
    compat.apply()
    assert (np.float_, np.complex_, np.unicode_) == (own, np.complex128, np.str_)  # type: ignore[attr-defined]


def test_dok_matrix_is_mended_and_a_method_of_scipy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dok_matrix, "_update", None, raising=False)
    monkeypatch.delattr(dok_matrix, "_update")
    compat.apply()
    graph = dok_matrix((2, 3), dtype=np.float32)
    graph._update({(0, 1): 5.0, (1, 2): 7.0})
    assert graph.tocoo().toarray().tolist() == [[0, 5, 0], [0, 0, 7]]

    own = object()
    monkeypatch.setattr(dok_matrix, "_update", own)
    compat.apply()
    assert dok_matrix._update is own


def test_applying_twice_changes_nothing() -> None:
    compat.apply()
    before = [*(getattr(np, name) for name in compat._NUMPY_NAMES), dok_matrix._update]
    compat.apply()
    after = [*(getattr(np, name) for name in compat._NUMPY_NAMES), dok_matrix._update]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_pandas_3_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_pandas()
    monkeypatch.setattr(pandas, "__version__", "3.1.1")
    with pytest.raises(ImportError, match=r"3\.1\.1.*pip install 'pandas>=2\.2,<3'"):
        compat.check_pandas()


@pytest.mark.parametrize(
    ("file", "text", "shim"),
    [
        ("config/configurator.py", "np.float_", "compat._NUMPY_NAMES"),
        ("model/general_recommender/lightgcn.py", "A._update(", "compat.apply"),
        ("data/dataset/dataset.py", "inplace=True", "compat.check_pandas (fillna)"),
        ("data/dataset/dataset.py", ".agg(len)", "compat.check_pandas (Series.agg)"),
        ("config/configurator.py", "eval(param)", "LLMConfig._convert_config_dict"),
        ("config/configurator.py", "sys.argv[1:]", "LLMConfig._load_cmd_line"),
        ("quick_start/quick_start.py", "from ray import tune", "recbole in setup.cfg's install_requires instead of README.md"),
        ("trainer/trainer.py", "torch.load(checkpoint_file, map_location=self.device)", "ProtocolTrainer.evaluate"),
        ("data/utils.py", "dataset = pickle.load(f)", "dataset.create_dataset"),
        ("data/utils.py", "in pickle.load(f):", "dataset.data_preparation"),
        ("data/dataset/dataset.py", "torch.distributed.barrier()", "RankedTime._download (barrier)"),
        ("utils/url.py", "input(", "RankedTime._download (question)"),
        ("data/dataset/dataset.py", "torch.FloatTensor(value)", "RankedTime._rank_time"),
        ("evaluator/collector.py", "self.data_struct._data_dict[key].cpu()", "beyond_accuracy.SafeCollector"),
        ("trainer/trainer.py", "torch.save(state, saved_model_file)\n", "SafeCheckpoints.save_pretrained_model"),
        ("model/general_recommender/ract.py", 'model from", self.pre_model_path', "logs._with_place"),
        ("model/sequential_recommender/s3rec.py", "torch.load(self.pre_model_path)", "building.build"),
        ("data/dataset/dataset.py", "matrix = np.zeros((token_num, max_len))", "NamedColumns._preload_weight_matrix"),
        ("utils/logger.py", "logging.basicConfig(level=level, handlers=[sh, fh])", "logs.init_logging"),
    ],
)
def test_recbole_still_needs(file: str, text: str, shim: str) -> None:
    source = (Path(recbole.__file__).parent / file).read_text(encoding="utf-8")
    assert text in source, f"recbole/{file} has no {text!r} any more: see whether {shim} can go"


@pytest.mark.parametrize(("key", "value"), [("nproc", 2), ("world_size", "4"), ("ip", "10.0.0.1"), ("save_dataset", True)])
def test_options_that_are_not_carried_out_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{key}: {value} in a\.yaml: this option of RecBole is not supported; remove it \("):
        compat.refuse_options({"epochs": 3, key: value}, "a.yaml")
    compat.refuse_options({"epochs": 3, "nproc": 1, "world_size": -1, "port": 5678, "save_dataset": False}, "a.yaml")


def test_a_run_refuses_them_wherever_they_are_given(settings: dict[str, Any]) -> None:
    Path("mine.yaml").write_text("nproc: 2\n")
    with pytest.raises(ValueError, match=r"nproc: 2 in mine\.yaml: this option"):
        run_recbole_llm("Pop", "tiny", ["mine.yaml"], settings)
