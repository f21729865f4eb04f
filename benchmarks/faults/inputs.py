"""The kinds of hostile inputs: for each a strategy of hypothesis, and what reads them as the package does."""

from __future__ import annotations

from collections.abc import Callable

from faults import inputs_data, inputs_models, inputs_settings
from faults.strategies import Kind
from faults.world import World

KINDS: dict[str, Callable[[World], Kind]] = {
    "atomic files": inputs_data.atomic_files,
    "titles of up to 100,000 characters": inputs_data.item_texts,
    "property files": inputs_settings.property_files,
    "command lines": inputs_settings.command_lines,
    "leaderboard files": inputs_settings.boards,
    "search spaces": inputs_settings.search_spaces,
    "candidate files": inputs_data.candidate_files,
    "prediction files": inputs_data.prediction_files,
    "run records": inputs_models.records,
    "other JSON files": inputs_models.json_files,
    "adapters": inputs_models.adapters,
    "checkpoints": inputs_models.checkpoints,
    "chat templates": inputs_models.chat_templates,
}
