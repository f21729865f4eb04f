"""The same users and the same candidates for every model, whatever the model and whatever it needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset
from recbole_llm.evaluation.protocol import candidate_set

MODELS = ["Pop", "BPR", "SASRec", "NeuMF", "TALLRec"]
Run = Callable[..., Any]


def candidates(settings: dict[str, Any], phase: str = "test", model: str = "Pop", **values: Any) -> Any:
    config = LLMConfig(model, "tiny", config_dict={**settings, **values})
    return candidate_set(config, create_dataset(config), phase)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "candidates").glob("*.candidates"))


def test_every_model_is_asked_the_same(run: Run) -> None:
    """NeuMF has no ``full_sort_predict`` and is asked item by item."""
    records = [run(model)[1] for model in MODELS]
    assert len({record["candidates_sha256"]["test"] for record in records}) == 1
    assert len({record["candidates_sha256"]["valid"] for record in records}) == 1
    assert len({tuple(sorted(record["ranks"][record["model"]])) for record in records}) == 1
    assert records[0]["candidates_sha256"]["valid"] != records[0]["candidates_sha256"]["test"]


def test_a_subset_of_users_is_the_same_for_every_model(run: Run) -> None:
    """Small batches, so that some hold no user of the subset."""
    subsets = []
    for model in MODELS:
        record = run(model, eval_users=7, eval_batch_size=82)[1]
        subsets.append(tuple(sorted(record["ranks"][model])))
    assert len(set(subsets)) == 1 and len(subsets[0]) == 7
    whole = run("BPR")[1]["ranks"]["BPR"]
    subset = run("BPR", eval_users=7, eval_batch_size=82)[1]["ranks"]["BPR"]
    assert {user: whole[user] for user in subset} == subset


def test_neither_seed_nor_model_nor_batch_size_changes_them(settings: dict[str, Any], tmp_path: Path) -> None:
    shas = {
        candidates(settings, checkpoint_dir=str(tmp_path / str(number)), **values).sha256
        for number, values in enumerate(
            [{}, {"seed": 1}, {"model": "SASRec"}, {"train_batch_size": 7}, {"eval_batch_size": 7}, {"worker": 2}]
        )
    }
    assert len(shas) == 1
    assert candidates(settings, candidates={"num_negatives": 9, "seed": 1}).sha256 not in shas


def test_candidates_hold_the_target_and_nothing_known(settings: dict[str, Any]) -> None:
    config = LLMConfig("Pop", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    for phase in ("valid", "test"):
        found = candidate_set(config, dataset, phase)
        assert found.items.shape == (60, 10)
        for user, target, row in zip(found.users.tolist(), found.targets.tolist(), found.items.tolist(), strict=True):
            assert target in row and len(set(row)) == 10
            assert target == dataset.histories.target(user, phase)
            assert not set(row) - {target} & set(dataset.histories.before(user, phase).tolist())


def test_validation_does_not_know_the_test_items(settings: dict[str, Any], data_path: Path, tmp_path: Path) -> None:
    """With the test items of all users dealt out anew, the validation candidates are the same bytes."""
    header, *rows = [line.split("\t") for line in (data_path / "tiny" / "tiny.inter").read_text().splitlines()]
    last = {user: place for place, (user, _, _) in enumerate(rows)}  # the file is in time order within a user
    places = list(last.values())
    dealt = np.random.default_rng(3).permutation(places)
    items = {place: rows[other][1] for place, other in zip(places, dealt, strict=True)}
    changed = [[user, items.get(place, item), time] for place, (user, item, time) in enumerate(rows)]
    assert changed != rows
    folder = tmp_path / "shuffled" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.inter").write_text("\n".join("\t".join(row) for row in [header, *changed]) + "\n")
    (folder / "tiny.item").write_text((data_path / "tiny" / "tiny.item").read_text())

    other = {**settings, "data_path": str(folder.parent), "checkpoint_dir": str(tmp_path / "other")}
    for source in ("uniform", "popularity"):
        for phase in ("valid", "test"):
            shas = [candidates(s, phase, candidates={"num_negatives": 9, "source": source}).sha256 for s in (settings, other)]
            assert (shas[0] == shas[1]) == (phase == "valid")


def test_popularity_prefers_popular_items(settings: dict[str, Any]) -> None:
    config = LLMConfig("Pop", "tiny", config_dict=settings)
    histories = create_dataset(config).histories
    counts = np.bincount(np.concatenate([histories.train(user) for user in range(1, 61)]), minlength=41)

    def popularity(source: str) -> float:
        found = candidates(settings, candidates={"num_negatives": 3, "source": source})
        others = found.items[found.items != found.targets[:, None]]
        return float(counts[others].mean())

    assert popularity("popularity") > popularity("uniform")  # the same draws, were the weights not read


def test_candidates_from_files(settings: dict[str, Any], tmp_path: Path) -> None:
    for phase in ("valid", "test"):
        candidates(settings, phase)
    own = {phase: str(file) for phase, file in zip(("test", "valid"), files(tmp_path / "saved"), strict=True)}
    source = {"source": "file", "file": own}
    found = candidates({**settings, "candidates": source})
    assert torch.equal(found.items, candidates(settings).items) and found.sha256 == candidates(settings).sha256

    lines = Path(own["test"]).read_text().splitlines(keepends=True)
    Path(own["test"]).write_text("".join(lines[:11]))  # ten users: only they are evaluated
    assert len(candidates({**settings, "candidates": source}).users) == 10

    with pytest.raises(ValueError, match=r"needs file: \{'valid': PATH, 'test': PATH\}, not None"):
        candidates({**settings, "candidates": {"source": "file"}})
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere"):
        candidates({**settings, "candidates": {"source": "file", "file": {"test": "nowhere"}}})
    swapped = {"source": "file", "file": {"test": own["valid"]}}
    with pytest.raises(ValueError, match="is the file of another split"):
        candidates({**settings, "candidates": swapped})


def test_unknown_source(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="source 'bm25' is unknown; choose uniform, popularity.* or file"):
        candidates({**settings, "candidates": {"source": "bm25"}})


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("\ti1", "\tx1", 1)])
def test_a_damaged_file_is_named_and_drawn_anew(
    damage: Callable[[str], str], settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = candidates(settings)
    (file,) = files(tmp_path / "saved")
    content = file.read_text()
    file.write_text(damage(content))
    assert candidates(settings).sha256 == whole.sha256
    assert file.read_text() == content
    assert re.search(rf"{re.escape(file.name)} is drawn anew: .*line \d+", caplog.text)


def test_a_dataset_without_four_interactions_a_user(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    rows = [f"u{user}\ti{user + step}\t{step}" for user in range(9) for step in range(3)]
    (folder / "tiny.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    with pytest.raises(ValueError, match="no user of tiny has the four interactions"):
        candidates({**settings, "data_path": str(folder.parent)})
