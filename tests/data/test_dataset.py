"""True time order, whole histories, no pickles, and downloads that end well."""

from __future__ import annotations

import builtins
import http.server
import io
import pickle
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.config import LLMConfig
from recbole_llm.data.loading import create_dataset, data_preparation
from tests.conftest import write_rows

USERS, LENGTH = 25, 8


def write_inter(folder: Path, name: str, rows: list[tuple[str, str, int]]) -> None:
    (folder / name).mkdir(parents=True)
    lines = [f"{user}\t{item}\t{time}" for user, item, time in rows]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / name / f"{name}.inter").write_text("\n".join([header, *lines, ""]))


def load(model: str, name: str, folder: Path, **values: Any) -> Any:
    return create_dataset(LLMConfig(model, name, config_dict={"data_path": str(folder), **values}))


def targets(model: str, name: str, folder: Path) -> list[dict[str, str]]:
    """User -> item of the valid and test loaders that RecBole builds for ``model``, as tokens."""
    config = LLMConfig(model, name, config_dict={"data_path": str(folder)})
    loaders = data_preparation(config, create_dataset(config))[1:]
    frames = [(loader._dataset, loader._dataset.inter_feat) for loader in loaders]
    return [
        dict(zip(data.id2token("user_id", frame["user_id"]), data.id2token("item_id", frame["item_id"]), strict=True))
        for data, frame in frames
    ]


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interactions one second apart in 2020, which are one and the same float32, in shuffled lines."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        items = rng.permutation(40)[:LENGTH]
        rows += [(f"u{user}", f"i{item}", 1_600_000_000 + user + step) for step, item in enumerate(items)]
    assert len({np.float32(time) for _, _, time in rows}) < 5
    folder = tmp_path_factory.mktemp("seconds")
    write_inter(folder, "seconds", [rows[i] for i in rng.permutation(len(rows))])
    return folder


def true_order(folder: Path, name: str) -> dict[str, list[str]]:
    lines = [line.split("\t") for line in (folder / name / f"{name}.inter").read_text().splitlines()[1:]]
    order: dict[str, list[str]] = {}
    for user, item, _ in sorted(lines, key=lambda line: int(line[2])):  # stable: ties in the order of the file
        order.setdefault(user, []).append(item)
    return order


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_targets_are_the_last_in_true_time(model: str, seconds: Path) -> None:
    truth = true_order(seconds, "seconds")
    valid, test = targets(model, "seconds", seconds)
    assert valid == {user: items[-2] for user, items in truth.items()}
    assert test == {user: items[-1] for user, items in truth.items()}


def test_sequences_are_in_true_time(seconds: Path) -> None:
    config = LLMConfig("SASRec", "seconds", config_dict={"data_path": str(seconds)})
    data = data_preparation(config, create_dataset(config))[2]._dataset
    truth = true_order(seconds, "seconds")
    for row in range(USERS):
        items = data.inter_feat["item_id_list"][row][: data.inter_feat["item_length"][row]]
        user = data.id2token("user_id", data.inter_feat["user_id"][row])
        assert list(data.id2token("item_id", items)) == truth[user][:-1]


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_histories_are_whole_and_in_true_time(model: str, seconds: Path) -> None:
    histories = load(model, "seconds", seconds).histories
    found = {
        histories.user_ids[user]: [histories.item_ids[item] for item in items]
        for user, items in enumerate(histories.items)
        if user
    }
    assert found == true_order(seconds, "seconds")
    assert len(histories.items[0]) == 0 and histories.user_ids[0] == histories.item_ids[0] == "[PAD]"


def test_what_each_phase_may_know(seconds: Path) -> None:
    histories = load("Pop", "seconds", seconds).histories
    *train, valid, test = histories.items[3].tolist()
    assert histories.train(3).tolist() == histories.before(3, "valid").tolist() == train
    assert histories.before(3, "test").tolist() == [*train, valid]
    assert (histories.target(3, "valid"), histories.target(3, "test")) == (valid, test)


