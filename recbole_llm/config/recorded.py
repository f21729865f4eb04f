"""The configuration of a finished run, from the values in its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.config.key_groups import BOOKKEEPING
from recbole_llm.config.run_config import LLMConfig
from recbole_llm.config.values import as_literals

_ROUNDS = 4  # a value such as ``llm`` changes the defaults of others
_ABOUT_FILES = BOOKKEEPING | {"init_from"}  # the values that init_from took from a run stand in the record themselves


def recorded_config(
    record: Mapping[str, Any],
    path: Path,
    *,
    checkpoint_dir: Path | None,
    data_path: str | None = None,
    changes: Mapping[str, Any] | None = None,
    own: bool = False,
) -> LLMConfig:
    """The configuration that a run was made with, on this machine.

    Args:
        record: the content of its record.
        path: the file of the record.
        checkpoint_dir: where results are kept; None: the default one.
        data_path: folder that contains the dataset; None: the one of the run, or if that is gone the default one.
        changes: values that are changed afterwards; a dictionary changes only the keys that it names, as on the command line.
        own: the model is one of the user, whose settings may stand in no property file.

    Raises:
        ValueError: this version of the package cannot give the run's values; names the first key and both values.
    """
    model, dataset, recorded = record["model"], record["dataset"], record["config"]
    here: dict[str, Any] = {} if checkpoint_dir is None else {"checkpoint_dir": str(checkpoint_dir)}
    if data_path is None and (folder := Path(str(recorded.get("data_path")))).is_dir():
        data_path = str(folder.parent)
    here |= {"data_path": data_path} if data_path is not None else {}
    # the keys of the evaluation are checked against each other, so they are given together; loss_type: models of users need it
    given = {**here, "eval_args": {**recorded["eval_args"], "mode": given_mode(recorded)}}
    given |= {key: recorded[key] for key in ("metrics", "topk", "valid_metric", "loss_type") if key in recorded}
    for _ in range(_ROUNDS):
        config = LLMConfig(model, dataset, config_dict=as_literals(given))
        found, known = config.plain(), config.properties.definitions
        differing = [key for key in recorded.keys() & found.keys() - _ABOUT_FILES if found[key] != recorded[key]]
        absent = recorded.keys() - found.keys() - _ABOUT_FILES if own else set()
        if not differing and not absent:
            own_keys = [f"--{key}={value!r}" for key, value in (changes or {}).items()]  # so that an error names their source
            return LLMConfig(model, dataset, config_dict=as_literals(given), cmd_line=own_keys) if own_keys else config
        given |= {key: recorded[key] for key in {*differing} & known.keys() - {"eval_args"} | absent}
    key = min([*differing, *absent])
    raise ValueError(
        f"{path}: {key} was {recorded[key]!r} in this run and is {found.get(key)!r} now, with the same settings; the run is of "
        f"another state of this package: repeat it (--model={model} --dataset={dataset} and its other options)"
    )


def given_mode(recorded: Mapping[str, Any]) -> dict[str, str]:
    """The ``mode`` of ``eval_args`` as a user gives it: a record has RecBole's ``full`` for candidates."""
    listed = recorded.get("candidate_phases", ())
    return {phase: "candidates" if phase in listed else mode for phase, mode in recorded["eval_args"]["mode"].items()}
