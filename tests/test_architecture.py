"""The list of functions in docs/architecture.md is what an evaluation runs, in that order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.conftest import assembled

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
HOPS = {  # as the document names them -> file and qualified name
    "ProtocolTrainer.evaluate": ("classical/trainer.py", "ProtocolTrainer.evaluate"),
    "ProtocolTrainer._full_sort_batch_eval": ("classical/trainer.py", "ProtocolTrainer._full_sort_batch_eval"),
    "CandidateSet.lookup": ("data/candidates.py", "CandidateSet.lookup"),
    "Variant.score": ("model/ranker.py", "LLMRanker._scored"),
    "TitleLikelihood.__call__": ("llm/likelihood.py", "TitleLikelihood.__call__"),
    "PromptBuilder.prompt": ("data/prompts.py", "PromptBuilder.prompt"),
    "Scorer.__call__": ("llm/scoring.py", "Scorer.__call__"),
    "Ranks.add": ("evaluation/ranks.py", "Ranks.add"),
    "Evaluator.evaluate": ("recbole/evaluator/evaluator.py", "Evaluator.evaluate"),
}


def test_the_document_lists_the_functions() -> None:
    section = DOCUMENT.read_text().split("## From a history to a score")[1].split("\n## ")[0]
    listed = re.findall(r"^(\d+)\. `([\w.]+)` \(`([\w/.]+)`\): ", section, re.MULTILINE)
    assert [int(number) for number, *_ in listed] == [*range(1, len(HOPS) + 1)] and len(listed) <= 9
    assert [name for _, name, _ in listed] == list(HOPS)
    declared = {"Variant.score": "evaluation/recommender.py"}  # the function itself is the model's
    assert {name: file for _, name, file in listed} == {name: file for name, (file, _) in HOPS.items()} | declared


@pytest.fixture
def trained(settings: dict[str, Any]) -> Any:
    run = assembled("TALLRec", settings, lora_epochs=1, train_samples=8, valid_users=5)
    run.trainer.fit(run.train, run.valid)
    return run


def test_an_evaluation_enters_them_in_that_order_and_never_turns_back(trained: Any) -> None:
    entered: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path, function = Path(frame.f_code.co_filename).as_posix(), frame.f_code.co_qualname
        found = [name for name, (file, known) in HOPS.items() if function == known and path.endswith(file)]
        if event == "call" and found != entered[-1:]:
            entered.extend(found)

    assert len(trained.test) == 1  # one batch
    sys.setprofile(profile)
    try:
        trained.trainer.evaluate(trained.test)
    finally:
        sys.setprofile(None)
    assert entered == list(HOPS)
    entered.clear()
    sys.setprofile(profile)
    try:
        trained.trainer.evaluate(trained.test)
    finally:
        sys.setprofile(None)
    scored = {"Variant.score", "TitleLikelihood.__call__", "PromptBuilder.prompt", "Scorer.__call__"}
    assert entered == [name for name in HOPS if name not in scored]  # the scores are cached
