"""Every shim adds what is missing, replaces nothing, and is told when RecBole no longer needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import recbole
from scipy.sparse import dok_matrix

from recbole_llm import compat
from recbole_llm.quick_start import run_recbole_llm


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
        ("model/general_recommender/lightgcn.py", "A._update(", "compat._mend_dok_matrix"),
        ("data/dataset/dataset.py", "inplace=True", "compat.check_pandas (fillna)"),
        ("data/dataset/dataset.py", ".agg(len)", "compat.check_pandas (Series.agg)"),
        ("config/configurator.py", "eval(param)", "LLMConfig._convert_config_dict"),
        ("config/configurator.py", "sys.argv[1:]", "LLMConfig._load_cmd_line"),
        ("trainer/trainer.py", "torch.load(checkpoint_file, map_location=self.device)", "ProtocolTrainer.evaluate"),
        ("data/utils.py", "dataset = pickle.load(f)", "dataset.create_dataset"),
        ("data/utils.py", "in pickle.load(f):", "dataset.data_preparation"),
        ("data/dataset/dataset.py", "torch.distributed.barrier()", "RankedTime._download (barrier)"),
        ("utils/url.py", "input(", "RankedTime._download (question)"),
        ("data/dataset/dataset.py", "torch.FloatTensor(value)", "RankedTime._rank_time"),
        ("evaluator/collector.py", "self.data_struct._data_dict[key].cpu()", "evaluator.SafeCollector"),
        ("utils/logger.py", "logging.basicConfig(level=level, handlers=[sh, fh])", "logs.init_logging"),
    ],
)
def test_recbole_still_needs(file: str, text: str, shim: str) -> None:
    source = (Path(recbole.__file__).parent / file).read_text(encoding="utf-8")
    assert text in source, f"recbole/{file} has no {text!r} any more: see whether {shim} can go"


@pytest.mark.parametrize(("key", "value"), [("nproc", 2), ("world_size", "4"), ("ip", "10.0.0.1"), ("save_dataset", True)])
def test_options_that_are_not_carried_out_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{key}={value}: this option of RecBole is not carried out; leave it out \("):
        compat.refuse_options({"epochs": 3, key: value})
    compat.refuse_options({"epochs": 3, "nproc": 1, "world_size": -1, "port": 5678, "save_dataset": False})


def test_a_run_refuses_them_wherever_they_are_given(settings: dict[str, Any]) -> None:
    Path("mine.yaml").write_text("nproc: 2\n")
    with pytest.raises(ValueError, match="nproc=2: this option"):
        run_recbole_llm("Pop", "tiny", ["mine.yaml"], settings)
