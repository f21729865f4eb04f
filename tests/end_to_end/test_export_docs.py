"""The Python block of docs/export.md, run as it stands on a small model, gives this package's scores."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from recbole_llm import cli
from recbole_llm.config import LLMConfig
from tests.conftest import CHATML

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_python_block_ranks_as_this_package_does(
    settings: dict[str, Any], tiny_lm: Path, tmp_path: Path, assemble: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tmp_path / "chat-lm"
    shutil.copytree(tiny_lm, lm)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>")
    tokenizer.save_pretrained(lm)
    prompts = {"prompts": {"mine": "Seen:\n{history}\nCandidates:\n{candidates}\nNext:"}, "prompt": "mine", "chat": True}
    config = {**settings, **prompts, "llm_path": str(lm), "lora_train_mode": "prefix", "lora_epochs": 1, "normalize": "sum"}
    made = assemble("LoRACocktail", config)
    made.trainer.fit(made.train, made.valid)
    given = [f"--{key}={value}" for key, value in config.items()]
    cli.main(["export", "--model=LoRACocktail", "--dataset=tiny", f"--out={tmp_path / 'prompts'}", *given])
    capsys.readouterr()

    merged = made.model.adapters(made.trainer.cache)["merged"]
    values = f"base, adapter, prompts = {str(lm)!r}, {str(merged)!r}, {str(tmp_path / 'prompts' / 'test.jsonl')!r}"
    code, replaced = re.subn(r"^base, adapter, prompts = .*$", lambda _: values, block("python"), flags=re.MULTILINE)
    assert replaced == 1
    ran: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), ran)
    assert len(capsys.readouterr().out.splitlines()) == len(ran["scores"]) == 5

    lines = [json.loads(line) for line in (tmp_path / "prompts" / "test.jsonl").read_text().splitlines()[:5]]
    assert all(line["exact"] for line in lines)
    interaction, _, _, targets = next(iter(made.test))
    found = made.model.score_candidates(interaction, made.test.candidates.lookup(interaction["user_id"], targets))
    users = [made.model.parts.histories.user_ids[user] for user in interaction["user_id"].tolist()]
    for user, scores in ran["scores"].items():
        torch.testing.assert_close(torch.tensor(scores), found[users.index(user)], atol=1e-3, rtol=0)


def test_the_yaml_block_has_reccocktails_settings() -> None:
    """The ingredient's settings of the composed configuration, under LLaMA-Factory's names."""
    theirs = yaml.safe_load(block("yaml"))
    ours = LLMConfig("LoRACocktail", "ml-100k", config_dict={"llm": "qwen2-7b"})
    same = {
        **{name: name for name in ("lora_alpha", "lora_dropout", "lr_scheduler_type", "warmup_ratio")},
        **{"lora_rank": "r", "learning_rate": "lora_learning_rate", "num_train_epochs": "lora_epochs"},
        **{"eval_steps": "lora_eval_steps", "model_name_or_path": "llm_path"},
    }
    assert {key: theirs[key] for key in same} == {key: ours[name] for key, name in same.items()}
    assert theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"] == ours["lora_batch_size"]
    assert theirs["lora_target"] == "all" and ours["target_modules"] == "all-linear"
    assert theirs["cutoff_len"] >= ours["max_prompt_tokens"] and ours["lora_valid"] == "loss"
    assert int(re.search(r"base spirit: (\d+)", block("yaml"))[1]) == ours["general_epochs"]
