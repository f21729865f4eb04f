"""Forms of data: how interactions become training, validation and test data, and what each form allows.

A form follows from the configuration: files that are split already (``benchmark_filename``), or one file and ``eval_args``.

=================================  =====================================================================================
form                               what the parts are
=================================  =====================================================================================
``benchmark_filename``: 3 names    the files; a user's history is the training file's rows, then those of the next file
``benchmark_filename``: 2 names    training and test: nothing is validated, RecBole's models are trained for all epochs
``LS: valid_and_test``             one target per user at validation and one at test
``LS: test_only``                  one target per user at test: nothing is validated
``RS``                             ratios of each user's rows, or of all rows (``group_by: none``)
``TS``                             rows after a point in time, for users with earlier rows
=================================  =====================================================================================

This module reads only the configuration, whose types are already checked; :mod:`recbole_llm.data.splitting` finds the rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from recbole.utils import ModelType

LEAVE_ONE_OUT = {"LS": "valid_and_test"}
# filters of RecBole, which it does not apply to files that are split already
FILTERS = ("val_interval", "user_inter_num_interval", "item_inter_num_interval")
_DRAWN = re.compile(r"(?:uni|pop)[1-9]\d*")  # RecBole's modes with drawn negatives


LABELLED = (ModelType.CONTEXT, ModelType.DECISIONTREE)
"""Families of models that predict labels of single interactions (clicks), and keep RecBole's evaluation."""


def reads_labels(settings: Any) -> bool:
    """Whether labels are read from the data, and not made by sampling negatives, in training or evaluation."""
    sampled = (settings["train_neg_sample_args"] or {}).get("distribution") not in (None, "none", "None")
    return "labeled" in settings["eval_args"]["mode"].values() or (settings["MODEL_TYPE"] in LABELLED and not sampled)


def draws(mode: str) -> bool:
    """Whether a mode of RecBole draws negatives, other ones in every evaluation."""
    return bool(_DRAWN.fullmatch(mode))


def leaves_one_out(settings: Any) -> bool:
    """Whether the last two items of each user, in time order, are the validation and test targets."""
    arguments = settings["eval_args"]
    return not settings["benchmark_filename"] and arguments["order"] == "TO" and arguments["split"] == LEAVE_ONE_OUT


def needs_time(settings: Any) -> bool:
    """Whether a form cannot be read without a time column. The rows of files that are split already have an order."""
    return not settings["benchmark_filename"] and settings["eval_args"]["order"] == "TO"


def validates(settings: Any) -> bool:
    """Whether a form has validation data."""
    if files := settings["benchmark_filename"]:
        return len(files) == 3
    (kind, parts), *_ = settings["eval_args"]["split"].items()
    return parts != "test_only" if kind == "LS" else parts[1] > 0


def described(settings: Any) -> str:
    """The key and value that decide the form, for messages."""
    if files := settings["benchmark_filename"]:
        return f"benchmark_filename: {files}"
    arguments = settings["eval_args"]
    return f"eval_args: split {arguments['split']}, order {arguments['order']}"


