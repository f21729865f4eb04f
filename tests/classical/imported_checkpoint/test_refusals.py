"""What is no checkpoint, or is damaged, is refused by name and costs neither memory nor the process."""

from __future__ import annotations

import pickle
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recbole_llm.classical.imported_checkpoint import ImportedCheckpoint, read_checkpoint
from tests.classical.imported_checkpoint.conftest import STATE, changed, legacy, repickled, same, with_opcodes

# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(file: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^cf_checkpoint: {re.escape(file)} is (?=.*; \w)(?=.*{reason})"):
        read_checkpoint(file)


@pytest.mark.parametrize("file", ["absent.pth", "absent.safetensors", ".", ""])
def test_an_absent_file_is_named(file: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^my_key: {re.escape(str(Path(file)))} is not a file .*; give a checkpoint"):
        read_checkpoint(file, key="my_key")


def test_the_home_folder_is_found(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert same(read_checkpoint("~/good.pth", key="my_key").state_dict, STATE)


def test_other_formats_are_refused(good: str) -> None:
    Path("legacy.pth").write_bytes(legacy({"state_dict": STATE}))
    Path("pickle.pth").write_bytes(pickle.dumps({"state_dict": {}}))
    Path("text.pth").write_text("no checkpoint")
    Path("empty.pth").touch()
    for file in ("legacy.pth", "pickle.pth", "text.pth", "empty.pth"):
        refused(file, "not in torch.save's zip format; save it again with torch 1.6")
    for file in ("text.safetensors", "empty.safetensors"):
        Path(file).write_bytes(Path(file).with_suffix(".pth").read_bytes())
        refused(file, "damaged")
    with zipfile.ZipFile("other.pth", "w") as archive:
        archive.writestr("word/document.xml", "")
    refused("other.pth", "no record data.pkl, which torch.save")
    refused(changed("small.pth", lambda name, data: data, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(changed("big.pth", lambda name, data: b"big" if name == "byteorder" else data), "byte order")


def test_torchscript_is_refused_as_what_holds_no_state_dict() -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), "script.pth")
    refused("script.pth", "no state_dict")


@pytest.mark.parametrize("content", [{}, STATE, [STATE], torch.ones(1), {"state_dict": "model.txt"}, {"state_dict": None}])
def test_a_file_without_state_dict_is_refused(content: Any) -> None:
    torch.save(content, "file.pth")
    refused("file.pth", "no state_dict; write one with torch.save")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("text", "str"),
        (None, "NoneType"),
        (1.5, "float"),
        ({"w": torch.ones(1)}, "dict"),
        ([torch.ones(1)], "list"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (np.ones(1), "numpy"),
        (torch.nn.ReLU(), "ReLU"),
        (torch.ones(1, dtype=torch.cfloat).conj(), "_rebuild_tensor_v2"),
        (torch.ones(1).to(torch.float8_e5m2), "v3"),
        (torch.ones(1, device="meta"), "meta"),
        (torch.float32, "torch.float32"),
    ],
)
def test_what_is_no_ordinary_tensor_is_refused_by_name(value: Any, found: str) -> None:
    torch.save({"state_dict": {"fine": torch.ones(1), "odd.one": value}}, "file.pth")
    refused("file.pth", rf"state_dict\['odd.one'\] is no ordinary tensor but .*{found}")


def test_names_that_are_no_text_are_refused() -> None:
    torch.save({"state_dict": {3: torch.ones(1)}}, "file.pth")
    refused("file.pth", r"state_dict\[3\]")


FORGED = {
    "more elements than there are": (b"K\x06tq", b"K\x07tq", "24 bytes and not 7 elements"),
    "a billion elements": (b"K\x06tq", b"J\x00\x00\x00\x40tq", "24 bytes and not"),
    "fewer elements": (b"K\x06tq", b"K\x05tq", "24 bytes and not 5"),
    "another type": (b"FloatStorage", b"DoubleStorage", "24 bytes and not 6"),
    "an unknown type": (b"FloatStorage", b"QInt8Storage", "torch.QInt8Storage, which is unknown"),
    "a type of another module": (b"ctorch\nFloatStorage", b"ctorche\nFloatStorage", "torche.FloatStorage, which is unknown"),
    "an offset": (b"QK\x00K\x02", b"QK\x01K\x02", "out of bounds"),
    "a negative offset": (b"QK\x00K\x02", b"QJ\xff\xff\xff\xffK\x02", "invalid storage offset -1"),
    "a size": (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "out of bounds"),
    "a negative size": (b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", "sizes=.-1, 3"),
    "a wrapping size": (b"K\x02K\x03\x86", b"\x8a\x09" + bytes(8) + b"\x01K\x03\x86", "more elements than the file has bytes"),
    "a stride": (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "out of bounds"),
    "a negative stride": (b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "Negative strides"),
    "too few strides": (b"K\x03K\x01\x86", b"K\x03\x85", "damaged"),
    "a fraction": (b"QK\x00K\x02", b"QG" + bytes(8) + b"K\x02", "damaged"),
    "a missing record": (b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x00xq", "no record data/x"),
    "a record elsewhere": (b"X\x01\x00\x00\x000q", b"X\x0b\x00\x00\x00../data.pklq", "data/../data.pkl"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_tensor_stays_within_its_bytes(forgery: str, good: str) -> None:
    old, new, reason = FORGED[forgery]

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    refused(repickled("evil.pth", change), reason)


def test_a_small_file_cannot_fill_the_memory(good: str) -> None:
    refused(with_opcodes(b"K\x01r\xff\xff\xff\x7f"), "exhaust the memory")  # memo of two billion entries
    refused(with_opcodes(b"K\x01p2147483647\n"), "exhaust the memory")
    refused(with_opcodes(b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00"), "damaged")  # a string of a terabyte
    many: Any = [1]
    for _ in range(12):
        many = [many] * 10  # a trillion values in a kilobyte
    itself: dict[str, Any] = {}
    itself["a"] = itself
    for config, reason in ((many, "no configuration but over 100000 values"), (itself, "damaged .RecursionError")):
        torch.save({"state_dict": STATE, "config": {"deep": config}}, "evil.pth")
        refused("evil.pth", reason)


@pytest.mark.parametrize("shape", [(2**20, 2**20), (2**40, 2**40), (200, 200)])
def test_a_tensor_cannot_repeat_its_values_without_end(shape: tuple[int, int], good: str) -> None:
    """Of stride 0: nothing is outside of the storage, and a copy of it takes terabytes."""
    sizes = b"".join(b"\x8a\x08" + size.to_bytes(8, "little") for size in shape)

    def change(data: bytes) -> bytes:
        assert (old := b"K\x02K\x03\x86") in data and b"K\x03K\x01\x86" in data
        return data.replace(old, sizes + b"\x86", 1).replace(b"K\x03K\x01\x86", b"K\x00K\x00\x86", 1)

    refused(repickled("evil.pth", change), r"state_dict\['w'\] has more elements than the file has bytes")


def test_many_tensors_cannot_repeat_a_storage_without_end() -> None:
    values = torch.ones(1000)
    torch.save({"state_dict": {f"w{i}": values.expand(10, 1000) for i in range(1000)}}, "many.pth")
    refused("many.pth", "more elements than the file has bytes")


@pytest.mark.parametrize("nest", [b"\x85" * 300_000, b"q\x63h\x63\x85" * 300_000], ids=["directly", "by the memo"])
def test_a_deep_key_cannot_crash_the_process(nest: bytes, good: str) -> None:
    """The hash of tuples in tuples recurses without a check: pickle and torch's own unpickler end by a segmentation fault."""
    refused(with_opcodes(b"N)" + nest + b"K\x01"), "exhaust the memory or the stack")
    shallow = with_opcodes(b"N)" + b"\x85" * 49_000 + b"K\x01")
    assert same(read_checkpoint(shallow).state_dict, STATE)


# -- damage ------------------------------------------------------------------------------------------------------------


def read_or_refuse(file: str) -> ImportedCheckpoint | None:
    try:
        return read_checkpoint(file, key="my_key")
    except ValueError as error:  # nothing else comes out
        assert str(error).startswith(f"my_key: {file} is ")
        return None


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def test_each_of_300_flipped_bits_is_refused_or_harmless(good: str) -> None:
    rng, whole, refusals = random.Random(0), Path(good).read_bytes(), 0
    for _ in range(300):
        Path("bad.pth").write_bytes(flipped(whole, rng))
        found = read_or_refuse("bad.pth")
        refusals += found is None
        assert found is None or same(found.state_dict, STATE) and found.config == {"hidden_size": 4, "topk": [1, 5]}
    assert 0 < refusals < 300  # the optimiser's bytes are not looked at


def test_each_flipped_bit_of_a_weight_is_refused(good: str) -> None:
    whole = Path(good).read_bytes()
    start = whole.index(STATE["w"].numpy().tobytes())
    for at in range(start, start + 24):
        Path("bad.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused("bad.pth", "damaged .*CRC-32")


def test_each_truncation_is_refused(good: str) -> None:
    rng, whole = random.Random(0), Path(good).read_bytes()
    for size in [0, 1, 3, 4, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(50))]:
        Path("bad.pth").write_bytes(whole[:size])
        assert read_or_refuse("bad.pth") is None


@pytest.mark.slow
def test_a_damaged_pickle_fails_by_name_only(good: str, trap: Path) -> None:
    """With a right CRC-32: as an attacker would write it."""
    rng, results = random.Random(0), []
    for _ in range(500):
        results.append(read_or_refuse(repickled("bad.pth", lambda data: flipped(data, rng))))
    assert any(results) and not all(results) and not trap.exists()


def test_damaged_safetensors_fail_by_name_only() -> None:
    save_file(STATE, "good.safetensors")
    rng, whole = random.Random(0), Path("good.safetensors").read_bytes()
    damaged = [flipped(whole, rng) for _ in range(100)] + [whole[: rng.randrange(len(whole))] for _ in range(50)]
    results = []
    for data in damaged:
        Path("bad.safetensors").write_bytes(data)
        results.append(read_or_refuse("bad.safetensors"))
    assert not all(results[:100]) and not any(results[100:])
