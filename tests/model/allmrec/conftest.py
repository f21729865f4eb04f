"""Trained models of ALLMRec, which the tests of this folder share, and what they look at."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

LISTWISE = {
    "soft_prompt": "allmrec",
    "user_text": "{user} is a user representation.",
    "user_before_bos": True,
    "title_quote": "'\"'",
    "history_separator": ", ",
    "candidate_separator": ", ",
}
PROMPTS: dict[str, dict[str, Any]] = {"history": {}, "listwise": LISTWISE}
Made = SimpleNamespace


@pytest.fixture(scope="session")
def trained(shared_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``trained(**changes)``: a model with its stages, of which most are cached, and seven test users; made once."""
    cached: dict[str, Made] = {}

    def trained(**changes: Any) -> Made:
        key = json.dumps(changes, sort_keys=True)
        if key not in cached:
            made = assemble("ALLMRec", shared_settings, **changes)
            made.trainer.fit(made.train, made.valid)
            interaction, _, _, targets = next(iter(made.test))
            made.interaction = interaction[:7]
            made.users = made.interaction["user_id"].tolist()
            made.histories = [made.model.parts.histories.before(user, "test").tolist() for user in made.users]
            if made.test.candidates:
                made.candidates = made.test.candidates.lookup(made.interaction["user_id"], targets[:7])
            made.causal = made.model.parts.backbone.load(made.trainer.cache)
            made.builder = made.model.parts.builder(made.causal.tokenizer)
            made.soft = made.model.soft
            made.likelihood = made.model.projection.likelihood(made.causal, made.soft)
            cached[key] = made
        return cached[key]

    return trained


@pytest.fixture(scope="session")
def made(trained: Callable[..., Made]) -> Made:
    return trained()


@torch.no_grad()
def scores(made: Made) -> torch.Tensor:
    return made.model.score_candidates(made.interaction, made.candidates)


@torch.no_grad()
def score(made: Made, histories: Any = None, candidates: Any = None, users: Any = None) -> torch.Tensor:
    given = (made.histories if histories is None else histories), (made.candidates if candidates is None else candidates)
    return made.likelihood(*given, made.users if users is None else users)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def codes(made: Made) -> dict[str, torch.Tensor]:
    """What the alignment stage has left."""
    return load_file(made.trainer.cache.folder(made.model.projection.alignment) / "codes.safetensors")


def with_codes(made: Made, item_codes: torch.Tensor) -> Made:
    """The same model with other vectors for the items."""
    soft = copy.copy(made.soft)
    soft._codes = item_codes
    return SimpleNamespace(**{**vars(made), "likelihood": replace(made.likelihood, soft_tokens=soft)})


def run_stages(made: Made) -> dict[str, float]:
    """What ``fit`` does before it validates; the seconds of each stage."""
    made.trainer.cache.run(*made.model.plan(made.candidates))
    made.model.load(made.trainer.cache)
    return made.trainer.cache.seconds


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def copied(data_path: Path, folder: Path, **changes: Callable[[str], str]) -> Path:
    """A copy of ``tiny`` whose .inter and .item files went through functions; returns its data path."""
    (folder / "tiny").mkdir(parents=True)
    for kind in ("inter", "item"):
        text = (data_path / "tiny" / f"tiny.{kind}").read_text()
        (folder / "tiny" / f"tiny.{kind}").write_text(changes.get(kind, str)(text))
    return folder
