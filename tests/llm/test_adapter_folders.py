"""The config of a LoRA is somebody else's: what it says is refused by name, in bounded time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.llm.adapter_folders import CONFIG_FILE, WEIGHTS_FILE, read_config

HUGE = 10**400  # a whole number that is no float


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora_alpha": HUGE}, "lora_alpha is 10+, not a finite number"),
        ({"r": HUGE}, "r is 10+, not a whole number of at least 1"),
        ({"target_modules": "("}, "target_modules: '\\(' is no regular expression"),
        ({"target_modules": "(.|.)*!"}, "target_modules: '.*' repeats a group"),
        ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern: '.*' repeats a group"),
        ({"layers_pattern": ["(x|x)+"]}, "layers_pattern: '.*' repeats a group"),
        ({"alpha_pattern": {".*a" * 7: 2}}, "alpha_pattern: '.*' repeats a group, or has more than 6 repetitions"),
    ],
)
def test_numbers_and_patterns_without_bounds_are_refused(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).touch()
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}))
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}: {fault}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(?!.*vision).*\.(q_proj|v_proj)$",
        r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    ],
)
def test_patterns_of_trainers_are_read(pattern: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).touch()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": pattern, "rank_pattern": {"layers.0.q_proj": 2}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert read_config(tmp_path) == config
