"""What killed runs leave is found and removed; what somebody still writes or needs is not."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from recbole_llm import cli
from recbole_llm.store import files
from recbole_llm.store.files import TEMPORARY, atomic_write, temporary_name
from recbole_llm.store.leftovers import DAY, clean, contents, temporaries, unfinished, unused, weights
from recbole_llm.store.locks import locked

fork = multiprocessing.get_context("fork")


def ended() -> int:
    """The number of a process that has ended."""
    process = fork.Process(target=int)
    process.start()
    process.join()
    return process.pid


def put(path: Path, age: float = 0.0) -> Path:
    """A folder with a file, both ``age`` seconds old."""
    path.mkdir(parents=True)
    (path / "file").write_text("0123456789")
    for changed in (path / "file", path):
        os.utime(changed, (time.time() - age,) * 2)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Two stages, one of which a record names, and a score."""
    for name in ("stages/a-1", "stages/b-2", "scores/c"):
        put(tmp_path / name, 2 * DAY)
    atomic_write(tmp_path / "runs" / "M-d-1" / "record.json", json.dumps({"stages": {"a": "a-1"}}))
    return tmp_path


def test_a_temporary_name_says_who_writes(tmp_path):
    found = TEMPORARY.fullmatch(temporary_name(tmp_path / "a.b").name)
    assert found["host"] == files.HOST and int(found["pid"]) == os.getpid()
    assert TEMPORARY.fullmatch(temporary_name(tmp_path / "a.b", "old.tmp").name)
    assert temporary_name(tmp_path / "a") != temporary_name(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "age", "is_left"),
    [
        (".x.{host}-{ended}-01234567.tmp", 0, True),
        (".x.{host}-{ended}-01234567.old.tmp", 0, True),
        (".x.{host}-{own}-01234567.tmp", 9 * DAY, False),  # alive
        (".x.abcdef-{ended}-01234567.tmp", 0, False),  # of another machine
        (".x.abcdef-{ended}-01234567.tmp", 2 * DAY, True),
        (".x.01234567.tmp", 2 * DAY, False),  # of another program
        ("x.{host}-{ended}-01234567.tmp", 2 * DAY, False),  # not ours
    ],
)
def test_temporary_files_whose_process_has_ended_are_left_over(root, name, age, is_left):
    path = put(
        root / "stages" / name.format(host="abcdee" if files.HOST == "abcdef" else files.HOST, ended=ended(), own=os.getpid()),
        age,
    )
    assert [leftover.path for leftover in temporaries(root)] == [path] * is_left
    list(clean(root))
    assert path.exists() != is_left and (root / "stages" / "a-1").is_dir()


def test_what_is_written_in_a_folder_makes_it_young(root):
    path = put(root / "stages" / f".x.abcdef-{ended()}-01234567.tmp", 2 * DAY)
    os.utime(path / "file")
    assert temporaries(root) == []


def test_checkpoints_stay_while_somebody_computes_the_stage(root):
    path = put(root / "stages" / ".b-2.unfinished")
    with locked(root / "stages" / "b-2", "stage b"):
        assert unfinished(root) == [] and [left.path for left in unused(root)] == []
    assert [left.path for left in unfinished(root)] == [path]


