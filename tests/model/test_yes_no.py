"""TALLRec's original form: a question about one item, answered by Yes or No."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.data.yes_no import YesNoPrompts
from recbole_llm.model.parts import histories_of
from recbole_llm.model.yes_no import YesNoParts
from recbole_llm.quick_start import run_recbole_llm

FORM = {
    "tallrec_form": "yes_no",
    "prompt": "tallrec_yes_no",
    "title_quote": "'\"'",
    "history_separator": ", ",
    "max_history": 10,
    "lora_train_mode": "prefix",
    "lora_eval_steps": None,
    "train_samples": 24,
    "lora_epochs": 2,
}


@pytest.fixture(scope="module")
def rated(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset ``tiny`` with ratings: every third interaction of a user is rated 2, the others 4."""
    folder = tmp_path_factory.mktemp("rated") / "tiny"
    folder.mkdir()
    header, *rows = (data_path / "tiny" / "tiny.inter").read_text().splitlines()
    lines = [f"{row}\t{2 if place % 3 == 0 else 4}" for place, row in enumerate(rows)]
    (folder / "tiny.inter").write_text("\n".join([f"{header}\trating:float", *lines]) + "\n")
    (folder / "tiny.item").write_text((data_path / "tiny" / "tiny.item").read_text())
    return folder.parent


@pytest.fixture(scope="module")
def with_ratings(rated: Path) -> dict[str, Any]:
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    return {**FORM, "data_path": str(rated), "load_col": columns, "liked_above": 3}


@pytest.fixture(scope="module")
def made(module_settings: dict[str, Any], assemble: Callable[..., Any], with_ratings: dict[str, Any]) -> Any:
    made = assemble("TALLRec", module_settings, **with_ratings)
    made.trainer.fit(made.train, made.valid)
    return made


def text_of(prompts: YesNoPrompts, tokenizer: Any, *parts: list[int]) -> str:
    return tokenizer.decode([token for part in parts for token in part])


def test_the_question_lists_liked_and_disliked_titles_and_asks_for_one(made: Any) -> None:
    parts, tokenizer = made.model.parts, made.model.parts.backbone.tokenizer
    assert isinstance(parts, YesNoParts)
    prompts, names = parts.builder(tokenizer), parts.domain.items.names
    text = text_of(prompts, tokenizer, prompts.prompt([1, 2, 3, 4], {2, 4}).ids, prompts.target(5), prompts.yes)
    assert f'User preference: "{names[1]}", "{names[3]}"\nUser unpreference: "{names[2]}", "{names[4]}"\n' in text
    assert text.endswith(f'like the target item "{names[5]}"?\n\n### Response:\nYes.</s>')
    assert tokenizer.decode(prompts.no) == "No.</s>"
    assert 'preference: \nUser unpreference: "' in text_of(prompts, tokenizer, prompts.prompt([2], {2}).ids)
    shown = text_of(prompts, tokenizer, prompts.prompt([*range(1, 20)], set()).ids)
    assert shown.count('"The') == 10 and f'"{names[9]}"' not in shown and f'"{names[10]}"' in shown


def test_the_oldest_titles_go_first_where_a_question_does_not_fit(made: Any) -> None:
    from dataclasses import replace

    parts, tokenizer = made.model.parts, made.model.parts.backbone.tokenizer
    whole = parts.builder(tokenizer).prompt([1, 2, 3], set())
    short = parts.builder(tokenizer, prompts=replace(parts.prompts, max_prompt_tokens=len(whole) - 1))
    assert short.prompt([1, 2, 3], set()) == parts.builder(tokenizer).prompt([2, 3], set())
    with pytest.raises(ValueError, match="max_prompt_tokens: 20 is too small"):
        parts.builder(tokenizer, prompts=replace(parts.prompts, max_prompt_tokens=20)).prompt([1], set())


def test_ratings_above_the_threshold_are_liked(made: Any, rated: Path) -> None:
    known, low = made.model.parts.histories, set()
    for line in (rated / "tiny" / "tiny.inter").read_text().splitlines()[1:]:
        user, item, _, rating = line.split("\t")
        if float(rating) <= 3:
            low.add((user, item))
    found = {(known.user_ids[u], known.item_ids[i]) for u, items in enumerate(known.disliked) for i in items}
    assert found == low


def test_the_rating_of_a_held_out_interaction_does_not_change_that_of_the_history(
    settings: dict[str, Any], assemble: Callable[..., Any], with_ratings: dict[str, Any], rated: Path, tmp_path: Path
) -> None:
    """The user u0 comes back to the first item at last and rates it otherwise."""
    (tmp_path / "data").mkdir()
    shutil.copytree(rated / "tiny", tmp_path / "data" / "tiny")
    file = tmp_path / "data" / "tiny" / "tiny.inter"
    item, rating = next(line.split("\t")[1::2] for line in file.read_text().splitlines() if line.startswith("u0\t"))
    assert float(rating) == 2
    file.write_text(file.read_text() + f"u0\t{item}\t2000000000\t5\n")
    known = assemble(
        "TALLRec", settings, **with_ratings | {"data_path": str(tmp_path / "data"), "rm_dup_inter": None}
    ).model.parts.histories
    user = known.user_ids.index("u0")
    assert known.target(user, "test") == known.item_ids.index(item) and known.target(user, "test") in known.disliked[user]


