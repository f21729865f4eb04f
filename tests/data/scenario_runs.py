"""Runs of scenarios up to their candidates, in tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from recbole_llm.config import LLMConfig
from recbole_llm.data.candidate_sets import candidate_sets
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.histories import Histories
from recbole_llm.data.loading import create_dataset, data_preparation

SCENARIOS: dict[str, dict[str, Any]] = {
    "new": {"new_items": 0.2},
    "cold": {"cold_users": 0.3},
    "few": {"train_users": 20},
    "from": {"train_dataset": "other"},
}


class Built(NamedTuple):
    """A run up to its candidates, in tokens."""

    histories: Histories
    splits: list[Any]
    candidates: dict[str, CandidateSet]

    def users(self, internal: Any) -> list[str]:
        return [self.histories.user_ids[user] for user in internal]

    def items(self, internal: Any) -> list[str]:
        return [self.histories.item_ids[item] for item in internal]

    @property
    def new(self) -> set[str]:
        return set(self.items(self.histories.scenario.new))

    @property
    def untrained(self) -> set[str]:
        return set(self.users(self.histories.scenario.untrained))

    def rows(self, phase: str) -> list[tuple[str, ...]]:
        """User, history (sequential models) and item of each row of a split."""
        rows = self.splits[("train", "valid", "test").index(phase)].inter_feat
        found = [self.users(rows["user_id"]), self.items(rows["item_id"])]
        if "item_id_list" in rows:
            found += [self.items(column) for column in rows["item_id_list"].T]
        return sorted(zip(*found, strict=True))

    def asked(self, phase: str) -> dict[str, tuple[str, list[str]]]:
        """User -> target and the other candidates."""
        found = self.candidates[phase]
        rows = zip(self.users(found.users), self.items(found.targets), map(self.items, found.items), strict=True)
        return {user: (target, [item for item in row if item != target]) for user, target, row in rows}


def build(model: str, settings: dict[str, Any], **values: Any) -> Built:
    config = LLMConfig(model, "tiny", config_dict={**settings, **values})
    dataset = create_dataset(config)
    loaders = data_preparation(config, dataset)
    return Built(dataset.histories, [loader._dataset for loader in loaders], candidate_sets(config, dataset))


def own_data(data_path: Path, folder: Path, change: Callable[[list[list[str]]], list[list[str]]]) -> str:
    """A data path whose ``tiny`` has changed rows (user, item, time), and the same ``other``."""
    shutil.copytree(data_path, folder)
    file = folder / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *map("\t".join, change([row.split("\t") for row in rows])), ""]))
    return str(folder)
