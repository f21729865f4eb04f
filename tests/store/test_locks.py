"""One writer at a time; a process that waits says for whom."""

import multiprocessing
import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from recbole_llm.store import locks
from recbole_llm.store.locks import locked

fork = multiprocessing.get_context("fork")


def hold(path: Path, inside, end) -> None:
    with locked(path, "held"):
        inside.set()
        end.wait(60)


@pytest.fixture
def held(tmp_path):
    """A path whose lock another process holds, the process, and the event that ends it."""
    inside, end = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "new" / "folder", inside, end))
    process.start()
    assert inside.wait(60)
    yield tmp_path / "new" / "folder", process, end
    if process.is_alive():  # an event waits for the answer of whom it wakes
        end.set()
    process.join()


def test_who_waits_says_for_whom(held, caplog, monkeypatch):
    path, process, end = held

    class Lock(locks.FileLock):
        def acquire(self, *args, **kwargs):
            if not kwargs:  # it waits now
                end.set()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(locks, "FileLock", Lock)
    with caplog.at_level("INFO"), locked(path, "stage a") as waited:
        assert waited > 0
    (line,) = caplog.messages
    assert line.startswith(f"stage a: waiting for process {process.pid} on ") and line.endswith(f", which writes {path}")


def test_a_lock_of_a_killed_process_is_free(held, caplog):
    path, process, _ = held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with caplog.at_level("INFO"), locked(path, "stage a") as waited:
        assert waited == 0
    assert caplog.messages == []
    assert sorted(file.name for file in path.parent.iterdir()) == [".folder.lock"]


def test_who_is_killed_while_it_waits_leaves_nothing(held):
    path, first, end = held
    read, write = os.pipe()

    def wait() -> None:
        with mock.patch.object(locks.logger, "info", lambda line: os.write(write, line.encode())), locked(path, "stage a"):
            pass

    waiting = fork.Process(target=wait)
    waiting.start()
    assert b"stage a: waiting for process" in os.read(read, 1000)
    waiting.kill()
    waiting.join()
    assert locks._read(path.with_name(".folder.owner")).startswith(f"process {first.pid} ")
    end.set()
    first.join()
    assert [file.name for file in path.parent.iterdir()] == [".folder.lock"]


def test_an_owner_that_cannot_be_read_is_another_process(held, caplog, monkeypatch):
    path, _, end = held
    owner = path.with_name(f".{path.name}.owner")
    for content in ("", None):
        owner.unlink()
        if content is None:
            owner.mkdir()
        else:
            owner.write_text(content)
        assert locks._read(owner) == "another process"
    owner.rmdir()
    end.set()


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "file", "x"):
        raise KeyError
    with locked(tmp_path / "file", "x") as waited:
        assert waited == 0