def test_scores_are_the_log_odds_of_yes_after_the_whole_question(made: Any, tiny_lm: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, (interaction, _, _, targets) = made.model, next(iter(made.test))
    vanilla = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_lm), str(model.adapters(made.trainer.cache)["tuned"])
    ).eval()
    candidates = made.test.candidates.lookup(interaction["user_id"], targets)[:3]
    prompts = model.parts.builder(model.parts.backbone.tokenizer)
    with torch.no_grad():
        scores = model.score_candidates(interaction[:3], candidates)
        for row, (user, history) in enumerate(
            zip(interaction["user_id"][:3].tolist(), histories_of(model, interaction[:3]), strict=True)
        ):
            for place, item in enumerate(candidates[row].tolist()):
                ids = [*prompts.prompt(history, model.parts.histories.disliked[user]).ids, *prompts.target(item)]
                logits = vanilla(torch.tensor([ids])).logits[0, -1]
                expected = logits[prompts.yes[0]] - logits[prompts.no[0]]
                torch.testing.assert_close(scores[row, place], expected, atol=2e-4, rtol=0)


def test_the_answer_of_an_example_is_the_rating(made: Any) -> None:
    parts, tokenizer = made.model.parts, made.model.parts.backbone.tokenizer
    encode = made.model.adapter_training.encoder(made.model.trained(made.candidates)["tuned"], tokenizer)
    examples, _ = made.model.adapter_training.examples(made.model.trained(made.candidates)["tuned"])
    assert len(examples) == 24
    answers = set()
    for example in examples:
        row, mask = encode(example, np.random.default_rng(0))
        item = int(parts.domain.histories[example.user][example.end])
        answer = tokenizer.decode(row.ids).rsplit("Response:\n")[1]
        assert answer == ("No.</s>" if item in parts.histories.disliked[example.user + 1] else "Yes.</s>")
        assert mask == [0] + [1] * (len(row) - 1)  # train_on_inputs
        answers.add(answer)
    assert len(answers) == 2


def test_without_ratings_sampled_items_are_not_liked(module_settings: dict[str, Any], assemble: Callable[..., Any]) -> None:
    made = assemble("TALLRec", module_settings, **FORM, train_on_inputs=False)
    parts, tokenizer = made.model.parts, made.model.parts.backbone.tokenizer
    assert parts.disliked is parts.disliked and len(parts.disliked) == 61  # made once, not for each example
    spec = made.model.trained(made.candidates)["tuned"]
    encode, (example, *_) = made.model.adapter_training.encoder(spec, tokenizer), made.model.adapter_training.examples(spec)[0]
    titles = [parts.domain.items.names[item] for item in parts.domain.histories[example.user].tolist()]
    answers = []
    for seed in range(40):
        row, mask = encode(example, np.random.default_rng(seed))
        answer = tokenizer.decode([token for token, counts in zip(row.ids, mask, strict=True) if counts])
        asked = tokenizer.decode(row.ids).split("target item ")[1].split('"')[1]
        assert (asked in titles) == (answer == "Yes.</s>")
        answers.append(answer)
    assert 8 < answers.count("Yes.</s>") < 32


def test_somebody_who_has_chosen_every_item_likes_all_of_them(
    module_settings: dict[str, Any], assemble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("TALLRec", module_settings, **FORM, train_on_inputs=False)
    parts, tokenizer = made.model.parts, made.model.parts.backbone.tokenizer
    spec = made.model.trained(made.candidates)["tuned"]
    encode, (example, *_) = made.model.adapter_training.encoder(spec, tokenizer), made.model.adapter_training.examples(spec)[0]
    monkeypatch.setitem(vars(parts.domain), "trained_items", np.unique(parts.domain.histories[example.user]))
    for seed in range(8):
        row, _ = encode(example, np.random.default_rng(seed))
        assert tokenizer.decode(row.ids).endswith("Yes.</s>")


@pytest.mark.slow
def test_a_run_with_the_papers_file_reports_the_adapter_and_the_lm_without_it(
    settings: dict[str, Any], with_ratings: dict[str, Any]
) -> None:
    short = {
        "train_samples": 16,
        "lora_epochs": 1,
        "lora_batch_size": 8,
        "r": 4,
        "max_prompt_tokens": 500,
        "lora_eval_steps": None,
    }
    own = {
        key: settings[key] for key in ("checkpoint_dir", "show_progress", "llm_path", "candidates", "valid_users", "eval_args")
    }
    given = {**own, **short, "data_path": with_ratings["data_path"]}
    result = run_recbole_llm("TALLRec", "tiny", ["properties/tallrec/yes-no.yaml"], given)
    assert 0 <= result["test_result"]["hit@1"] <= 1 and list(result["variants"]) == ["no adapter"]


def test_the_adapter_is_named_by_the_answers_that_it_is_trained_on(
    settings: dict[str, Any], assemble: Callable[..., Any], with_ratings: dict[str, Any]
) -> None:
    def stage(**changes: Any) -> str:
        (stage,) = assemble("TALLRec", settings, **with_ratings | changes).trainer._stages
        return stage.fingerprint

    changes = [{}, {"train_on_inputs": False}, {"liked_above": 1}, {"liked_above": None}]
    assert len({stage(**changed) for changed in changes}) == 4
    assert stage(liked_above=2) == stage()  # the same items are liked


@pytest.mark.parametrize(
    "model, changes, message",
    [
        ("LoRACocktail", FORM, "tallrec_form: yes_no is a form of TALLRec alone"),
        (
            "TALLRec",
            {**FORM, "tallrec_form": "yes"},
            "tallrec_form: 'yes' in .* is not one of listwise, yes_no; did you mean 'yes_no'",
        ),
        ("TALLRec", {**FORM, "scorer": "label"}, "tallrec_form: yes_no needs scorer"),
        ("TALLRec", {**FORM, "prompt": "listwise"}, "unknown slots"),
        ("TALLRec", {**FORM, "liked_above": 3}, r"liked_above: 3 needs the column rating \(RATING_FIELD\), .*load_col"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], assemble: Callable[..., Any], model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(model, settings, **changes)