@pytest.mark.parametrize(
    ("name", "age", "is_left"),
    [
        ("SASRec-Nov-26-2026_22-00-00-{host}-{ended}-01234567.pth", 0, True),
        ("SASRec-Nov-26-2026_22-00-00-{host}-{own}-01234567.pth", 60 * DAY, False),  # alive
        ("SASRec-Nov-26-2026_22-00-00-{other}-{ended}-01234567.pth", 2 * DAY, False),  # of another machine
        ("SASRec-Nov-26-2026_22-00-00-{other}-{ended}-01234567.pth", 60 * DAY, True),
        ("SASRec-Nov-26-2026_22-00-00-01234567.pth", 60 * DAY, False),  # of earlier code, whose records do not name it
        ("mine.pth", 60 * DAY, False),
    ],
)
def test_weights_of_killed_runs_are_left_over(root, name, age, is_left):
    other = "abcdee" if files.HOST == "abcdef" else "abcdef"
    path = root / name.format(host=files.HOST, other=other, ended=ended(), own=os.getpid())
    path.write_bytes(b"weights")
    os.utime(path, (time.time() - age,) * 2)
    assert [left.path for left in weights(root)] == [path] * is_left
    record = root / "runs" / "M-d-2" / "record.json"
    atomic_write(record, json.dumps({"stages": {}, "config": {"cf_checkpoint": f"saved/{path.name}"}}))
    assert weights(root) == [], "a record names it"
    record.unlink()
    (root / "runs" / "M-d-1" / "record.json").write_text("{")
    assert weights(root) == [], "a record that cannot be read may name it"
    atomic_write(root / "runs" / "M-d-1" / "record.json", json.dumps({"stages": {}}))
    assert any(path.name in line for line in clean(root)) == is_left and path.exists() != is_left


def test_a_trainer_names_its_weights_by_its_process(assemble, settings):
    file = Path(assemble("BPR", settings).trainer.saved_model_file)
    match = files.CHECKPOINT.fullmatch(file.name)
    assert match["host"] == files.HOST and int(match["pid"]) == os.getpid() and file.name.startswith("BPR-")


def test_unused_stages_are_those_that_no_record_names(root):
    put(root / "stages" / "c-3")  # a run that has just trained it may not have written its record yet
    assert [leftover.path.name for leftover in unused(root)] == ["b-2"]
    with locked(root / "stages" / "d-4", "stage d"):
        assert unused(root) == [], "the run that computes it may have computed the others"
    (root / "runs" / "damaged").mkdir()
    for content in ("{", "[]", '{"stages": 3}', "{}"):
        (root / "runs" / "damaged" / "record.json").write_text(content)
        assert unused(root) == [], "it may name any"


def test_clean_says_what_it_removes(root, capsys):
    put(root / "stages" / ".b-2.unfinished")
    cli.main(["cache", "clean", f"--checkpoint_dir={root}"])
    assert capsys.readouterr().out == f"removed {root}/stages/.b-2.unfinished (10 B): checkpoints of a run that was killed\n"
    cli.main(["cache", "clean", f"--checkpoint_dir={root}"])
    assert capsys.readouterr().out == f"nothing is left over in {root}\n"
    cli.main(["cache", "clean", "--unused", f"--checkpoint_dir={root}"])
    assert capsys.readouterr().out == f"removed {root}/stages/b-2 (10 B): no run record names it\n"
    assert sorted(path.name for path in (root / "stages").iterdir() if not path.name.endswith(".lock")) == ["a-1"]


def test_list_counts_and_measures(root, capsys):
    (root / "SASRec.pth").write_bytes(bytes(3 * 2**20))
    (root / "notes.txt").write_text("notes")
    put(root / "stages" / ".b-2.unfinished")
    cli.main(["cache", "list", f"--checkpoint_dir={root}"])
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:4] for line in lines] == [
        ["stages", "2", "20", "B"],
        ["scores", "1", "10", "B"],
        ["runs", "1", "24", "B"],
        ["*.pth", "1", "3", "MiB"],
        ["others", "1", "5", "B"],
        ["total", "3", "MiB", "hidden"],
        ["left", "over", "1", "10"],
        ["unused", "1", "10", "B"],
    ]


def test_an_empty_folder_and_none(tmp_path, capsys):
    assert contents(tmp_path) == f"{tmp_path} is empty"
    for command in ("list", "clean"):
        with pytest.raises(SystemExit) as end:
            cli.main(["cache", command, f"--checkpoint_dir={tmp_path / 'none'}"])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: checkpoint_dir: there is no folder {tmp_path / 'none'}")
        with pytest.raises(SystemExit):
            cli.main(["cache", command, "--seed=1"])
        assert capsys.readouterr().err == f"error: no option --seed; see recbole-llm cache {command} --help\n"