def test_ties_keep_the_order_of_the_file_for_every_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [(f"u{user}", f"i{item}", 5) for user in range(30) for item in rng.permutation(60)[:20]]
    write_inter(tmp_path, "ties", [rows[i] for i in rng.permutation(len(rows))])
    truth = true_order(tmp_path, "ties")
    expected = [{user: items[place] for user, items in truth.items()} for place in (-2, -1)]
    assert targets("BPR", "ties", tmp_path) == targets("SASRec", "ties", tmp_path) == expected


def test_evaluated_users_are_those_whom_every_model_splits(tmp_path: Path) -> None:
    rows = [(f"u{n}", f"i{n}{step}", step) for n in range(2, 7) for step in range(n)]
    write_inter(tmp_path, "short", rows)
    histories = load("Pop", "short", tmp_path).histories
    valid, test = ({histories.user_ids[user] for user in histories.evaluated(phase)} for phase in ("valid", "test"))
    assert valid == test == {"u4", "u5", "u6"}
    for model in ("BPR", "SASRec"):
        for split in targets(model, "short", tmp_path):
            assert test <= split.keys()


def test_a_user_held_out_of_training_needs_a_test_row_only(tmp_path: Path) -> None:
    rows = [(f"u{n}{twin}", f"i{n}{step}", step) for n in range(2, 7) for twin in "abcdef" for step in range(n)]
    write_inter(tmp_path, "short", rows)
    config = {"data_path": str(tmp_path), "cold_users": 0.5}
    for model in ("BPR", "SASRec"):
        made = LLMConfig(model, "short", config_dict=config)
        dataset = create_dataset(made)
        histories = dataset.histories
        cold = {histories.user_ids[user] for user in histories.scenario.untrained}
        eval_users = {phase: {histories.user_ids[user] for user in histories.evaluated(phase)} for phase in ("valid", "test")}
        assert eval_users["test"] == cold and {token[1] for token in cold} == set("3456")
        assert eval_users["valid"] == {user for user, _, _ in rows if user[1] in "456"} - cold
        for phase, loader in zip(("valid", "test"), data_preparation(made, dataset)[1:], strict=True):
            data = loader._dataset
            assert sorted(data.id2token("user_id", data.inter_feat["user_id"])) == sorted(eval_users[phase])


# -- pickles -----------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("file", ["tiny-SequentialDataset.pth", "tiny-for-SASRec-dataloader.pth"])
def test_nothing_under_saved_is_unpickled(file: str, settings: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / file).write_bytes(pickle.dumps(Trap()))
    config = LLMConfig("SASRec", "tiny", config_dict=settings)
    data_preparation(config, create_dataset(config))
    assert not Path("executed").exists()
    pickle.loads((saved / file).read_bytes())
    assert Path("executed").exists()  # the trap works


def test_a_built_dataset_can_be_pickled(settings: dict[str, Any]) -> None:
    """RecBole's DIN, SASRecF and others keep it in their checkpoints."""
    dataset = create_dataset(LLMConfig("SASRec", "tiny", config_dict=settings))
    assert type(pickle.loads(pickle.dumps(dataset))) is type(dataset)
    assert type(create_dataset(LLMConfig("GRU4Rec", "tiny", config_dict=settings))) is type(dataset)


# -- downloads ---------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    body, length = b"", 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.length or len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(data_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """A server on this machine whose archive RecBole knows as ``far``; a question ends the test."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for kind in ("inter", "item"):
            file.write(data_path / "tiny" / f"tiny.{kind}", f"far-away.{kind}")
    handler = type("Handler", (Server,), {"body": archive.getvalue()})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def asked(*_: Any) -> str:
        raise AssertionError("a download must not ask")

    def url(self: Any, *_: Any, **__: Any) -> str:
        return f"http://127.0.0.1:{server.server_port}/far-away.zip"

    monkeypatch.setattr("recbole.data.dataset.dataset.Dataset._get_download_url", url)
    monkeypatch.setattr(builtins, "input", asked)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def assert_downloaded(folder: Path) -> None:
    assert load("SASRec", "far", folder).item_texts.titles[1].startswith("The ")
    assert sorted(path.name for path in (folder / "far").iterdir()) == ["far.inter", "far.item"]
    assert [path.name for path in folder.iterdir()] == ["far"]


def test_download_works_at_the_first_try(served: type[Server], tmp_path: Path) -> None:
    assert_downloaded(tmp_path / "data")


