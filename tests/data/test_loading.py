"""The batches of an evaluation: bounded by users times items, which RecBole counts for general models alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader

from recbole_llm.data import loading

FULL, CANDIDATES = {"mode": "full"}, {"mode": "candidates"}


@pytest.mark.parametrize(
    ("model", "mode", "given", "expected"),
    [
        ("BPR", CANDIDATES, 4096, [60]),  # RecBole: 4096 // 41 = 99 users; of 40,000 items, one
        ("BPR", FULL, 1, [60]),
        ("BPR", FULL, 820, [20] * 3),
        ("BPR", CANDIDATES, 820, [30] * 2),
        ("SASRec", FULL, 4096, [24, 24, 12]),
        ("SASRec", FULL, 10, [10] * 6),
        ("SASRec", CANDIDATES, 40, [40, 20]),  # one score for each candidate
    ],
)
def test_users_of_an_evaluation_batch(
    model: str, mode: Any, given: int, expected: list[int], settings: Any, assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SCORES", 1000)  # of 41 items, 24 users
    if given == 820:
        monkeypatch.setattr(loading, "PAIRS", 1)
        monkeypatch.setattr(loading, "USERS", 30)
    made = assemble(model, settings, eval_args=mode, eval_batch_size=given)
    assert [len(batch[0]) for batch in made.test] == expected
    assert made.config["eval_batch_size"] == given


def test_random_has_an_order_for_each_batch_and_so_keeps_its_batches(settings: Any, assemble: Any) -> None:
    made = assemble("Random", settings, eval_args=FULL, eval_batch_size=82)
    assert {len(batch[0]) for batch in made.test} == {2}


@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.5, 0.2, 0.3]}])
def test_the_users_and_targets_of_recboles_loader(split: Any, settings: Any, assemble: Any, monkeypatch: Any) -> None:
    """With one target for each user, and with several."""
    monkeypatch.setattr(loading, "PAIRS", 1)
    given = {"eval_args": {**FULL, "split": split, "order": "RO" if "RS" in split else "TO"}, "eval_batch_size": 300}
    made = assemble("BPR", settings, **given)
    for own in (made.valid, made.test):
        theirs = FullSortEvalDataLoader(own.config, own._dataset, own._sampler)
        assert len(own) == len(theirs) > 5
        users = own.uid_list.tolist()
        for one, two in zip(own.uid2history_item[users], theirs.uid2history_item[users], strict=True):
            assert sorted(one.tolist()) == sorted(two.tolist())
        for (users, history, *targets), (expected, _, *others) in zip(own, theirs, strict=True):
            assert history is None and set(users.interaction) == set(expected.interaction)
            assert all(torch.equal(users[key], expected[key]) for key in expected.interaction)
            pairs, wanted = (sorted(zip(*(part.tolist() for part in found), strict=True)) for found in (targets, others))
            assert pairs == wanted


def test_a_transform_without_its_setting_or_without_effect(
    settings: Any, assemble: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"transform: crop_itemseq reads eta, .* SASRec has no default; give it, such as --eta="):
        assemble("SASRec", {**settings, "train_mode": "prefix"}, transform="crop_itemseq")
    caplog.clear()
    assemble("SASRec", {**settings, "train_mode": "prefix"}, transform="crop_itemseq", eta=0.6)
    assert "transform: crop_itemseq changes nothing: it adds columns (CROP_ITEM_SEQ) that SASRec does not read" in caplog.text
    with pytest.raises(ValueError, match="transform: user_defined is a class of RecBole that does nothing"):
        assemble("SASRec", {**settings, "train_mode": "prefix"}, transform="user_defined")
    with pytest.raises(ValueError, match="mask_ratio: 0.2 of MAX_ITEM_LIST_LENGTH: 4 masks no item"):
        assemble("BERT4Rec", settings, MAX_ITEM_LIST_LENGTH=4)
    caplog.clear()
    assemble("BERT4Rec", settings)
    assemble("SHAN", settings)
    assert "transform" not in caplog.text
