"""Workarounds for RecBole 1.2 and its dependencies.

Each one says what breaks, since which version, and when it can be removed. :func:`apply` runs with every
:class:`~recbole_llm.config.LLMConfig`; it adds missing names, replaces none, and may run repeatedly. Workarounds in subclasses of
RecBole's classes are listed here:

==========================================  ============================================================================
problem of RecBole 1.2.1                    workaround
==========================================  ============================================================================
``Config`` evaluates strings, reads argv    :class:`recbole_llm.config.LLMConfig`
``torch.load`` without ``weights_only``     :class:`recbole_llm.classical.trainer.ProtocolTrainer`
datasets are unpickled from ``saved/``      :func:`recbole_llm.data.loading.create_dataset`
loaders are unpickled from ``saved/``       :func:`recbole_llm.data.loading.data_preparation`
download fails in a barrier or prompts       :meth:`recbole_llm.data.dataset.RankedTime._download`
timestamps lose their order in float32      :meth:`recbole_llm.data.dataset.RankedTime.build`
files are read otherwise than written       :class:`recbole_llm.data.tables.StrictTables`
a table of lists, of gigabytes              :class:`recbole_llm.data.sequences.UnbuiltLists`
a Python set for each user and phase        :class:`recbole_llm.data.samplers.ArraySampler`
two tensors for each user of an evaluation  :class:`recbole_llm.data.eval_loader.ArrayEvalLoader`
beyond-accuracy metrics crash               :class:`recbole_llm.evaluation.beyond_accuracy.SafeCollector`
the second run of a process logs nothing     :func:`recbole_llm.logs.init_logging`
RaCT logs a path without a place for it      :func:`recbole_llm.logs.init_logging`
pre-training pickles its ``Config``          :class:`recbole_llm.classical.checkpoints.SafeCheckpoints`
models read checkpoints with ``torch.load``  :func:`recbole_llm.classical.building.build`
preloaded vectors are float64 (KSR)          :meth:`recbole_llm.data.columns.NamedColumns._preload_weight_matrix`
knowledge loaders have no ``dataset``        :class:`recbole_llm.evaluation.beyond_accuracy.SafeCollector`
Pop counts batches, and sampled negatives   :func:`recbole_llm.classical.popularity.with_right_counts`
trainers write ``log_tensorboard/``          :func:`recbole_llm.classical.curves.recorded`
==========================================  ============================================================================
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# setup.cfg does not require RecBole, whose dependency ray has no wheel for Python 3.12 and later
INSTALL_RECBOLE = 'pip install --no-deps "recbole==1.2.1"'

# numpy 2.0 removed these names; recbole/config/configurator.py:630-635 reads them in every Config().
# Remove when RecBole no longer does (PR RUCAIBox/RecBole#2187).
_NUMPY_NAMES = {"float_": "float64", "complex_": "complex128", "unicode_": "str_"}

# options of RecBole that are not supported, with RecBole's defaults
_PROCESSES = {"nproc": 1, "world_size": -1, "ip": "localhost", "port": "5678", "group_offset": 0, "offset": 0, "local_rank": None}
_PICKLES = {"save_dataset": False, "dataset_save_path": None, "save_dataloaders": False, "dataloaders_save_path": None}


def check_recbole() -> None:
    """Require RecBole 1.2.1 or a later 1.2.

    Raises:
        ModuleNotFoundError: RecBole is not installed.
        ImportError: another version of RecBole is installed.
    """
    if importlib.util.find_spec("recbole") is None:
        raise ModuleNotFoundError(f"RecBole-LLM needs RecBole, which is not installed; run: {INSTALL_RECBOLE}", name="recbole")
    # read the metadata, as --help must not import RecBole; a source folder of RecBole has none and is accepted
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("recbole")
        if not version.startswith("1.2.") or version == "1.2.0":
            raise ImportError(f"RecBole-LLM needs RecBole 1.2.1, but {version} is installed; run: {INSTALL_RECBOLE}")


def apply() -> None:
    """Add the names that RecBole needs and numpy >= 2 and scipy >= 1.13 no longer have."""
    import numpy as np
    from scipy.sparse import dok_matrix

    for name, successor in _NUMPY_NAMES.items():
        if not hasattr(np, name):
            setattr(np, name, getattr(np, successor))
    # scipy 1.13 removed dok_matrix._update; LightGCN, NGCF, NCL, SpectralCF, GCMC, KGIN and MCCLK call it.
    # Remove when RecBole builds its graphs from coo_matrix.
    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, entries: self._dict.update(entries)


def check_pandas() -> None:
    """Refuse pandas 3: with copy-on-write, RecBole silently corrupts features and loses every ``token_seq`` field.

    Remove when recbole/data/dataset/dataset.py no longer calls ``feat[field].fillna(inplace=True)`` and ``Series.agg(len)``.

    Raises:
        ImportError: pandas is 3 or newer.
    """
    import pandas

    if int(pandas.__version__.split(".")[0]) >= 3:
        raise ImportError(
            f"RecBole 1.2 misreads atomic files with pandas {pandas.__version__}; run: pip install 'pandas>=2.2,<3'"
        )


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The rank of this process and the number of processes that ``accelerate launch`` or ``torchrun`` started."""
    if all(environment.get(key) for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return 0, 1


def all_gather(whole: Any, part: Any) -> None:
    """Fill a tensor [P N] with the parts [N] of all P processes, in their order."""
    import torch.distributed as dist

    newer = getattr(dist, "all_gather_single", None)  # since torch 2.13, which deprecates the other name
    (newer or dist.all_gather_into_tensor)(whole, part)


def peak_memory_bytes() -> int:
    """The peak resident memory of this process in bytes, on Linux, macOS and Windows."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux kilobytes


def available_memory_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that this process can still take: what the machine has free, and no more than its container leaves.

    Args:
        groups, own: where Linux tells the limits of control groups (versions 1 and 2), and those that the process is in.
    """
    import psutil

    found = int(psutil.virtual_memory().available)
    for folder, (limit, usage, cache) in _memory_groups(groups, own):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no limit is the word max, and the root has no files
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / usage).read_text()) - int(stat[cache])  # cached files give way
            found = min(found, max(0, int((folder / limit).read_text()) - taken))
    return found


def _memory_groups(groups: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The process's control groups of memory with their parents, and the names of limit, usage and cached files there."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = root / path.lstrip("/")
        yield from ((folder, names) for folder in (place, *place.parents) if folder == root or root in folder.parents)


def stop_anomaly_detection() -> None:
    """Disable autograd's anomaly detection, which takes a third of a training step or more.

    Importing RecBole's SINE enables it for the process (recbole/model/sequential_recommender/sine.py:25). Remove with that line.
    """
    import torch

    torch.autograd.set_detect_anomaly(False)


def refuse_options(given: Mapping[str, Any], source: str) -> None:
    """Refuse options of RecBole that would be ignored, except with their default values.

    Raises:
        ValueError: names the option, ``source`` and the remedy.
    """
    for key, value in given.items():
        if key in _PROCESSES and str(value) != str(_PROCESSES[key]):
            remedy = "start several processes with accelerate launch; for parallel runs use recbole-llm leaderboard --jobs=N"
        elif key in _PICKLES and str(value) != str(_PICKLES[key]):
            remedy = "datasets and loaders are built in each run and never unpickled"
        elif key in ("config_files", "config_file") and value:
            remedy = "files are named by --config_files on the command line, or by config_file_list in Python"
        else:
            continue
        raise ValueError(f"{key}: {value} in {source}: this option of RecBole is not supported; remove it ({remedy})")
