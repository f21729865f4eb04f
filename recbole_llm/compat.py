"""The only file that knows the version quirks of RecBole 1.2 and its dependencies.

Each item says what breaks, since when, and when it can go. :func:`apply` runs on ``import recbole_llm``; it adds names that
are missing and replaces none, and may run any number of times. What has to be a subclass of a RecBole class (the dataset, the
trainer, the collector) lives with that class and is listed here by name only:

==========================================  ============================================================================
quirk of RecBole 1.2.1                      where it is answered
==========================================  ============================================================================
``Config`` evaluates strings, reads argv    :class:`recbole_llm.config.LLMConfig`
``torch.load`` without ``weights_only``     :class:`recbole_llm.classical.trainer.ProtocolTrainer`
datasets are unpickled from ``saved/``      :func:`recbole_llm.data.loading.create_dataset`
loaders are unpickled from ``saved/``       :func:`recbole_llm.data.loading.data_preparation`
download ends in a barrier error, asks      :meth:`recbole_llm.data.dataset.RankedTime._download`
timestamps lose their order in float32      :meth:`recbole_llm.data.dataset.RankedTime.build`
beyond-accuracy metrics crash               :class:`recbole_llm.evaluation.ranks.SafeCollector`
the second logger of a process is mute      :func:`recbole_llm.compat.init_logger`
==========================================  ============================================================================
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import sys
from typing import Any

import numpy as np

# setup.cfg does not require RecBole, because that would bring in a ray that has no wheel for Python 3.12 and later
_INSTALL_RECBOLE = 'pip install --no-deps "recbole==1.2.1"'

# numpy 2.0 dropped these names; recbole/config/configurator.py:630-635 reads them at every Config().
# Goes away when RecBole stops (PR RUCAIBox/RecBole#2187).
_NUMPY_NAMES = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}


def check_recbole() -> None:
    """Require RecBole 1.2.1 or a later 1.2, which is installed by a command of its own.

    Raises:
        ModuleNotFoundError: RecBole is not installed.
        ImportError: another version of RecBole is installed.
    """
    if importlib.util.find_spec("recbole") is None:
        raise ModuleNotFoundError(f"RecBole-LLM needs RecBole, which is not installed; run: {_INSTALL_RECBOLE}", name="recbole")
    # --help must not import RecBole, so the metadata is read; a source folder of RecBole has none and is accepted
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("recbole")
        if not version.startswith("1.2.") or version == "1.2.0":
            raise ImportError(f"RecBole-LLM needs RecBole 1.2.1, but {version} is installed; run: {_INSTALL_RECBOLE}")


def apply() -> None:
    """Add what RecBole misses on numpy >= 2 and scipy >= 1.13, and refuse what cannot be mended."""
    for name, value in _NUMPY_NAMES.items():
        if not hasattr(np, name):
            setattr(np, name, value)
    _mend_dok_matrix()


def _mend_dok_matrix() -> None:
    # scipy 1.13 dropped dok_matrix._update; LightGCN, NGCF, NCL, SpectralCF, GCMC, KGIN and MCCLK call it.
    # Goes away when RecBole builds its graphs from coo_matrix.
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, entries: self._dict.update(entries)


def check_pandas() -> None:
    """Refuse pandas 3: under copy-on-write RecBole silently corrupts features and loses every ``token_seq`` field.

    Goes away when recbole/data/dataset/dataset.py stops ``feat[field].fillna(inplace=True)`` and ``Series.agg(len)``.

    Raises:
        ImportError: pandas is 3 or newer.
    """
    import pandas

    if int(pandas.__version__.split(".")[0]) >= 3:
        raise ImportError(
            f"RecBole 1.2 reads atomic files wrongly with pandas {pandas.__version__}; run: pip install 'pandas>=2.2,<3'"
        )


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had so far, in bytes, on Linux, macOS and Windows."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux kilobytes


def stop_anomaly_detection() -> None:
    """Turn off what importing RecBole's SINE turns on for the whole process (recbole/model/sequential_recommender/sine.py:25).

    Autograd's anomaly detection checks every tensor for NaN and takes a third of a training step or more. Goes away when
    that line does.
    """
    import torch

    torch.autograd.set_detect_anomaly(False)


def init_logger(config: Any) -> None:
    """RecBole's logger, with a log file for every run of a process (recbole/utils/logger.py:130 lacks ``force``)."""
    from recbole.utils import init_logger as recbole_init_logger

    root = logging.getLogger()
    for handler in list(root.handlers):
        # pytest's own handlers collect what tests look at, and stay
        if type(handler).__module__.startswith("logging"):
            root.removeHandler(handler)
            handler.close()
    kept, root.handlers = root.handlers, []
    recbole_init_logger(config)
    root.handlers += kept
    # libraries that log every HTTP request or every loaded weight would drown the run's own lines
    for name in ("httpx", "filelock", "sentence_transformers", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