def test_a_large_download_asks_nothing(served: type[Server], tmp_path: Path) -> None:
    served.length = 3 << 30
    assert_downloaded(tmp_path / "data")


def test_half_an_archive_left_by_a_kill_is_fetched_again(served: type[Server], tmp_path: Path) -> None:
    partial = tmp_path / "data" / ".far.download"
    partial.mkdir(parents=True)
    (partial / "far-away.zip").write_bytes(served.body[:100])
    assert_downloaded(tmp_path / "data")


def test_a_damaged_archive_is_reported_and_leaves_nothing(served: type[Server], tmp_path: Path) -> None:
    served.body = served.body[:100]
    with pytest.raises(ConnectionError, match=r"far-away\.zip could not be fetched .*far\.inter"):
        load("Pop", "far", tmp_path / "data")
    assert not any((tmp_path / "data").iterdir())


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_offline_names_folder_files_and_the_embedded_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as caught:
        load("Pop", "ml-1m", tmp_path)
    for part in ("ml-1m.zip could not be fetched", "ml-1m.inter", "ml-1m.item", str(tmp_path / "ml-1m"), "ml-100k"):
        assert part in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_unknown_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--dataset=nosuch: RecBole knows no download .*nosuch\.inter.*ml-100k"):
        load("Pop", "nosuch", tmp_path)


def test_a_folder_without_interactions(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"bare\.inter does not exist.*--data_path"):
        load("Pop", "bare", tmp_path)


@pytest.mark.parametrize("values", [{"TIME_FIELD": "when"}, {"load_col": {"inter": ["user_id", "item_id"]}}, {}])
def test_a_missing_time_column_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    write_inter(tmp_path, "timeless", [("u", f"i{n}", n) for n in range(5)])
    file = tmp_path / "timeless" / "timeless.inter"
    if not values:
        file.write_text(file.read_text().replace("timestamp:float", "clock:float"))
    field = values.get("TIME_FIELD", "timestamp")
    with pytest.raises(ValueError, match=rf"TIME_FIELD: {field} is not loaded from .*columns loaded: user_id, item_id"):
        load("SASRec", "timeless", tmp_path, **values)


def test_titles_of_a_dataset_without_an_item_file_are_its_tokens(tmp_path: Path) -> None:
    write_inter(tmp_path, "bare", [("u", f"i{n}", n) for n in range(5)])
    assert load("Pop", "bare", tmp_path).catalogue_titles == ["[PAD]", "i0", "i1", "i2", "i3", "i4"]


@pytest.mark.parametrize("already_split", [False, True])
def test_the_catalogue_is_what_was_chosen_whichever_tables_a_model_reads(already_split: bool, tmp_path: Path) -> None:
    """Items and users of the .item and .user files without interactions are no rivals and no users."""
    rows = [(f"u{user}", f"i{(user + step) % 20}", step) for user in range(20) for step in range(6)]
    given: dict[str, Any] = {}
    if already_split:
        given = {"benchmark_filename": ["train", "valid", "test"]}
        for name, steps in (("train", range(4)), ("valid", [4]), ("test", [5])):
            write_rows(tmp_path, "whole", [row for row in rows if row[2] in steps], name)
    else:
        write_inter(tmp_path, "whole", rows)
    items, users = [f"i{item}\tt{item}\tg{item % 3}" for item in range(35)], [f"u{user}\tf" for user in range(30)]
    (tmp_path / "whole" / "whole.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tgenre:token", *items, ""]))
    (tmp_path / "whole" / "whole.user").write_text("\n".join(["user_id:token\tgender:token", *users, ""]))
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"], "user": ["user_id", "gender"]}
    plain, whole = load("BPR", "whole", tmp_path, **given), load("BPR", "whole", tmp_path, load_col=columns, **given)
    assert (whole.item_num, whole.user_num) == (21, 21) == (plain.item_num, plain.user_num)
    assert whole.tokens == plain.tokens and len(whole.item_feat) == 21 and len(whole.user_feat) == 21
    found = dict(zip(whole.id2token("item_id", whole.item_feat["item_id"]), whole.item_feat["genre"], strict=True))
    assert whole.id2token("genre", int(found["i7"])) == "g1"
