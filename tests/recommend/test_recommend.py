"""What a finished run recommends is what its record says, for every kind of model, and from its own data and weights alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import recbole_llm
from recbole_llm import cli, registry
from recbole_llm.data.candidate_files import read_candidates
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommend import output
from recbole_llm.recommend.index import EXACT
from recbole_llm.recommend.recommender import RunRecommender, load
from recbole_llm.recommend.request import Request
from tests.conftest import write_rows

DRAWN = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
FULL: dict[str, Any] = {"eval_args": {"mode": "full"}}
RERANKED: dict[str, Any] = {
    "eval_args": {"mode": {"valid": "candidates", "test": "full"}},
    "retriever_top": 5,
    "retriever_config": {"epochs": 1},
}


def trained(name: str, settings: dict[str, Any], **changes: Any) -> tuple[Path, dict[str, Any]]:
    path = Path(run_recbole_llm(name, "tiny", config_dict={**settings, **changes})["record"])
    return path, json.loads(path.read_text())


@pytest.fixture(scope="module")
def sasrec(module_settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    return trained("SASRec", module_settings, **FULL)


@pytest.fixture(scope="module")
def recommender(sasrec: tuple[Path, dict[str, Any]]) -> RunRecommender:
    return recbole_llm.load(sasrec[0].parent)


@pytest.fixture(scope="module")
def last_items(data_path: Path) -> dict[str, list[str]]:
    lines = pd.read_csv(data_path / "tiny" / "tiny.inter", sep="\t").sort_values("timestamp:float", kind="stable")
    return lines.groupby("user_id:token")["item_id:token"].apply(list).to_dict()


@pytest.mark.parametrize(
    ("name", "changes", "indexed"),
    [
        ("BPR", FULL, True),
        ("SASRec", FULL, True),
        ("Pop", FULL, False),  # equal scores
        ("SASRec", {**FULL, "mask_history": False}, True),  # items of the history are ranked, too
        ("TALLRec", RERANKED, True),  # its retriever
        pytest.param("BERT4Rec", FULL, True, marks=pytest.mark.slow),  # with biases of the items
        pytest.param("GRU4Rec", FULL, True, marks=pytest.mark.slow),
        pytest.param("LightGCN", FULL, True, marks=pytest.mark.slow),
        pytest.param("FPMC", FULL, False, marks=pytest.mark.slow),  # two products
        pytest.param("NeuMF", FULL, False, marks=pytest.mark.slow),  # scores item by item
        pytest.param("FM", {**FULL, "train_neg_sample_args": DRAWN}, False, marks=pytest.mark.slow),  # with the items' columns
        pytest.param("EASE", FULL, False, marks=pytest.mark.slow),
        pytest.param("ItemKNN", FULL, False, marks=pytest.mark.slow),
        pytest.param("RecentPop", FULL, False, marks=pytest.mark.slow),
        pytest.param("NearestTitles", FULL, False, marks=pytest.mark.slow),
        pytest.param("NearestTexts", FULL, False, marks=pytest.mark.slow),
        pytest.param("AlphaRec", FULL, True, marks=pytest.mark.slow),
        pytest.param("Laser", FULL, True, marks=pytest.mark.slow),
        pytest.param("LoRACocktail", RERANKED, True, marks=pytest.mark.slow),
        pytest.param("WeaveRec", RERANKED, True, marks=pytest.mark.slow),
        pytest.param("LlamaRec", {**RERANKED, "lora_train_mode": "prefix"}, True, marks=pytest.mark.slow),
        pytest.param("ALLMRec", RERANKED, True, marks=pytest.mark.slow),
        pytest.param("Cascade", {**RERANKED, "llm_ranker": "TALLRec", "routing_users": 20}, True, marks=pytest.mark.slow),
    ],
)
def test_the_target_stands_where_the_record_says(
    name: str, changes: dict[str, Any], indexed: bool, settings: dict[str, Any], last_items: dict[str, list[str]]
) -> None:
    """By faiss where the model scores by products, by all scores, and by an index that finds all items."""
    path, record = trained(name, settings, **changes)
    ranks = record["ranks"][name]
    recommender = load(path)
    assert (recommender.index() is not None) == indexed
    ways = [{}, {"index": "IVF2,Flat"}] if indexed else [{}]
    tables = [recommender.recommend(users=[*ranks], k=5, until="test", **way) for way in ways]
    recommender._indexes[None, EXACT] = None  # scores the catalogue
    tables.append(recommender.recommend(users=[*ranks], k=5, until="test"))
    for table in tables:
        found = table.set_index(["user", "item"])["rank"]
        for user, rank in ranks.items():
            assert found.get((user, last_items[user][-1])) == (rank if rank is not None and rank <= 5 else None), user


@pytest.mark.slow
def test_given_items_are_ranked_as_the_candidates_of_the_run(settings: dict[str, Any], last_items: dict[str, list[str]]) -> None:
    path, record = trained("TALLRec", settings)
    recommender = load(path, retriever=False)
    assert not [*path.parent.parent.parent.glob("stages/cf-*")]  # evaluated on candidates: no retriever is trained for this
    with pytest.raises(ValueError, match="retriever=False, for given items alone; give candidates"):
        recommender.recommend(users=recommender.users[:1])
    users, items = recommender.run.dataset.tokens
    drawn = read_candidates(next((path.parent.parent.parent / "candidates").glob("tiny.test*")), users, items)
    for user, listed in list(zip(drawn.users.tolist(), drawn.items.tolist(), strict=True))[:4]:
        given = [items[item] for item in listed]
        found = recommender.recommend(users=[users[user]], candidates=given, k=10, until="test")
        assert found.set_index("item")["rank"][last_items[users[user]][-1]] == record["ranks"]["TALLRec"][users[user]]


def test_now_is_one_item_after_the_test(recommender: RunRecommender, last_items: dict[str, list[str]]) -> None:
    """A user's own history, given as a history of anybody, has the same recommendations."""
    users = recommender.users[:8]
    now = recommender.recommend(users=users, k=4)
    again = recommender.recommend([last_items[user] for user in users], k=4)
    assert now["item"].tolist() == again["item"].tolist()
    assert now["score"].tolist() == pytest.approx(again["score"].tolist(), abs=1e-5)
    assert again["user"].unique().tolist() == [f"history {number}" for number in range(1, 9)]
    for user, items in now.groupby("user")["item"]:
        assert not {*items} & {*last_items[user]}
    assert now.groupby("user")["rank"].apply(list).map(lambda ranks: ranks == [1, 2, 3, 4]).all()


