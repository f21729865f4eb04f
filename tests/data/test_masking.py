"""What is known before a target, in every form of split; and when nothing is masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.utils import ModelType

from recbole_llm.data.histories import Histories
from recbole_llm.data.masking import KnownItems, Masking

FULL = {"mode": "full"}
RATIO = {**FULL, "split": {"RS": [0.5, 0.2, 0.3]}}
Assemble = Callable[..., SimpleNamespace]


def known(loader: Any) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    """(user, targets) -> masked items, sorted, for each row of a loader."""
    found = {}
    for interaction, _, rows, items in loader:
        history = loader._dataset.known_items.of(interaction["user_id"], rows, items)
        for row, user in enumerate(interaction["user_id"].tolist()):
            masked = sorted(history[1][history[0] == row].tolist())
            assert len({*masked}) == len(masked)
            found[user, tuple(sorted(items[rows == row].tolist()))] = masked
    return found


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_of_leave_one_out_the_whole_history_is_known_and_no_later_item(
    model: str, settings: dict[str, Any], assemble: Assemble
) -> None:
    made = assemble(model, settings, eval_args=FULL, MAX_ITEM_LIST_LENGTH=2)
    histories = made.test._dataset.histories
    for phase, loader in (("valid", made.valid), ("test", made.test)):
        expected = {
            (user, (histories.target(user, phase),)): sorted(histories.before(user, phase).tolist())
            for user in histories.evaluated(phase).tolist()
        }
        assert known(loader) == expected and len(expected) == 60


def test_of_a_ratio_split_a_row_of_a_sequential_model_knows_all_before_its_target(
    settings: dict[str, Any], assemble: Assemble
) -> None:
    """Such a model has a row for each of a user's targets, any other model one for all of them."""
    made = assemble("SASRec", settings, eval_args=RATIO, MAX_ITEM_LIST_LENGTH=2)
    rows = known(made.test)
    order = _orders(settings)
    assert max(len([1 for user, _ in rows if user == other]) for other, _ in rows) > 1
    ids = made.test._dataset.field2id_token
    for (user, (target,)), masked in rows.items():
        history = order[ids["user_id"][user]]
        token = ids["item_id"][target]
        assert {*ids["item_id"][masked]} == {*history[: history.index(token)]}
    general = assemble("BPR", settings, eval_args=RATIO)
    whole = known(general.test)
    assert {user for user, _ in whole} == {user for user, _ in rows} and len(whole) < len(rows)
    theirs = FullSortEvalDataLoader(general.test.config, general.test._dataset, general.test._sampler)
    for interaction, (u, i), rows_, items_ in theirs:  # as RecBole has it
        ours = general.test._dataset.known_items.of(interaction["user_id"], rows_, items_)
        assert sorted(zip(u.tolist(), i.tolist(), strict=True)) == sorted(zip(*map(torch.Tensor.tolist, ours), strict=True))


def _orders(settings: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    rows = [line.split("\t") for line in (Path(settings["data_path"]) / "tiny" / "tiny.inter").read_text().splitlines()[1:]]
    for user, item, _ in sorted(rows, key=lambda row: float(row[2])):
        found.setdefault(user, []).append(item)
    return found


def test_a_random_split_knows_what_recbole_knows(settings: dict[str, Any], assemble: Assemble) -> None:
    made = assemble("BPR", settings, eval_args={**RATIO, "order": "RO"})
    for loader in (made.valid, made.test):
        for interaction, (u, i), rows, items in FullSortEvalDataLoader(loader.config, loader._dataset, loader._sampler):
            ours = loader._dataset.known_items.of(interaction["user_id"], rows, items)
            assert sorted(zip(u.tolist(), i.tolist(), strict=True)) == sorted(zip(*map(torch.Tensor.tolist, ours), strict=True))


@pytest.mark.parametrize("values", [{"new_items": 0.2}, {"cold_users": 0.3}, {"train_users": 20}])
@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_of_a_scenario_no_later_item_is_known(
    model: str, values: dict[str, Any], settings: dict[str, Any], assemble: Assemble
) -> None:
    """Users who are validated and not tested have a last item all the same."""
    made = assemble(model, settings, eval_args=FULL, **values)
    histories = made.test._dataset.histories
    for phase, loader in (("valid", made.valid), ("test", made.test)):
        found = known(loader)
        assert {user for user, _ in found} == {*histories.evaluated(phase).tolist()}
        for (user, targets), masked in found.items():
            assert targets == (histories.target(user, phase),) and masked == sorted(histories.before(user, phase).tolist())


def test_users_with_few_interactions_are_evaluated_by_no_model(
    tmp_path: Path, settings: dict[str, Any], assemble: Assemble
) -> None:
    """RecBole would test general models on users with two interactions, and sequential ones on users with three."""
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, number in enumerate([1, 2, 3, 4, 5, 5]):
        lines += [f"u{user}\ti{user + item}\t{item}" for item in range(number)]
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "few.inter").write_text("\n".join(lines) + "\n")
    for model in ("BPR", "SASRec"):
        made = assemble(model, {**settings, "data_path": str(tmp_path)}, "few", eval_args=FULL)
        for loader in (made.valid, made.test):
            users = [user for batch in loader for user in batch[0]["user_id"].tolist()]
            assert sorted(loader._dataset.field2id_token["user_id"][users]) == ["u3", "u4", "u5"]


