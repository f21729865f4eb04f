"""The log of a run, on the terminal and in a file, and the format of its lines.

The terminal shows the messages of this package and of RecBole, and those of other libraries from ``WARNING`` on. Python warnings
that are raised inside libraries go to the log file only, because a user of this package cannot act on them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import sysconfig
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

_CODE = (*{str(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}, str(Path(__file__).parent))
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RESULT = re.compile(r": ?\n(\S+ : \S+(?: {4}\S+ : \S+)*)$")  # RecBole's dict2str under a heading
_COLOUR_OF = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}


class _Formatter(logging.Formatter):
    """RecBole's format; colours are removed unless ``colour`` is set."""

    def __init__(self, *, colour: bool = False):
        super().__init__("%(asctime)s    %(levelname)s  %(message)s", "%d %b %H:%M")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "py.warnings":  # drop the source line
            record = logging.makeLogRecord({**vars(record), "msg": record.getMessage().strip().split("\n")[0], "args": None})
        line = super().format(record)
        if not self.colour:
            line = _COLOUR.sub("", line)
        elif record.levelno in _COLOUR_OF:
            line = f"{_COLOUR_OF[record.levelno]}{line}\033[0m"
        return _RESULT.sub(lambda found: f": {metrics_line(_numbers(found[1]))}", line)


class _Terminal(logging.StreamHandler):
    """Standard error; a line does not break a progress bar."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter(colour=sys.stderr.isatty() and "NO_COLOR" not in os.environ))

    def filter(self, record: logging.LogRecord) -> bool:  # type: ignore[override]
        if not _is_ours(record) or (record.name == "py.warnings" and record.getMessage().startswith(_CODE)):
            return False
        return bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Once(logging.Filter):
    """Pass a warning when it is first given: several parts of a run may read the same titles, or the same file."""

    def __init__(self) -> None:
        super().__init__()
        self._given: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text, known = record.getMessage(), len(self._given)
        self._given.add(text)
        return len(self._given) > known


class _File(logging.FileHandler):
    """The log file of a run."""

    def __init__(self, file: Path):
        super().__init__(file, encoding="utf-8")
        self.setFormatter(_Formatter())
        self.addFilter(_is_ours)


def hide_progress_bars() -> None:
    """Disable the progress bars of ``transformers`` if it is imported, except those of downloads on a terminal."""
    if "transformers" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # "Loading weights", and the hub's bars with it
        (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()


def init_console(*, warnings_alone: bool = False) -> None:
    """Log to standard error, for commands that start runs, or from warnings on for those that only read them."""
    _install([_Terminal()], logging.WARNING if warnings_alone else logging.INFO)


def init_logging(config: Any, *, silent: bool = False) -> Path:
    """Log to standard error and to a new ``log/<Model>/<Model>-<dataset>-<time>-<hash>.log``, whose path is returned.

    With ``silent``, nothing is logged: another process of the run does that.

    Replaces RecBole's ``init_logger``, whose second call in a process changes nothing (recbole/utils/logger.py:130 lacks
    ``force``). ``state`` is the level.
    """
    level = getattr(logging, str(config["state"] or "INFO").upper(), logging.INFO)
    values = "".join(map(str, config.final_config_dict.values()))
    identity = hashlib.sha256(values.encode()).hexdigest()[:6]
    name = f"{config['model']}-{config['dataset']}-{time.strftime('%b-%d-%Y_%H-%M-%S')}-{identity}.log"
    file = Path("log") / config["model"] / name
    if silent:
        _install([logging.NullHandler()], level)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    _install([_Terminal(), _File(file)], level)
    return file


def keep_traceback(error: BaseException) -> Path:
    """Append the traceback of an error to the log file of the run, or write it to a new file in ``log``; returns the path."""
    text = "".join(traceback.format_exception(error))
    files = [Path(handler.baseFilename) for handler in logging.getLogger().handlers if isinstance(handler, _File)]
    file = files[0] if files else Path("log") / f"error-{time.strftime('%b-%d-%Y_%H-%M-%S')}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
    return file


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether RecBole or this package, which use the root logger, logged the record, or its level is ``WARNING`` or higher."""
    return record.name == "root" or record.levelno >= logging.WARNING


def _with_place(record: logging.LogRecord) -> bool:
    """Complete the messages of RecBole's RaCT, which has a path to log and no place for it, which ``logging`` refuses."""
    if isinstance(record.msg, str) and record.args and isinstance(record.args, tuple) and "%" not in record.msg:
        record.msg, record.args = " ".join(map(str, (record.msg, *record.args))), ()
    return True


def _install(handlers: Sequence[logging.Handler], level: int) -> None:
    logging.captureWarnings(True)
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)  # at INFO, it shows a progress bar for each text
    hide_progress_bars()
    root = logging.getLogger()
    root.addFilter(_with_place)
    for handler in list(root.handlers):
        # other handlers, such as pytest's, belong to the caller
        if type(handler).__module__ in ("logging", "colorlog.formatter", __name__):
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        handler.addFilter(_Once())
        root.addHandler(handler)
    root.setLevel(level)


def metrics_line(result: Mapping[str, float] | None) -> str:
    """``hit@1 0.4836, ndcg@10 0.7123``."""
    return ", ".join(f"{name} {float(value):.4f}" for name, value in (result or {}).items()) or "none"


def _numbers(text: str) -> dict[str, float]:
    pairs = (entry.split(" : ") for entry in text.split("    "))
    return {name: float(value) for name, value in pairs}


def configuration_line(config: Any) -> str:
    """The given settings that differ from the defaults; the run record has all of them."""
    changed = {}
    for key, value in config.external_config_dict.items():
        default = config.internal_config_dict.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value = {name: part for name, part in value.items() if name not in default or default[name] != part}
            default = {}
        if value != default and key not in ("model", "dataset", "config_files"):
            changed[key] = value
    shown = ", ".join(f"{key}={_cut(value)}" for key, value in changed.items())
    return f"configuration: {shown}; defaults otherwise" if changed else "configuration: all defaults"


def _cut(value: Any, width: int = 80) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def dataset_line(dataset: Any) -> str:
    """Name, sizes (without RecBole's padding user and item) and folder of a dataset."""
    users, items, interactions = dataset.user_num - 1, dataset.item_num - 1, dataset.inter_num
    sizes = f"{users:,} users, {items:,} items, {interactions:,} interactions, density {interactions / (users * items):.2%}"
    return f"{dataset.dataset_name}: {sizes}, read from {os.path.normpath(dataset.dataset_path)}"


def model_line(model: Any) -> str:
    """``str(model)`` if that is one line, else the name and size of the model."""
    line = str(model)
    if "\n" not in line:
        return line
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{type(model).__name__}: {trainable:,} trainable parameter{'s' * (trainable != 1)}"
