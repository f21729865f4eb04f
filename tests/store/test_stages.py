"""A stage is built once, found again while nothing it depends on changes, and never half there."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.store import stages
from recbole_llm.store.stages import Stage, StageCache

fork = multiprocessing.get_context("fork")


class Builder:
    """Writes a result and counts, on disk and so across processes, how often."""

    def __init__(self, counter: Path):
        self.counter = counter

    def __call__(self, out: Path, scratch: Path) -> None:
        with self.counter.open("a") as file:
            file.write("built\n")
        (out / "result").write_text("result")

    @property
    def count(self) -> int:
        return len(self.counter.read_text().splitlines()) if self.counter.exists() else 0


@pytest.fixture
def build(tmp_path) -> Builder:
    return Builder(tmp_path / "counter")


@pytest.fixture
def cache(tmp_path) -> StageCache:
    return StageCache(tmp_path / "stages")


def visible(cache: StageCache) -> list[str]:
    """What a stage leaves behind, lock files aside."""
    return sorted(path.name for path in cache.root.iterdir() if path.suffix != ".lock")


def test_a_kept_result_is_found_again_also_by_another_keeper(cache, build):
    stage = Stage("a", {"r": 1}, build)
    folder = cache.run(stage)
    assert cache.run(stage) == folder and StageCache(cache.root).run(Stage("a", {"r": 1}, build)) == folder
    assert build.count == 1 and (folder / "result").read_text() == "result"
    assert visible(cache) == [folder.name]  # nothing unfinished stays


def test_a_keeper_knows_what_a_stage_and_all_before_it_have_trained_each_once(cache):
    def train(sizes: tuple[int, ...]):
        return lambda out, scratch: [stages.count_trained([torch.zeros(size, 2)]) for size in sizes]

    root = Stage("root", {}, train((5,)))
    left, right = (Stage(name, {}, train((1, 2)), inputs=(root,)) for name in ("left", "right"))
    merged = Stage("merged", {}, train(()), inputs=(left, right))
    stages.count_trained([torch.zeros(9)])  # nothing is being built
    assert cache.trained(merged) is None
    cache.run(merged)
    assert StageCache(cache.root).trained(merged) == 2 * (5 + 3 + 3) and cache.trained(left) == 2 * 8
    (cache.folder(root) / stages.TRAINED_FILE).unlink()  # kept by an earlier version
    assert cache.trained(merged) is None


def test_waiting_for_another_process_is_no_building(cache, build, monkeypatch):
    clock = [0.0]

    class Held:
        """A lock that another process gives back after seven seconds."""

        def __init__(self, path):
            self.path = path

        def __enter__(self):
            clock[0] += 7

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(stages, "FileLock", Held)
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    cache.run(Stage("a", {}, build))
    assert cache.waited == 7 and cache.seconds["a"] == 0


def test_a_keeper_knows_the_folders_of_all_stages_that_it_ran_or_found(cache, build):
    upstream = Stage("up", {}, build)
    stage = Stage("a", {}, build, inputs=(upstream,))
    expected = {"up": cache.folder(upstream), "a": cache.folder(stage)}
    for again in (cache, StageCache(cache.root)):
        again.run(stage)
        assert again.folders == expected
    cache.run(replace(upstream, depends={"of": "a retriever"}))
    assert cache.folders == expected and cache.folders["up"].is_dir()  # the first of a name


@pytest.mark.parametrize(
    "change",
    [{"depends": {"r": 2}}, {"depends": {"r": 1, "s": 1}}, {"version": 2}, {"name": "b"}, {"inputs": ()}],
    ids=["value", "key", "version", "name", "inputs"],
)
def test_whatever_a_stage_depends_on_makes_it_another_stage(cache, build, change):
    upstream = Stage("up", {}, build)
    stage = Stage("a", {"r": 1}, build, inputs=(upstream,))
    cache.run(stage)
    assert build.count == 2
    assert cache.run(replace(stage, **change)) != cache.folder(stage)
    assert build.count == 3


def test_a_change_upstream_reaches_every_stage_below(cache, build):
    def chain(value: int) -> Stage:
        top = Stage("top", {"value": value}, build)
        return Stage("below", {}, build, inputs=(Stage("middle", {}, build, inputs=(top,)),))

    cache.run(chain(1))
    cache.run(chain(2))
    cache.run(chain(1))
    assert build.count == 6 and len(visible(cache)) == 6


def test_the_result_of_an_input_is_there_when_a_stage_is_built(cache, build):
    upstream = Stage("up", {}, build)
    found = []
    cache.run(Stage("a", {}, lambda out, scratch: found.append((cache.folder(upstream) / "result").exists()), (upstream,)))
    assert found == [True]


def test_a_stage_draws_the_same_numbers_whichever_stages_were_kept(cache, tmp_path):
    drawn = []

    def draw(out: Path, scratch: Path) -> None:
        drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist()))

    first, second = Stage("first", {}, draw), Stage("second", {}, draw)
    cache.run(first), cache.run(second)
    torch.rand(7)
    StageCache(tmp_path / "others").run(second)
    StageCache(tmp_path / "seeded", seed=1).run(second)
    assert drawn[1] == drawn[2] != drawn[3]


def test_a_stage_that_an_evaluation_asks_for_can_train(cache):
    def train(out: Path, scratch: Path) -> None:
        torch.zeros(1, requires_grad=True).sum().backward()

    with torch.no_grad():
        assert cache.run(Stage("a", {}, train)).is_dir()


def test_a_damaged_result_is_rebuilt_with_a_warning(cache, build, caplog):
    stage = Stage("a", {}, build)
    folder = cache.run(stage)
    (folder / "result").write_text("resulT")
    cache.run(stage)
    assert build.count == 2 and (folder / "result").read_text() == "result"
    assert any(str(folder / "result") in message and "rebuilt" in message for message in caplog.messages)


def test_a_folder_without_its_manifest_is_not_a_result(cache, build):
    stage = Stage("a", {}, build)
    cache.folder(stage).mkdir(parents=True)
    (cache.folder(stage) / "result").write_text("half")
    assert (cache.run(stage) / "result").read_text() == "result"


def test_a_stage_that_fails_leaves_no_result_but_its_unfinished_work(cache, build):
    def fail(out: Path, scratch: Path) -> None:
        (out / "result").write_text("half")
        (scratch / "step").write_text("3")
        raise ValueError("trouble")

    stage = Stage("a", {}, fail)
    with pytest.raises(ValueError, match="trouble"):
        cache.run(stage)
    assert visible(cache) == [f".{cache.folder(stage).name}.unfinished"]

    found = []
    cache.run(replace(stage, build=lambda out, scratch: found.append((scratch / "step").read_text())))
    assert found == ["3"] and visible(cache) == [cache.folder(stage).name]


def test_a_killed_stage_leaves_no_half_folder_and_no_lock(cache, build):
    def die(out: Path, scratch: Path) -> None:
        (out / "result").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    stage = Stage("a", {}, build)
    child = fork.Process(target=cache.run, args=(replace(stage, build=die),))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not cache.folder(stage).exists()
    assert (cache.run(stage) / "result").read_text() == "result"
    assert visible(cache) == [cache.folder(stage).name]  # what the killed process wrote is swept away


def test_a_stage_killed_after_its_last_rename_is_kept_and_swept(cache, build, monkeypatch):
    stage = Stage("a", {}, build)
    monkeypatch.setattr(stages.shutil, "rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    child = fork.Process(target=cache.run, args=(stage,))
    child.start()
    child.join()
    monkeypatch.undo()
    cache.run(stage)
    assert build.count == 1 and visible(cache) == [cache.folder(stage).name]


def test_of_two_processes_that_need_a_stage_one_builds_and_one_waits(cache, build, monkeypatch):
    inside, waiting = fork.Event(), fork.Event()

    def slowly(out: Path, scratch: Path) -> None:
        inside.set()
        waiting.wait(10)
        build(out, scratch)

    class Lock(stages.FileLock):
        def acquire(self, *args, **kwargs):
            if inside.is_set():
                waiting.set()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(stages, "FileLock", Lock)
    stage = Stage("a", {}, slowly)
    children = [fork.Process(target=cache.run, args=(stage,)) for _ in range(2)]
    children[0].start()
    assert inside.wait(10)
    children[1].start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0] and waiting.is_set()
    assert build.count == 1
