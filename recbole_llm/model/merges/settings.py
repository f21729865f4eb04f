"""The settings of merging, those of ``merge_beside`` included."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from recbole_llm.merging.folders import BUILTIN, READERS
from recbole_llm.merging.stage import resolve
from recbole_llm.settings import Settings

OPTIONS = (
    "start",
    "weights",
    "extrapolate",
    "points",
    "steps",
    "density",
    "residual",
    "shrinkage",
)  # of methods, besides the learning rate


@dataclass(frozen=True)
class MergeSettings(Settings):
    """The ``merge_*`` keys; see ``properties/``, section *Merging*."""

    KEYS = {"method": "merge"} | {
        name: f"merge_{name}" for name in ("granularity", "split", "prompts", "first_tokens", "titles", "compress_rank")
    }

    method: str
    granularity: str
    split: str
    prompts: int
    first_tokens: int
    titles: int
    compress_rank: int | None
    options: Mapping[str, Any]

    @classmethod
    def beside(cls, config: Any) -> dict[str, MergeSettings]:
        """The settings of ``merge_beside`` by the name of the row.

        Raises:
            ValueError: one that changes a key that is not of merging or that its method does not read, a name with a dot, or as
                :meth:`of`.
        """
        found = {}
        for row, changes in (config["merge_beside"] or {}).items():
            if not isinstance(row, str) or "." in row:  # it names an adapter, and peft takes no dots
                raise ValueError(f"merge_beside: {row!r} cannot name a row; give text without a dot")
            if not row or hasattr(nn.ModuleDict(), row):  # where peft keeps it
                raise ValueError(f"merge_beside: {row!r} cannot name a row, torch has a use for it; give another name")
            if not isinstance(changes, dict):
                raise ValueError(f"merge_beside: {row}: {changes!r} is not a dictionary of the keys that differ")
            for key in changes:
                if key not in MERGE_KEYS:
                    raise ValueError(f"merge_beside: {row} changes {key}, which is not one of {', '.join(MERGE_KEYS)}")
            found[row] = cls.of(ChainMap(changes, config))  # type: ignore[arg-type]
            for option, readers in READERS.items():
                key, method = f"merge_{option}", found[row].method
                if changes.get(key) is not None and method in BUILTIN and method not in readers:
                    raise ValueError(
                        f"merge_beside: {row} changes {key}, which has no effect with merge: {method}; it is read by "
                        f"{', '.join(readers)}"
                    )
        return found

    @classmethod
    def of(cls, config: Any, **given: Any) -> MergeSettings:
        """The settings of a configuration.

        Raises:
            ValueError: no such method, granularity or start.
        """
        resolve(config["merge"])
        if config["merge_granularity"] not in ("global", "module"):
            raise ValueError(f"merge_granularity: {config['merge_granularity']} is neither global nor module")
        if config["merge_start"] not in ("lattice", "uniform"):
            raise ValueError(f"merge_start: {config['merge_start']} is neither lattice nor uniform")
        rates = config["merge_learning_rate"]
        if isinstance(rates, list | tuple) and not (rates and all(isinstance(rate, int | float) for rate in rates)):
            raise ValueError(f"merge_learning_rate: {rates} is no list of numbers; give one or several, such as [0.1, 1.0]")
        options = {name: config[f"merge_{name}"] for name in OPTIONS}
        options |= {"lr": config["merge_learning_rate"], "seed": config["seed"]}
        return super().of(config, options=options, **given)


MERGE_KEYS = (*MergeSettings.KEYS.values(), *(f"merge_{name}" for name in OPTIONS), "merge_learning_rate")
