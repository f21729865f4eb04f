"""JSON of anybody is one object within bounds, or refused by the name of its file and its fault."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from recbole_llm import cli
from recbole_llm.cli.errors import one_line, reason
from recbole_llm.evaluation import record
from recbole_llm.store import files
from recbole_llm.store.files import MANIFEST, atomic_file, atomic_folder, check_sum, is_within, save_state, verify
from recbole_llm.store.json_files import DEEPEST, DamagedError, read_object, read_sealed, sealed
from recbole_llm.store.runs import SavedRun

NESTED = "{" + '"a":{' * DEEPEST + "}" * (DEEPEST + 1)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[" * 100_000, "it is not JSON"),
        (b'{"a":' * 100_000, "it is not JSON"),
        (b"", "it is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', r"it is not JSON \('a' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', r"it is not JSON \('b' is given twice"),
        (b"[1]", "it holds a list, not an object"),
        (b"3", "it holds a int, not an object"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "it is not JSON"),
        (NESTED.encode(), "it has more than 100 objects within objects"),
    ],
)
def test_what_is_no_sound_object_is_named(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"file\.json is damaged: {fault}"):
        read_object(tmp_path / "file.json")


def test_a_file_larger_than_its_kind_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "file.json", "wb") as file:
        file.truncate(100 * 2**20)  # sparse
    with pytest.raises(DamagedError, match="has 104,857,600 bytes, and none of its kind has more than 1,000"):
        read_object(tmp_path / "file.json", 1000)


def test_a_pipe_or_a_device_in_place_of_a_file_is_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "file.json").symlink_to("/dev/null")  # reading /dev/zero or a pipe would not end
    with pytest.raises(DamagedError, match=r"file\.json is damaged: it is a pipe or a device, not a file"):
        read_object(tmp_path / "file.json")


def test_a_link_to_itself_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file.json").symlink_to(tmp_path / "file.json")
    with pytest.raises(OSError) as caught:
        read_object(tmp_path / "file.json")
    assert "file.json: " in reason(caught.value) and reason(caught.value).endswith("a link leads back to itself; remove it")


def test_a_sealed_file_of_which_a_value_was_changed_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(sealed({"padding": True, "context": 512}))
    assert read_sealed(file) == {"padding": True, "context": 512}
    file.write_text(file.read_text().replace("512", "513"))
    with pytest.raises(DamagedError, match="its values are not those that were written"):
        read_sealed(file)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "..", ".", "", 3, None])
def test_names_in_files_stay_within_their_folder(name: object, tmp_path: Path) -> None:
    assert not is_within(tmp_path / "stages", name)
    assert is_within(tmp_path / "stages", "ingredient-1234")
    record = {"model": "Laser", "dataset": "tiny", "config": {}, "stages": {"phase-1": name}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="its stages are not names of folders; repeat the run"):
        SavedRun.read(tmp_path / "record.json")


def test_a_manifest_names_nothing_elsewhere(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"w": torch.ones(1)}, {})
    sums = json.loads((tmp_path / "state" / MANIFEST).read_text())
    (tmp_path / "state" / MANIFEST).write_text(json.dumps({**sums, "../else": "0"}))
    with pytest.raises(DamagedError, match="names '../else', which is elsewhere"):
        verify(tmp_path / "state")


def test_a_file_that_is_read_alone_is_checked_against_its_manifest(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"w": torch.ones(1)}, {"a": 1})
    check_sum(tmp_path / "state" / "values.json")
    (tmp_path / "state" / "values.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"values\.json is damaged"):
        check_sum(tmp_path / "state" / "values.json")
    for sums in ({}, {"tensors.safetensors": "0"}):
        (tmp_path / "state" / MANIFEST).write_text(json.dumps(sums))
        with pytest.raises(DamagedError, match=r"values\.json is not in the MANIFEST\.json beside it"):
            check_sum(tmp_path / "state" / "values.json")
    (tmp_path / "state" / MANIFEST).unlink()
    check_sum(tmp_path / "state" / "values.json")  # somebody else's folder


WRITERS = {  # how the writers of several libraries say that the disk is full
    "Python": (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
    "safetensors": (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
    "tokenizers": (Exception("File too large (os error 27)"), errno.EFBIG),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), errno.EIO),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_disk_that_fails_is_named_with_what_was_written_and_the_old_one_stays(write, writer: str, tmp_path: Path) -> None:
    error, number = WRITERS[writer]
    with write(tmp_path / "own") as own:
        own.write_text("old") if write is atomic_file else (own / "file").write_text("old")
    with pytest.raises(OSError) as caught, write(tmp_path / "own"):
        raise error
    assert caught.value.errno == number and caught.value.filename == str(tmp_path / "own")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    said = reason(caught.value)
    assert said.startswith(f"{tmp_path / 'own'}: ") and "the same command resumes from there" in said and "\n" not in said


def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), files.writing(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "change its permissions"),
        (errno.ENOTDIR, "a file is where a folder should be"),
        (errno.EISDIR, "a folder is where a file should be"),
        (errno.EMFILE, "too many files are open"),
    ],
)
def test_errors_of_the_disk_say_how_to_go_on(number: int, remedy: str) -> None:
    said = reason(OSError(number, "what", "where"))
    assert said.startswith("where: what; ") and remedy in said


def test_a_log_that_cannot_be_written_is_no_second_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from recbole_llm import logs

    def full(error: BaseException) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "log")

    monkeypatch.setattr(logs, "keep_traceback", full)
    assert "KeyError: 'x'; this is a bug in the package" in reason(KeyError("x")) and "no log file" in reason(KeyError("x"))


def test_a_hostile_value_does_not_fill_the_terminal() -> None:
    assert one_line("a\n b") == "a b"
    shown = one_line(f"begin {'x' * 100_000} end")
    assert len(shown) < 2100 and shown.startswith("begin ") and shown.endswith(" end")


def test_an_error_that_cannot_be_printed_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            pass

    monkeypatch.setattr("sys.stderr", Full())
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--model=BRP", "--dataset=tiny"])


def test_the_commit_of_a_record_is_read_without_writing_to_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    record.commit()
    assert asked and all(command[:2] == ["git", "--no-optional-locks"] for command in asked)
