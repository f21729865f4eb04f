"""A stage runs once, is reused while nothing it depends on changes, and is never half there."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import Timeout

from recbole_llm.costs.plan import stage_lines
from recbole_llm.store import locks, stages
from recbole_llm.store.stages import Stage, StageCache, Work, in_order

fork = multiprocessing.get_context("fork")


class Builder:
    """Writes a result and counts, on disk and so across processes, how often."""

    def __init__(self, counter: Path):
        self.counter = counter

    def __call__(self, work: Work) -> None:
        with self.counter.open("a") as file:
            file.write("built\n")
        (work.out / "result").write_text("result")

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


def test_a_cached_result_is_reused_also_by_another_cache(cache, build):
    stage = Stage("a", {"r": 1}, build)
    folder = cache.run(stage)
    assert cache.run(stage) == folder and StageCache(cache.root).run(Stage("a", {"r": 1}, build)) == folder
    assert build.count == 1 and (folder / "result").read_text() == "result"
    assert visible(cache) == [folder.name]  # nothing unfinished stays


def test_the_trained_parameters_of_a_stage_and_all_before_it_are_counted_once(cache):
    def train(sizes: tuple[int, ...]):
        frozen = torch.zeros(100)
        return lambda work: [stages.count_trained([torch.zeros(size, 2, requires_grad=True), frozen]) for size in sizes]

    root = Stage("root", {}, train((5,)))
    left, right = (Stage(name, {}, train((1, 2)), inputs=(root,)) for name in ("left", "right"))
    merged = Stage("merged", {}, train(()), inputs=(left, right))
    stages.count_trained([torch.zeros(9)])  # nothing is being built
    assert cache.trained(merged) is None
    cache.run(merged)
    assert StageCache(cache.root).trained(merged) == 2 * (5 + 3 + 3) and cache.trained(left) == 2 * 8
    (cache.folder(root) / stages.TRAINED_FILE).unlink()  # not recorded
    assert cache.trained(merged) is None


def test_waiting_for_another_process_is_no_building(cache, build, monkeypatch):
    clock = [0.0]

    class Held:
        """A lock that another process gives back after seven seconds."""

        def __init__(self, path):
            self.path = path

        def acquire(self, blocking=True):
            if not blocking:
                raise Timeout(self.path)
            clock[0] += 7

        def release(self):
            pass

    monkeypatch.setattr(locks, "FileLock", Held)
    monkeypatch.setattr(locks.time, "monotonic", lambda: clock[0])
    cache.run(Stage("a", {}, build))
    assert cache.waited == 7 and cache.seconds["a"] == 0


def test_a_cache_knows_the_folders_of_all_stages_that_it_ran_or_reused(cache, build):
    upstream = Stage("up", {}, build)
    stage = Stage("a", {}, build, inputs=(upstream,))
    expected = {"up": cache.folder(upstream), "a": cache.folder(stage)}
    for again in (cache, StageCache(cache.root)):
        again.run(stage)
        assert again.folders == expected
    other = replace(upstream, depends={"of": "a retriever"})
    cache.run(other)  # the second of a name has that of its folder
    assert cache.folders == {**expected, other.folder_name: cache.folder(other)} and cache.folders["up"].is_dir()
    assert cache.seconds.keys() == cache.folders.keys() == cache.measured.keys()  # each has the seconds of its own folder
    assert [line.name for line in stage_lines([stage, other], cache)] == list(cache.folders)  # and the plan the same names


@pytest.mark.parametrize(
    "change",
    [
        {"depends": {"r": 2}},
        {"depends": {"r": 1, "s": 1}},
        {"code": ("recbole_llm.training.loop",)},
        {"name": "b"},
        {"inputs": ()},
    ],
    ids=["value", "key", "code", "name", "inputs"],
)
def test_whatever_a_stage_depends_on_makes_it_another_stage(cache, build, change):
    upstream = Stage("up", {}, build)
    stage = Stage("a", {"r": 1}, build, inputs=(upstream,))
    cache.run(stage)
    assert build.count == 2
    assert cache.run(replace(stage, **change)) != cache.folder(stage)
    assert build.count == 3


def test_inputs_come_first_and_every_stage_once(build):
    root = Stage("root", {}, build)
    left, right = (Stage(name, {}, build, inputs=(root,)) for name in ("left", "right"))
    merged = Stage("merged", {}, build, inputs=(left, right))
    assert in_order([merged]) == [root, left, right, merged]
    assert in_order([right, merged, Stage("root", {}, build)]) == [root, right, left, merged]
    assert in_order([]) == []


def test_several_stages_run_in_one_call_and_the_first_is_returned(cache, build):
    root = Stage("root", {}, build)
    left, right = (Stage(name, {}, build, inputs=(root,)) for name in ("left", "right"))
    assert cache.run(right, left) == cache.folder(right)
    assert build.count == 3 and all(map(cache.is_cached, (root, left, right)))


def test_what_a_stage_is_given(cache):
    seen = []

    def build(work: Work) -> None:
        seen.append(work)
        assert work.out.is_dir() and work.scratch.is_dir() and not any(work.out.iterdir())

    upstream = Stage("up", {}, build)
    stage = Stage("a", {}, build, inputs=(upstream,))
    folder = cache.run(stage)
    assert len({work.out for work in seen} | {work.scratch for work in seen} | {folder}) == 5
    assert seen[1].folder(upstream) == cache.folder(upstream) and not seen[1].scratch.exists()


def test_the_code_of_a_stage_is_that_of_the_module_of_its_build(monkeypatch, build):
    seen = []
    monkeypatch.setattr(stages, "code_fingerprint", lambda *modules, alone: seen.append(modules) or "hash")
    before = Stage("a", {}, build, code=("recbole_llm.llm.lora",)).fingerprint
    assert seen == [(Builder.__module__, "recbole_llm.llm.lora")]
    monkeypatch.setattr(stages, "code_fingerprint", lambda *modules, alone: "another hash")
    assert Stage("a", {}, build, code=("recbole_llm.llm.lora",)).fingerprint != before


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
    cache.run(Stage("a", {}, lambda work: found.append((work.folder(upstream) / "result").read_text()), (upstream,)))
    assert found == ["result"]


def test_a_stage_draws_the_same_numbers_whichever_stages_were_cached(cache, tmp_path):
    drawn = []

    def draw(work: Work) -> None:
        drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist()))

    first, second = Stage("first", {}, draw), Stage("second", {}, draw)
    cache.run(first), cache.run(second)
    torch.rand(7)
    StageCache(tmp_path / "others").run(second)
    StageCache(tmp_path / "seeded", seed=1).run(second)
    assert drawn[1] == drawn[2] != drawn[3]


def test_a_stage_can_train_within_no_grad(cache):
    def train(work: Work) -> None:
        torch.zeros(1, requires_grad=True).sum().backward()

    with torch.no_grad():
        assert cache.run(Stage("a", {}, train)).is_dir()


def test_a_bar_shows_how_much_of_its_planned_work_a_stage_has_done(cache, build, monkeypatch):
    bars = []

    def shown(name, measured, planned):
        bars.append((name, planned))
        return contextlib.nullcontext()

    monkeypatch.setattr(stages, "shown", shown)
    cache.planned = {"a": 100}
    for name in ("a", "b"):
        cache.run(Stage(name, {}, build))
    killed = Stage("a", {"r": 1}, build)
    (cache.root / f".{killed.folder_name}.unfinished" / "step-3").mkdir(parents=True)
    cache.run(killed)
    assert bars == [("stage a", 100), ("stage b", 0), ("stage a", 0)]  # what a killed process has done is not known


def test_a_damaged_result_is_rebuilt_with_a_warning(cache, build, caplog):
    stage = Stage("a", {}, build)
    folder = cache.run(stage)
    (folder / "result").write_text("resulT")
    cache.run(stage)
    assert build.count == 2 and (folder / "result").read_text() == "result"
    assert any(str(folder / "result") in message and "computed again" in message for message in caplog.messages)


def test_a_folder_without_its_manifest_is_not_a_result(cache, build):
    stage = Stage("a", {}, build)
    cache.folder(stage).mkdir(parents=True)
    (cache.folder(stage) / "result").write_text("half")
    assert (cache.run(stage) / "result").read_text() == "result"


def test_a_stage_that_fails_leaves_no_result_but_its_unfinished_work(cache, build):
    def fail(work: Work) -> None:
        (work.out / "result").write_text("half")
        (work.scratch / "step").write_text("3")
        raise ValueError("trouble")

    stage = Stage("a", {}, fail)
    with pytest.raises(ValueError, match="trouble"):
        cache.run(stage)
    assert visible(cache) == [f".{cache.folder(stage).name}.unfinished"]

    found = []
    cache.run(replace(stage, build=lambda work: found.append((work.scratch / "step").read_text())))
    assert found == ["3"] and visible(cache) == [cache.folder(stage).name]


def test_the_seconds_of_a_resumed_stage_are_those_of_all_processes_up_to_their_last_checkpoints(cache, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(stages.time, "time", lambda: now)

    def interrupted(after: float | None) -> Callable[[Work], None]:
        def build(work: Work) -> None:
            if after is not None:
                (work.scratch / "step").write_text("3")
                os.utime(work.scratch / "step", (now + after, now + after))
            (work.scratch / "curve.jsonl").write_text("")
            os.utime(work.scratch / "curve.jsonl", (now + 900, now + 900))  # later steps are done again
            raise ValueError("killed")

        return build

    for after in (None, 60.0, 30.0, None):  # some are killed before their first checkpoint
        with pytest.raises(ValueError, match="killed"):
            cache.run(Stage("a", {}, interrupted(after)))
        now += 1000
    cache.run(Stage("a", {}, lambda work: None))
    assert cache.earlier == 90 and 90 <= cache.seconds["a"] < 100 and cache.measured["a"].seconds < 10


def test_a_killed_stage_leaves_no_half_folder_and_no_lock(cache, build):
    def die(work: Work) -> None:
        (work.out / "result").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    stage = Stage("a", {}, build)
    child = fork.Process(target=cache.run, args=(replace(stage, build=die),))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not cache.folder(stage).exists()
    assert (cache.run(stage) / "result").read_text() == "result"
    assert visible(cache) == [cache.folder(stage).name]  # what the killed process wrote is swept away


def test_a_stage_killed_after_its_last_rename_is_cached_and_swept(cache, build, monkeypatch):
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

    def slowly(work: Work) -> None:
        inside.set()
        waiting.wait(60)
        build(work)

    class Lock(locks.FileLock):
        def acquire(self, *args, **kwargs):
            if inside.is_set():
                waiting.set()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(locks, "FileLock", Lock)
    stage = Stage("a", {}, slowly)
    children = [fork.Process(target=cache.run, args=(stage,)) for _ in range(2)]
    children[0].start()
    assert inside.wait(60)
    children[1].start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0] and waiting.is_set()
    assert build.count == 1
