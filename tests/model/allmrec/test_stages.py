"""A change trains the stages anew that depend on it and no others; settings of ALLMRec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.model.allmrec import LLM_ONLY, TEXT_ONLY
from recbole_llm.quick_start import run_recbole_llm
from tests.model.allmrec.conftest import LISTWISE, Made, copied, equal, run_stages

# -- stages ------------------------------------------------------------------------------------------------------------


EVERYTHING = {"cf-SASRec", "builtin-text-encoder", "alignment", "projection"}
BOTH = {"alignment", "projection"}


@pytest.fixture
def stages_run(settings: dict[str, Any], assemble: Any) -> Callable[..., set[str]]:
    """Names of the stages that a run with ``changes`` trains, of the four that it has."""

    def run(**changes: Any) -> set[str]:
        seconds = run_stages(assemble("ALLMRec", settings, **changes))
        assert len(seconds) == 4
        return {name for name, spent in seconds.items() if spent}

    return run


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_a_change_trains_what_it_touches_alone(
    stages_run: Any, data_path: Path, tmp_path: Path
) -> None:
    assert stages_run() == EVERYTHING and stages_run() == set()
    assert stages_run(alpha=0.1) == BOTH and stages_run(stage2_epochs=1) == {"projection"}
    retitled = copied(data_path, tmp_path / "retitled", item=lambda text: text.replace("The red wolf", "The red fox"))
    assert stages_run(data_path=str(retitled)) == EVERYTHING - {"cf-SASRec"}
    assert stages_run(alpha=0.1) == stages_run() == set()  # all of it is cached beside the other


@pytest.mark.slow
def test_every_setting_trains_the_stages_anew_that_depend_on_it_and_no_others(stages_run: Any) -> None:
    assert stages_run() == EVERYTHING
    for change in ({"logits": "mean"}, {"beta": 0.9}, {"joint_size": 8}, {"tune_text_encoder": False}, {"stage1_epochs": 1}):
        assert stages_run(**change) == BOTH, change
    for change in (
        {"item_vectors": "text"},
        {"cold_threshold": 9},
        {"valid_users": 9},
        {"stage2_learning_rate": 0.1},
        LISTWISE,
        {"max_history": 4},
        {"joint_embedding": False},
        {"normalize": "mean"},
        {"train_samples": 9},
    ):
        assert stages_run(**change) == {"projection"}, change
    assert stages_run(**LISTWISE, top_k_target=2) == {"projection"} and stages_run(top_k_target=2) == set()
    for change in ({"scorer": "naive"}, {"eval_batch_size": 7}, {"save_every_seconds": 3}, {"r": 8}, {"retriever_top": 5}):
        assert stages_run(**change) == set(), change
    assert stages_run(builtin_text_encoder={"dim": 8}) == EVERYTHING - {"cf-SASRec"}
    assert stages_run(cf_config={"hidden_size": 8}) == EVERYTHING - {"builtin-text-encoder"}
    assert stages_run(all_positions=True) == BOTH
    assert stages_run(seed=1) == EVERYTHING


def exchanged(data_path: Path, folder: Path, places: tuple[int, ...]) -> Path:
    """A copy of ``tiny`` in which the later users exchange their interactions at ``places`` (-1: the test item)."""

    def change(text: str) -> str:
        header, *lines = text.splitlines()
        rows = [line.split("\t") for line in lines]
        users = list(dict.fromkeys(row[0] for row in rows))
        of = {user: [row for row in rows if row[0] == user] for user in users}
        late, moved = users[30:], 0  # by then every item has its internal id
        for place in places:
            items = [of[user][place][1] for user in late]
            for user, item in zip(late, items[1:] + items[:1], strict=True):
                if item not in {row[1] for row in of[user]}:
                    of[user][place][1] = item
                    moved += 1
        assert moved > 15 * len(places)
        return "\n".join([header, *map("\t".join, rows)]) + "\n"

    return copied(data_path, folder, inter=change)


def results(made: Made) -> dict[str, dict[str, torch.Tensor]]:
    model = made.model
    stages = {"cf": model.cf.stage, "alignment": model.projection.alignment, "projection": model.projection_stage}
    folders = {name: made.trainer.cache.folder(stage) for name, stage in stages.items()}
    files = {name: [*folder.rglob("*.safetensors")] for name, folder in folders.items()}
    return {name: {f"{file.name}/{k}": t for file in found for k, t in load_file(file).items()} for name, found in files.items()}


@pytest.mark.parametrize(("places", "same"), [((-1,), ["cf", "alignment", "projection"]), ((-1, -2), ["cf", "alignment"])])
def test_held_out_items_touch_no_weight(
    settings: dict[str, Any], assemble: Any, data_path: Path, tmp_path: Path, places: tuple[int, ...], same: list[str]
) -> None:
    """Exchanged test items change no result of a stage; exchanged validation items nothing but what they choose."""
    found = []
    for path in (data_path, exchanged(data_path, tmp_path / "exchanged", places)):
        made = assemble("ALLMRec", settings, data_path=str(path), checkpoint_dir=str(tmp_path / path.name / "saved"))
        made.trainer.fit(made.train, made.valid)
        found.append((made, results(made)))
    (one, first), (other, second) = found
    assert one.model.parts.histories.item_ids == other.model.parts.histories.item_ids
    assert one.test.candidates.sha256 != other.test.candidates.sha256  # the labels did change
    assert (one.valid.candidates.sha256 == other.valid.candidates.sha256) == (places == (-1,))
    for name in same:
        assert first[name] and equal(first[name], second[name]), name


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "label"}, "scorer: label scores labels, but ALLMRec predicts titles; choose tree, prefix or naive"),
        ({"item_vectors": "joined"}, "item_vectors: 'joined' in .* is not one of joint, text, random; did you mean 'joint'"),
        ({"logits": "max"}, "logits: 'max' in config_dict is not one of sum, mean"),
        ({"soft_prompt": "nosuch"}, "prompt: nosuch is not a key of `prompts`"),
        ({"text_fields": ["nosuch"]}, "text_fields: there is no column 'nosuch' besides the title; the columns are year, genre"),
        ({"cf_model": "Pop"}, "cf_model: Pop has no vectors"),
        ({"cf_model": "Caser"}, "cf_model: Caser reads user, item_seq, not a history alone"),
        ({"cf_config": {"MAX_ITEM_LIST_LENGTH": 80}}, "MAX_ITEM_LIST_LENGTH: SASRec reads 80 .* to 50; .*_LENGTH=80"),
        ({"cf_config": {"item_inter_num_interval": "[9,inf)"}}, "cf_config: SASRec must be trained on the same items"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(
    settings: dict[str, Any], assemble: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble("ALLMRec", settings, **changes)
    assert not list(Path(settings["checkpoint_dir"]).glob("stages/*-*"))


def test_titles_are_encoded_with_the_columns_that_are_named(assemble: Any, shared_settings: dict[str, Any]) -> None:
    def sentence(**changes: Any) -> str:
        return assemble("ALLMRec", shared_settings, **changes).model.alignment.text.sentences[1]

    title, year, genre = sentence(text_fields=[]), sentence(text_fields=["year"]), sentence()
    assert year.startswith(f"{title}, 19") or year.startswith(f"{title}, 20")
    assert genre.startswith(year) and genre.endswith(" film")  # year_field and category_field are set


@pytest.mark.slow
@pytest.mark.parametrize("tune", [True, False])
def test_a_text_encoder_of_ones_own_is_taken_by_its_folder(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tune: bool
) -> None:
    first = assemble("ALLMRec", settings)
    run_stages(first)
    builtin = next(Path(settings["checkpoint_dir"]).glob("stages/builtin-text-encoder-*"))
    changes = {"text_encoder_path": str(builtin), "tune_text_encoder": tune, "checkpoint_dir": str(tmp_path / "other")}
    made = assemble("ALLMRec", settings, **changes)
    assert [*run_stages(made)] == ["cf-SASRec", "alignment", "projection"]
    assert equal(results(made)["alignment"], results(first)["alignment"]) == tune
    assert (tmp_path / "other" / "text_vectors").is_dir() == (not tune)
    less = assemble("ALLMRec", settings, **changes, text_fields=["year"])  # no builtin encoder depends on the texts here
    assert [name for name, seconds in run_stages(less).items() if seconds] == ["alignment", "projection"]


@pytest.mark.slow
def test_the_builtin_lm_and_the_published_prompt_work_end_to_end(settings: dict[str, Any]) -> None:
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 4000, "batch_tokens": 256, "vocab_size": 300}
    changes = {**LISTWISE, "llm_path": "builtin", "builtin_lm": small, "normalize": "pmi"}
    result = run_recbole_llm("ALLMRec", "tiny", config_dict={**settings, **changes})
    assert 0 <= result["test_result"]["hit@1"] <= 1 and list(result["variants"]) == ["SASRec", TEXT_ONLY, LLM_ONLY]


def test_the_precision_of_a_frozen_text_encoder_is_part_of_the_backbone(settings: dict[str, Any], assemble: Any) -> None:
    models = [assemble("ALLMRec", settings, tune_text_encoder=False).model for _ in range(2)]
    models[1].text._dtype = torch.bfloat16
    del models[1].text.fingerprint  # cached
    one, other = (model.facts().backbone_fingerprint for model in models)
    assert one != other