def test_seen_items_are_recommended_if_asked_for(recommender: RunRecommender, last_items: dict[str, list[str]]) -> None:
    user = recommender.users[0]
    assert {*recommender.recommend(users=[user], k=40, seen=True)["item"]} >= {*last_items[user]}


def test_one_batch_or_many(recommender: RunRecommender, monkeypatch: pytest.MonkeyPatch) -> None:
    users = recommender.users
    whole = recommender.recommend(users=users, k=3)
    monkeypatch.setattr("recbole_llm.recommend.recommender.USERS", 7)
    parts = recommender.recommend(users=users, k=3)
    assert parts["item"].tolist() == whole["item"].tolist() and len(whole) == 3 * len(users)


def test_items_by_title(recommender: RunRecommender) -> None:
    titles = recommender.titles
    assert titles.find("the RED  river") == titles.find("i0") == titles.find("title:The red river") == titles.find("id:i0")
    assert titles.find("The red river (1980)") == titles.find("i0")
    with pytest.raises(ValueError, match=r"no item has the title or the id 'The red rivr'; nearest titles: The red river"):
        titles.find("The red rivr")
    with pytest.raises(ValueError, match="no item has the id 'The red river'"):
        titles.find("id:The red river")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"users": ["nobody"]}, "no such user"),
        ({"users": ["u1"], "k": 0}, "--top=0"),
        ({"users": ["u1"], "until": "later"}, "--until=later: give now, test, valid"),
        ({"users": ["u1"], "row": "merged"}, "the run has no such row; it has: SASRec"),
        ({"histories": [[]]}, "history 1: the history is empty"),
        ({"histories": [["i1"], ["i1", "zzz"]]}, "history 2: no item has the title or the id 'zzz'"),
        ({"users": ["u1"], "candidates": ["i1", "id:i1"]}, r"an item is listed twice, as 'i1' and 'id:i1' \("),
        ({"users": ["u1"], "candidates": ["i1", "id:zzz"]}, "candidates: no item has the id 'zzz'"),
        ({"users": ["u1"], "candidates": ["i1", "zzz"]}, r"candidates: .*'zzz'.*SASRec cannot score an item by its title alone"),
        ({"users": ["u1"], "index": "IVF99,Flat"}, "--index=IVF99,Flat: faiss cannot make this index of 40 vectors"),
        ({"users": ["u1"], "candidates": ["i1"], "index": "HNSW8"}, "--index=HNSW8: given items are scored one by one"),
        ({"users": ["u1"], "index": "Tree"}, r"--index=Tree: faiss .* width \d+ \(could not parse index string Tree\)"),
    ],
)
def test_what_cannot_be_answered(recommender: RunRecommender, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommender.recommend(**call)


@pytest.mark.parametrize(
    ("items", "fault"),
    [
        ([f"new:{'red wolf ' * 9}{item}" for item in range(10)], "max_prompt_tokens: 300 is too small"),
        ([f"i{item}" for item in range(39)], "39 candidates are more than the 10 labels"),
    ],
)
def test_more_candidates_than_a_prompt_can_list(items: list[str], fault: str, module_settings: dict[str, Any]) -> None:
    """The remedy is one of the command, which takes no settings of prompts."""
    path, _ = trained("LlamaRec", module_settings, lora_train_mode="prefix", max_prompt_tokens=300)
    recommender = load(path, retriever=False)
    with pytest.raises(ValueError, match=rf"^candidates: .* cannot list so many \(.*{fault}.*\); give fewer of them$"):
        recommender.recommend(users=["u1"], candidates=items, seen=True)
    assert len(recommender.recommend(users=["u1"], candidates=items[:3], seen=True)) == 3


@pytest.mark.parametrize("name", ["BPR", "SASRec"])
def test_an_index_where_one_user_is_evaluated(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The others have too few items for a test."""
    pairs = [(user, step) for user in range(12) for step in range(9 if user == 3 else 3)]
    rows = [(f"u{user}", f"i{(5 * user + step) % 30}", float(step)) for user, step in pairs]
    data = write_rows(tmp_path / "data", "one", rows)
    own = {**settings, **FULL, "data_path": str(data)}
    recommender = load(run_recbole_llm(name, "one", config_dict=own)["record"])
    index = recommender.index("IVF2,Flat")
    assert index is not None and index.recall >= 0.95 and recommender.index() is not None
    assert len(recommender.recommend(users=["u3", "u1"], k=3, index="IVF2,Flat")) == 6


def test_users_known_by_id_alone(settings: dict[str, Any]) -> None:
    path, _ = trained("BPR", settings)
    with pytest.raises(ValueError, match="BPR knows the users of the dataset by their ids"):
        load(path).recommend([["i1"]])
    path, _ = trained("FPMC", settings)
    with pytest.raises(ValueError, match=r"FPMC has learnt a vector for each user of the dataset.*give --user"):
        load(path).recommend([["i1"]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("TALLRec", {**RERANKED, "retriever": "BPR"}), ("ALLMRec", {**RERANKED, "cf_model": "BPR", "cf_config": {"epochs": 1}})],
)
def test_parts_that_know_users_by_id_alone(name: str, changes: dict[str, Any], settings: dict[str, Any]) -> None:
    """Such a part would give somebody else the vector of the padding user, without an error."""
    path, record = trained(name, settings, **changes)
    recommender = load(path)
    assert len(recommender.recommend(users=[next(iter(record["ranks"][name]))], k=3)) == 3
    with pytest.raises(ValueError, match=f"BPR, a part of {name}, has learnt a vector for each user"):
        recommender.recommend([["i1", "i2"]])


def test_a_model_of_the_user_is_imported_only_if_it_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from recbole.model.sequential_recommender.sasrec import SASRec\n\n\nclass Mine(SASRec):\n    pass\n"
    (tmp_path / "mine_recommended.py").write_text(code + "\n\nclass Other(SASRec):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_own", {})
    sizes = {"n_layers": 1, "n_heads": 1, "hidden_size": 8, "inner_size": 8, "hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1}
    sizes |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE"}
    path, record = trained("mine_recommended:Mine", {**settings, **sizes}, **FULL)
    registry._own.clear()
    monkeypatch.delitem(sys.modules, "mine_recommended")
    with pytest.raises(ValueError, match=r"is of the model Mine, which is neither .* name its code, --model=MODULE:Mine"):
        load(path)
    assert "mine_recommended" not in sys.modules
    with pytest.raises(ValueError, match=r"--model=mine_recommended:Other: the run .* is of the model Mine, not of Other"):
        load(path, model="mine_recommended:Other")
    recommender = load(path, model="mine_recommended:Mine")
    assert recommender.index() is not None
    user = next(iter(record["ranks"]["Mine"]))
    assert len(recommender.recommend(users=[user], k=3)) == 3


def test_the_command(
    sasrec: tuple[Path, dict[str, Any]], recommender: RunRecommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users, items, run = tmp_path / "users.txt", tmp_path / "items.txt", f"--run={sasrec[0].parent}"
    users.write_text("\n".join(recommender.users[:3]))
    items.write_text("i1\nThe red river\n")
    cli.main(["recommend", run, f"--users={users}", "--top=2", "--index=IVF2,Flat", f"--out={tmp_path / 'top.csv'}"])
    shown = capsys.readouterr().out
    assert "index IVF2,Flat (nprobe 8): recall@10 1.000" in shown and "top.csv: 6 lines for 3 users" in shown
    expected = recommender.recommend(users=recommender.users[:3], k=2)
    assert pd.read_csv(tmp_path / "top.csv")["item"].tolist() == expected["item"].tolist()
    cli.main(["recommend", run, f"--user={recommender.users[0]}", f"--candidates={items}", "--seen"])
    listed = capsys.readouterr().out.partition("recommended")[2]
    assert "i0" in listed and "i1" in listed and "i2" not in listed
    (tmp_path / "unknown.txt").write_text("u1\nnobody\n")
    with pytest.raises(SystemExit):
        cli.main(["recommend", run, f"--users={tmp_path / 'unknown.txt'}", f"--out={tmp_path / 'none.csv'}"])
    assert "--user=nobody: the dataset has no such user" in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists()
    with pytest.raises(SystemExit):
        cli.main(["recommend", run, "--history= | "])
    assert "--history is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights", "missing", "moved", "data", "older", "record"])
def test_a_run_is_loaded_only_with_its_own_weights_and_data(
    name: str, sasrec: tuple[Path, dict[str, Any]], tmp_path: Path, data_path: Path
) -> None:
    """Vectors belong to internal ids: other data, or other weights, would give wrong items without an error."""
    saved = tmp_path / "saved"
    shutil.copytree(sasrec[0].parent.parent.parent, saved)
    path = saved / "runs" / sasrec[0].parent.name / "record.json"
    record, file = sasrec[1], saved / sasrec[1]["checkpoint"]["file"]
    options: dict[str, Any] = {}
    if name == "weights":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        message = "has changed since the run wrote it"
    elif name == "missing":
        file.unlink()
        message = "the weights of .* are missing"
    elif name == "moved":
        path = shutil.move(path.parent, tmp_path / "elsewhere") / "record.json"
        message = "the weights of .* are missing.* from which this run was moved; move it back"
    elif name == "data":
        shutil.copytree(data_path / "tiny", tmp_path / "data" / "tiny")
        table = tmp_path / "data" / "tiny" / "tiny.inter"
        head, *lines = table.read_text().splitlines()
        table.write_text("\n".join([head, *reversed(lines)]) + "\n")  # the same interactions, other internal ids
        options, message = {"data_path": str(tmp_path / "data")}, "the data of .* have changed"
    elif name == "older":
        values = {key: value for key, value in record.items() if key not in ("checkpoint", "checksum")}
        path.write_text(json.dumps(values))
        message = "names no file of weights"
    else:
        path.write_text(path.read_text().replace('"seed": 2020', '"seed": 2021', 1))
        message = r"is damaged or was edited: .*; repeat the run \(--model=.*\), or delete it"
    with pytest.raises(ValueError, match=message):
        load(path, **options)
    with pytest.raises(ValueError, match="there is no run"):
        load(tmp_path / "runs")


def test_texts_that_have_changed_since_are_named(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model has learnt the earlier ones."""
    shutil.copytree(settings["data_path"], tmp_path / "data")
    run, _ = trained("NearestTitles", settings | {"data_path": str(tmp_path / "data")})
    item = tmp_path / "data/tiny/tiny.item"
    load(run)
    assert "changed since" not in caplog.text
    item.write_text(item.read_text() + "other\tnew" + "\t" * (item.read_text().splitlines()[0].count("\t") - 1) + "\n")
    load(run)
    assert f"--run: tiny.item changed since the run of {run if run.is_dir() else run.parent}" in caplog.text


def test_stages_are_those_of_the_record_whatever_the_code(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of the code names other folders for stages: a past run is loaded from its own ones."""
    path, record = trained("TALLRec", settings, **RERANKED)
    monkeypatch.setattr("recbole_llm.store.stages.code_fingerprint", lambda *_, **__: "later code")
    user = next(iter(record["ranks"]["TALLRec"]))
    assert len(load(path).recommend(users=[user], k=3)) == 3
    folder = path.parent.parent.parent / "stages" / next(iter(record["stages"].values()))
    next(folder.rglob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is missing or damaged .*; repeat the run \(--model=TALLRec"):
        load(path)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_files(ending: str, recommender: RunRecommender, tmp_path: Path) -> None:
    asked = [*recommender.people(recommender.users[:5])]
    file = tmp_path / f"top.{ending}"
    assert output.write(recommender, asked, Request(k=3), file, number=5, show_progress=False) == 15
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True)}[ending]
    expected = recommender.recommend(users=recommender.users[:5], k=3)
    pd.testing.assert_frame_equal(read(file)[expected.columns], expected, check_dtype=False)
    with pytest.raises(ValueError, match=r"the ending '\.xls' is unknown; give \.parquet, \.csv, \.jsonl"):
        output.write(recommender, asked, Request(k=3), tmp_path / "top.xls", number=5, show_progress=False)


def test_what_is_printed(recommender: RunRecommender, last_items: dict[str, list[str]]) -> None:
    user = recommender.users[0]
    (text,) = output.show(recommender, recommender.people([user]), Request(k=2))
    history, _, found = text.partition("recommended")
    assert f"{user}: history of {len(last_items[user])} items, oldest first" in history
    assert all(recommender.titles.names[recommender.titles.find(item)] in history for item in last_items[user])
    assert len([line for line in found.splitlines() if line.strip().startswith(("1 ", "2 "))]) == 2


@pytest.mark.parametrize(("option", "named"), [("--top=0", "--top=0"), ("--out=top.xls", "'.xls' is unknown")])
def test_options_are_checked_before_the_run_is_loaded(option: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["recommend", "--run=nosuch", "--user=u1", option])
    assert named in capsys.readouterr().err
