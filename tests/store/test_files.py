"""What is on disk is the old or the new, never half; what was damaged is refused by name."""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.store import files as module
from recbole_llm.store.files import DamagedError, atomic_folder, atomic_write, load_state, save_state, temporary_name, verify
from recbole_llm.store.random_state import preserved_random_state, restore_rng, rng_state
from recbole_llm.training.saving import optimizer_tensors, restore_optimizer


def _killed_at_rename(write, call: int = 1) -> None:
    """Run ``write`` in a child process that dies of SIGKILL in place of its ``call``-th rename."""

    def child() -> None:
        rename, calls = os.replace, iter(range(1, 100))

        def replace(source, target) -> None:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replace
        write()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _write_folder(path: Path, content: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(content)


# -- atomic writing ----------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    atomic_write(tmp_path / "file", "old")
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
    with pytest.raises(OSError, match="disk is gone"):
        atomic_write(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_is_written_is_on_the_disk_before_its_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    calls, rename = [], os.replace
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(module.os, "replace", lambda old, new: (calls.append("rename"), rename(old, new)))
    atomic_write(tmp_path / "file", "new")
    assert calls == [(tmp_path / "file").stat().st_ino, "rename", tmp_path.stat().st_ino]
    calls.clear()
    _write_folder(tmp_path / "folder", "new")
    inside = [tmp_path / "folder" / name for name in ("inner/file", module.MANIFEST, "")]
    assert calls == [*(path.stat().st_ino for path in inside), "rename", tmp_path.stat().st_ino]


def test_a_write_makes_its_folder_and_takes_bytes_or_text(tmp_path):
    atomic_write(tmp_path / "a" / "b", "ä")
    atomic_write(tmp_path / "a" / "c", "ä".encode())
    assert (tmp_path / "a" / "b").read_bytes() == (tmp_path / "a" / "c").read_bytes()


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    """Also where no ``cache clean`` looks, such as beside an exported model of many gigabytes."""
    path = tmp_path / "[full]"
    for write in (lambda: _write_folder(path, "new"), lambda: atomic_write(tmp_path / "[full].csv", "new")):
        _killed_at_rename(write)
    living, other = temporary_name(path), temporary_name(tmp_path / "another")
    for folder in (living, other):
        folder.mkdir()
    assert len(list(tmp_path.iterdir())) == 4
    atomic_write(tmp_path / "[full].csv", "new")
    _write_folder(path, "new")
    assert sorted(tmp_path.iterdir()) == sorted([living, other, path, tmp_path / "[full].csv"])


@pytest.mark.parametrize("old", [None, "old"])
def test_a_killed_write_leaves_the_old_file_or_none(tmp_path, old):
    path = tmp_path / "file"
    if old:
        atomic_write(path, old)
    _killed_at_rename(lambda: atomic_write(path, "new"))
    assert (path.read_text() if path.exists() else None) == old


def test_a_folder_whose_block_raises_leaves_the_old_one_and_nothing_else(tmp_path):
    _write_folder(tmp_path / "folder", "old")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("half")
        raise KeyError("trouble")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    verify(tmp_path / "folder")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "gone").write_text("")
    _write_folder(tmp_path / "folder", "new")
    verify(tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [module.MANIFEST, "inner"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("old", "call", "left"), [(None, 1, None), ("old", 1, "old"), ("old", 2, None)])
def test_a_killed_folder_is_the_old_one_or_none(tmp_path, old, call, left):
    path = tmp_path / "folder"
    if old:
        _write_folder(path, old)
    _killed_at_rename(lambda: _write_folder(path, "new"), call)
    assert module.is_complete(path) == bool(left)
    assert ((path / "inner" / "file").read_text() if path.exists() else None) == left
    _write_folder(path, "again")  # whatever was left is in nobody's way
    verify(path)


def test_of_two_writers_of_one_folder_the_later_one_is_there(tmp_path, monkeypatch):
    """Another process puts its folder there between the look and the rename, and once moves it away."""
    path, rename, others = tmp_path / "folder", os.replace, [True, True]

    def replace(source, target) -> None:
        if others and Path(target) == path and Path(source).name != "other":
            others.pop()
            other = tmp_path / "other"
            _write_plain(other, "other")
            if path.exists():
                shutil.rmtree(path)
            rename(other, path)
        rename(source, target)

    monkeypatch.setattr(module.os, "replace", replace)
    _write_folder(path, "new")
    assert not others and (path / "inner" / "file").read_text() == "new"
    verify(path)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def _write_plain(path: Path, content: str) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(content)


def test_a_folder_whose_place_cannot_be_taken_is_an_error(tmp_path, monkeypatch):
    def replace(source, target) -> None:
        raise PermissionError(13, "no permission", str(target))

    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(PermissionError, match="no permission"):
        _write_folder(tmp_path / "folder", "new")
    assert list(tmp_path.iterdir()) == []


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path) -> Path:
    save_state(tmp_path / "state", {"w": torch.arange(4.0)}, {"step": 3})
    return tmp_path / "state"


def test_each_of_200_flipped_bits_is_refused_by_name(state):
    files = sorted(path for path in state.iterdir())
    rng = np.random.default_rng(0)
    for _ in range(200):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        # a flip in the manifest makes another file the one that is missing or does not match
        named = state if file.name == module.MANIFEST else file
        with pytest.raises(DamagedError, match=str(named)):
            load_state(state)
        file.write_bytes(whole)
    load_state(state)


def test_truncated_and_missing_files_are_refused_by_name(state):
    for file in sorted(path for path in state.iterdir()):
        whole = file.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(DamagedError, match=file.name):
                load_state(state)
        file.unlink()
        with pytest.raises(DamagedError, match=file.name):
            load_state(state)
        file.write_bytes(whole)


@pytest.mark.parametrize("content", ["[1]", "{}", "3", '{"../tensors.safetensors": 1}'])
def test_a_manifest_that_is_json_but_no_manifest_is_refused(state, content):
    (state / module.MANIFEST).write_text(content)
    with pytest.raises(DamagedError, match="MANIFEST"):
        verify(state)


@pytest.mark.parametrize("name", ["adapter_model.bin", "inner/extra.safetensors", "MANIFEST.json.bak"])
def test_a_file_that_the_manifest_does_not_name_is_refused_by_name(state, name):
    file = state / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    with pytest.raises(DamagedError, match=f"{file}: it is not in MANIFEST.json"):
        load_state(state)
    file.unlink()
    load_state(state)


def test_a_folder_within_a_folder_has_a_manifest_of_its_own(tmp_path):
    with atomic_folder(tmp_path / "stage") as outer, atomic_folder(outer / "merged") as inner:
        (inner / "weights").write_text("1")
    verify(tmp_path / "stage")
    verify(tmp_path / "stage" / "merged")
    (tmp_path / "stage" / "merged" / "weights").write_text("2")
    with pytest.raises(DamagedError, match="weights"):
        verify(tmp_path / "stage")


def test_a_file_of_a_file_manager_does_no_harm(state):
    (state / ".DS_Store").write_text("")
    verify(state)


# -- states ------------------------------------------------------------------------------------------------------------


def test_states_come_back_bit_equal_whatever_their_shape(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "bytes": torch.get_rng_state(),
        "flags": base > 0,
        "view": base[::2, 1:],
        "transposed": base.T,
        "shared": base,
        "half": base.bfloat16(),
        "a/b.c": torch.arange(3),
        "gradient": base.clone().requires_grad_(),
    }
    values = {"list": [1, 0.1, None, "ä"], "nested": {"a": True}}
    save_state(tmp_path / "state", tensors, values)
    found, read = load_state(tmp_path / "state")
    assert read == values and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_state_without_tensors_is_a_state(tmp_path):
    save_state(tmp_path / "state", {}, {})
    assert load_state(tmp_path / "state") == ({}, {})


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
    ids=["adamw", "momentum", "stateless"],
)
def test_an_optimiser_goes_on_bit_equal_from_its_tensors(tmp_path, optimiser):
    def steps(parameters, optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            sum((p**4).sum() for p in parameters).backward()
            optimizer.step()

    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(()))]
    optimizer = optimiser(parameters)
    steps(parameters, optimizer, 3)
    save_state(tmp_path / "state", optimizer_tensors(optimizer), {})
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    steps(parameters, optimizer, 3)

    resumed = optimiser(copies)
    restore_optimizer(resumed, load_state(tmp_path / "state")[0])
    steps(copies, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_random_states_come_back_through_a_file(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep half a pair of normals
    save_state(tmp_path / "state", *rng_state())

    def drawn():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]

    first = drawn()
    assert drawn() != first
    restore_rng(*load_state(tmp_path / "state"))
    assert drawn() == first


def test_fingerprints_depend_on_values_and_not_on_the_order_of_keys():
    assert module.fingerprint({"a": 1, "b": [2]}) == module.fingerprint({"b": [2], "a": 1})
    assert module.fingerprint({"a": 1}) != module.fingerprint({"a": "1"})


def test_random_states_are_preserved_whatever_happens_within():
    before = rng_state()
    expected = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
    restore_rng(*before)
    with preserved_random_state():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        torch.rand(7), np.random.rand(7), random.random()
    with pytest.raises(KeyError), preserved_random_state():
        torch.rand(7), np.random.rand(7), random.random()
        raise KeyError
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == expected