# -- the rule ------------------------------------------------------------------------------------------------------------


def test_who_is_masked() -> None:
    sequential, general = ModelType.SEQUENTIAL, ModelType.GENERAL
    everyone, recboles = (Masking.of({"mask_history": value}, repeats_kept=False) for value in (True, False))
    nobody = Masking.of({"mask_history": True}, repeats_kept=True)
    assert [rule.masks(sequential) for rule in (everyone, recboles, nobody)] == [True, False, False]
    assert [rule.masks(general) for rule in (everyone, recboles, nobody)] == [True, True, False]
    assert [str(rule) for rule in (everyone, recboles, nobody)] == [
        "history masked",
        "history masked for general models alone: mask_history: False",
        "history not masked: repeated interactions are kept (rm_dup_inter)",
    ]


@pytest.fixture
def repeated(tmp_path: Path, data_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for the data with every interaction twice."""
    (tmp_path / "twice" / "tiny").mkdir(parents=True)
    header, *rows = (data_path / "tiny" / "tiny.inter").read_text().splitlines()
    (tmp_path / "twice" / "tiny" / "tiny.inter").write_text("\n".join([header, *np.repeat(rows, 2)]) + "\n")
    (tmp_path / "twice" / "tiny" / "tiny.item").write_text((data_path / "tiny" / "tiny.item").read_text())
    return {**settings, "data_path": str(tmp_path / "twice"), "rm_dup_inter": None, "eval_args": FULL}


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_with_repeats_kept_nothing_is_masked_for_anybody(model: str, repeated: dict[str, Any], assemble: Assemble) -> None:
    made = assemble(model, repeated)
    assert made.test._dataset.known_items is None
    made.trainer.evaluate(made.test, load_best_model=False)
    assert len(made.trainer.ranks.users) == 60
    with pytest.raises(ValueError, match=r"mask_history: True, but users of tiny choose items again .*rm_dup_inter: first"):
        assemble(model, repeated, mask_history=True)
    assert assemble(model, repeated, mask_history=True, rm_dup_inter="first").test._dataset.known_items is not None


def test_nothing_is_computed_where_nothing_is_ranked_in_full(settings: dict[str, Any], assemble: Assemble) -> None:
    made = assemble("SASRec", settings)
    assert made.valid._dataset.known_items is None and made.test._dataset.known_items is None


def test_a_history_ends_before_the_first_target_of_its_row() -> None:
    histories = Histories(["", "a", "b"], [""] * 9, [np.array([], dtype=np.int64), np.array([3, 1, 2]), np.array([8, 5, 4, 1])])
    rows, items = KnownItems(histories).of(
        torch.tensor([2, 1, 2, 1]), torch.tensor([2, 0, 0, 1, 3]), torch.tensor([5, 1, 4, 2, 3])
    )
    assert (rows.tolist(), items.tolist()) == ([0, 0, 1, 1, 2], [8, 5, 3, 1, 8])
    assert [part.tolist() for part in KnownItems(histories).of(torch.tensor([1]), torch.tensor([0]), torch.tensor([3]))] == [
        [],
        [],
    ]
