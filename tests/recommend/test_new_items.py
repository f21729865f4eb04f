"""Items that are not in the catalogue are ranked by their titles: as an item of the catalogue with the same text, and no ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.model.shortcut import TIE_BREAK
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommend.recommender import RunRecommender, load

USER, OTHERS = "u1", ["i30", "i31", "i32", "i33"]


def loaded(name: str, settings: dict[str, Any], **changes: Any) -> RunRecommender:
    return load(Path(run_recbole_llm(name, "tiny", config_dict={**settings, **changes})["record"]))


@pytest.fixture(scope="module")
def tallrec(module_settings: dict[str, Any]) -> RunRecommender:
    return loaded("TALLRec", module_settings, shuffled_title_control=True)


def scores(recommender: RunRecommender, new: str, row: str | None = None) -> dict[str, float]:
    """Scores by item id, and that of the new item by ""."""
    table = recommender.recommend(users=[USER], candidates=[*OTHERS, f"new:{new}"], seen=True, row=row)
    assert sorted(table["item"]) == ["", *OTHERS] and table["rank"].tolist() == [1, 2, 3, 4, 5]
    assert table.set_index("item")["title"][""] == new
    return table.set_index("item")["score"].to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "rows"),
    [
        ("TALLRec", {"normalize": "pmi"}, [None]),
        ("TALLRec", {"tallrec_form": "yes_no", "lora_train_mode": "prefix", "prompt": "tallrec_yes_no"}, [None]),
        ("LoRACocktail", {}, [None, "ingredient"]),
        ("LlamaRec", {"lora_train_mode": "prefix"}, [None]),
        ("ALLMRec", {"soft_prompt": "allmrec", "text_fields": []}, ["text vectors", "LLM only"]),
    ],
)
def test_every_ranker_reads_the_title(name: str, changes: dict[str, Any], rows: list[Any], settings: dict[str, Any]) -> None:
    reads_the_title(loaded(name, settings, **changes), rows, listed=name in ("LlamaRec", "ALLMRec"))


def test_a_ranker_reads_the_title(tallrec: RunRecommender) -> None:
    reads_the_title(tallrec, [None, "no adapter"], listed=False)


def reads_the_title(recommender: RunRecommender, rows: list[Any], *, listed: bool) -> None:
    """A prompt that is ``listed`` shows the candidates, so where one stands matters."""
    same = recommender.titles.names[recommender.titles.find("i30")]
    for row in rows:
        own, other = scores(recommender, same, row), scores(recommender, "zebra zebra", row)
        assert listed or own[""] == pytest.approx(own["i30"], abs=1e-4)
        assert other[""] != pytest.approx(own[""], abs=1e-4)
        assert listed or other["i30"] == pytest.approx(own["i30"], abs=1e-4)


@pytest.mark.slow
def test_soft_tokens_of_a_new_item_are_those_of_its_text(settings: dict[str, Any]) -> None:
    recommender = loaded("ALLMRec", settings, soft_prompt="allmrec", text_fields=[])
    model, cache = recommender.run.parts.model, recommender.run.parts.trainer.cache
    soft = model.soft.with_text_vectors()
    longer = model.soft_tokens_of(recommender.run.dataset.item_texts.titles[1:3], soft, cache)
    torch.testing.assert_close(longer._codes[-2:], soft._codes[1:3])
    assert longer.user_key(0) == soft.user_key(0) + 2


@pytest.mark.slow
def test_laser_encodes_it_as_a_cold_item(settings: dict[str, Any]) -> None:
    recommender = loaded("Laser", settings, cf_states="none", warmup_epochs=0)
    text = recommender.run.parts.model.texts[recommender.titles.find("i30")]
    found = scores(recommender, text)
    assert found[""] == pytest.approx(found["i30"], abs=1e-5) and scores(recommender, "zebra")[""] != found[""]


@pytest.mark.slow
def test_alpharec_projects_it_as_an_item_without_neighbours(settings: dict[str, Any]) -> None:
    recommender = loaded("AlphaRec", settings, eval_args={"mode": "full"})
    model = recommender.run.parts.model
    text = model.text.sentences[recommender.titles.find("i30")]
    model.convolution, model.restore_user_e = torch.zeros_like, None  # nobody has neighbours
    found = scores(recommender, text)
    assert found[""] == pytest.approx(found["i30"], abs=1e-5) and scores(recommender, "zebra")[""] != found[""]


@pytest.mark.slow
def test_nearest_texts_compares_the_title(settings: dict[str, Any]) -> None:
    recommender = loaded("NearestTexts", settings)
    model, item = recommender.run.parts.model, recommender.titles.find("i30")
    found = scores(recommender, model.text.sentences[item])
    assert found[""] == pytest.approx(found["i30"] - TIE_BREAK * float(model.popularity[item]), abs=1e-5)


def test_unknown_titles_are_new_and_named(tallrec: RunRecommender, caplog: pytest.LogCaptureFixture) -> None:
    table = tallrec.recommend(users=[USER], candidates=["i30", "The red rivr", "new: Another one"], seen=True)
    assert {*table["title"]} == {tallrec.titles.names[tallrec.titles.find("i30")], "The red rivr", "Another one"}
    named = "are ranked by their titles alone: 'The red rivr' (nearest title: The red river"
    assert f"2 are not in the catalogue and {named}" in caplog.text
    for given, message in (
        (["new:A", "new: A"], r"listed twice, as 'new:A' and 'new: A' \(A\)"),
        (["id:zzz"], "no item has the id 'zzz'"),
    ):
        with pytest.raises(ValueError, match=message):
            tallrec.recommend(users=[USER], candidates=given)
    with pytest.raises(ValueError, match="shuffled titles cannot score an item by its title alone"):
        tallrec.recommend(users=[USER], candidates=["new:A"], row="shuffled titles")