def complete(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``eval_args`` with RecBole's defaults for what is missing, and the mode of each phase."""
    found = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full", **arguments}
    mode = found["mode"]
    if mode == {}:
        raise ValueError("eval_args: mode {} names no phase; give {'valid': ..., 'test': ...}, or one mode for both")
    if isinstance(mode, Mapping):
        other = mode.get("valid", mode.get("test", "full"))
        found["mode"] = {phase: mode.get(phase, other) for phase in ("valid", "test")}
    else:
        found["mode"] = {"valid": mode, "test": mode}
    return found


def check(settings: Mapping[str, Any], given: Mapping[str, Any], *, model: str, lists_only: bool) -> None:
    """Refuse a form without meaning, or one in which a model cannot be trained or measured.

    Args:
        settings: the final values; ``eval_args.mode`` is a dictionary of phases.
        given: the user's own values.
        model: its name.
        lists_only: it scores lists of candidates and not single items or the catalogue (LLM rankers).

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    if isinstance(settings["load_col"], Mapping) and "inter" not in settings["load_col"]:
        raise ValueError(
            f"load_col: {settings['load_col']} has no columns of the .inter file; give {{'inter': [...]}} too, or ~ for all"
        )
    if settings["benchmark_filename"] is not None:
        _check_files(settings["benchmark_filename"], given)
    else:
        _check_split(settings["eval_args"], settings["MODEL_TYPE"] == ModelType.SEQUENTIAL)
        rule, order = settings.get("tie_order"), settings["eval_args"]["order"]
        if rule in ("item", "random") and order != "TO":
            raise ValueError(
                f"tie_order: {rule} orders equal times, and eval_args has order: {order}; give order: TO, or remove tie_order"
            )
    for mode in settings["eval_args"]["mode"].values():
        if lists_only and mode not in ("candidates", "full"):
            _refuse_for_lists(mode, model)


def _refuse_for_lists(mode: str, model: str) -> None:
    if mode == "labeled":
        raise ValueError(
            f"eval_args: mode 'labeled' needs click predictions, and {model} ranks candidates; give "
            "--eval_args=\"{'mode': 'candidates'}\""
        )
    source = {"uni": "uniform", "pop": "popularity"}[mode[:3]]
    raise ValueError(
        f"eval_args: mode {mode!r} draws other negatives in every evaluation and scores them one by one, and {model} scores "
        f"lists of candidates; give --eval_args=\"{{'mode': 'candidates'}}\" "
        f"--candidates=\"{{'source': '{source}', 'num_negatives': {mode[3:]}}}\", which draws them once"
    )


def _check_files(files: Any, given: Mapping[str, Any]) -> None:
    if len(files) not in (2, 3) or len(set(files)) < len(files):
        raise ValueError(
            f"benchmark_filename: {files!r} must be a list of two or three names, ['train', 'test'] or "
            "['train', 'valid', 'test'] for DATASET.train.inter and so on"
        )
    for key in FILTERS:
        if given.get(key) is not None:
            raise ValueError(
                f"{key}: {given[key]!r} is not applied to files that are split already (benchmark_filename); remove it, or give "
                "one .inter file without benchmark_filename"
            )


def _check_split(arguments: Mapping[str, Any], reads_histories: bool) -> None:
    split, order, group_by = arguments["split"], arguments["order"], arguments["group_by"]
    if len(split) != 1:
        raise ValueError(
            f"eval_args: split {split!r} must be one of {{'LS': 'valid_and_test'}}, {{'RS': [0.8, 0.1, 0.1]}} and "
            "{'TS': [0.8, 0.1, 0.1]}"
        )
    ((kind, parts),) = split.items()
    if parts == "valid_only":
        raise ValueError("eval_args: split {'LS': 'valid_only'} leaves no test items; choose 'valid_and_test' or 'test_only'")
    if kind != "LS":
        _check_ratios(kind, parts)
    grouped = not (group_by is None or str(group_by).lower() == "none")
    if not grouped and kind != "RS":
        raise ValueError(
            f"eval_args: group_by {group_by!r} has no meaning with split {split}, which is made for each user; give 'user'"
        )
    if order == "RO" and (reads_histories or kind == "TS"):
        why = "a model that reads histories" if reads_histories else "a split by time"
        raise ValueError(f"eval_args: order RO is random, and {why} needs time order; give --eval_args=\"{{'order': 'TO'}}\"")


def _check_ratios(kind: str, ratios: Sequence[float]) -> None:
    if len(ratios) != 3:
        remedy = [ratios[0], 0, ratios[1]] if len(ratios) == 2 else [0.8, 0.1, 0.1]
        raise ValueError(
            f"eval_args: split {{'{kind}': {list(ratios)}}} needs three shares, of training, validation and test data; "
            f"give {remedy}"
        )
    if not (ratios[0] > 0 < ratios[2]):
        raise ValueError(
            f"eval_args: split {{'{kind}': {list(ratios)}}} leaves no training or no test data; give [0.8, 0.1, 0.1]"
        )


def load_col(settings: Mapping[str, Any]) -> Any:
    """The default columns under the names that the user gave them, with those that filters, labels and histories read.

    Columns that a file does not have are skipped by RecBole.
    """
    columns = settings["load_col"]
    if not isinstance(columns, dict):
        return columns
    names = {"user_id": "USER_ID_FIELD", "item_id": "ITEM_ID_FIELD", "timestamp": "TIME_FIELD", "rating": "RATING_FIELD"}
    renamed = {source: _renamed(listed, names, settings) for source, listed in columns.items()}
    inter = renamed.get("inter")
    if isinstance(inter, list):
        wanted = [*(settings.get("val_interval") or {}), *(settings.get("threshold") or {})]
        if settings["benchmark_filename"]:
            wanted.append(f"{settings['ITEM_ID_FIELD']}{settings['LIST_SUFFIX']}")
        renamed["inter"] = [*inter, *(name for name in wanted if name not in inter)]
    return renamed


def _renamed(columns: Any, names: Mapping[str, str], settings: Mapping[str, Any]) -> Any:
    if not isinstance(columns, list):
        return columns
    return [settings.get(names[name]) or name if name in names else name for name in columns]


def phases(settings: Any, wanted: Collection[str]) -> list[str]:
    """Those of the phases for which a form has data."""
    return [phase for phase in wanted if phase == "test" or validates(settings)]
