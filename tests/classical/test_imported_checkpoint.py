"""Checkpoints of RecBole's own trainer are read whole, and nothing in a checkpoint is executed, imported or changed."""

from __future__ import annotations

import collections
import importlib
import io
import os
import pickle
import random
import re
import runpy
import subprocess
import sys
import time
import timeit
import webbrowser
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from recbole.config import Config
from recbole.trainer import Trainer
from safetensors.torch import save_file

from recbole_llm.classical import imported_checkpoint
from recbole_llm.classical.imported_checkpoint import ImportedCheckpoint, read_checkpoint
from recbole_llm.classical.trainer import ProtocolTrainer

Assemble = Callable[..., SimpleNamespace]
STATE = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


def same(found: dict[str, torch.Tensor], expected: Any) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == t.dtype and found[name].shape == t.shape and torch.equal(found[name], t)
        for name, t in expected.items()
    )


def changed(file: str, change: Callable[[str, bytes], bytes | None], source: str = "good.pth", **kwargs: Any) -> str:
    """A copy of a torch file whose records, name without folder, went through ``change``; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", **kwargs) as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return file


def repickled(file: str, change: Callable[[bytes], bytes]) -> str:
    return changed(file, lambda name, data: change(data) if name == "data.pkl" else data)


@pytest.fixture
def good() -> str:
    """A small checkpoint with all that RecBole's have."""
    weights = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.Adam([weights])
    weights.sum().backward()
    optimizer.step()
    content = {
        "config": {"hidden_size": 4, "topk": [1, 5]},
        "epoch": 3,
        "state_dict": collections.OrderedDict(STATE),
        "other_parameter": None,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, "good.pth")
    return "good.pth"


# -- what is read ------------------------------------------------------------------------------------------------------


def written_by_recbole(run: SimpleNamespace) -> str:
    """The file that RecBole's unmodified trainer writes for a trained model, its own ``Config`` in it."""
    run.trainer.fit(run.train, run.valid, show_progress=False, saved=False)
    run.trainer.saved_model_file = "recbole.pth"
    Trainer._save_checkpoint(run.trainer, 7, verbose=False)
    return "recbole.pth"


@pytest.mark.parametrize(("model", "size"), [("SASRec", "hidden_size"), ("BPR", "embedding_size")])
@pytest.mark.parametrize("whose", ["recbole", "ours"])
def test_recboles_own_checkpoint_is_read(
    model: str, size: str, whose: str, assemble: Assemble, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = assemble(model, settings, **{size: 24})
    if whose == "recbole":  # nothing of this package is in the pickle
        monkeypatch.setattr(sys, "argv", ["recbole"])
        values = {"data_path": settings["data_path"], size: 24, "seed": 3, "loss_type": "BPR"}
        run.trainer.config = Config(model, "tiny", config_dict=values)
    file = written_by_recbole(run)
    with pytest.raises(pickle.UnpicklingError):  # what this module is for
        torch.load(file, weights_only=True)
    found = read_checkpoint(file)
    assert isinstance(found, ImportedCheckpoint) and same(found.state_dict, run.model.state_dict())
    assert found.config[size] == 24 and found.config["model"] == model and found.config["eval_args"]["order"]
    assert found.config["seed"] == run.trainer.config["seed"] and found.config["topk"] == run.trainer.config["topk"]
    assert {"device", "MODEL_TYPE"} <= run.trainer.config.final_config_dict.keys() - found.config.keys()  # not plain


def test_the_weights_are_ready_for_a_model(assemble: Assemble, settings: dict[str, Any]) -> None:
    run = assemble("SASRec", settings)
    state = read_checkpoint(written_by_recbole(run)).state_dict
    expected = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter)
    run.model.load_state_dict(state)
    assert same(run.model.state_dict(), expected)
    assert all(t.device.type == "cpu" and not t.requires_grad for t in state.values())
    next(iter(state.values())).add_(1)  # memory of its own


def test_our_own_checkpoint_is_read(assemble: Assemble, settings: dict[str, Any]) -> None:
    run = assemble("BPR", settings, embedding_size=24)
    run.trainer.saved_model_file = "ours.pth"
    ProtocolTrainer._save_checkpoint(run.trainer, 0, verbose=False)
    found = read_checkpoint(Path("ours.pth"))
    assert same(found.state_dict, run.model.state_dict())
    assert found.config == run.config.plain() and found.config["embedding_size"] == 24


def test_safetensors_are_read() -> None:
    save_file(STATE, "state.safetensors")
    found = read_checkpoint("state.safetensors")
    assert same({name: found.state_dict[name] for name in STATE}, STATE) and found.config == {}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_of_every_kind_come_back_bit_equal(protocol: int) -> None:
    base = torch.randn(6, 4)
    dtypes = {str(dtype): base.to(dtype) for dtype in set(imported_checkpoint._DTYPES.values())}
    state = {
        **dtypes,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "hollow": torch.zeros(3, 0).T,
        "view": base[::2, 1:],
        "transposed": base.T,
        "shared": base,
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(base.half()),
        "gradient": base.clone().requires_grad_(),
    }
    torch.save({"state_dict": state, "config": None}, "state.pth", pickle_protocol=protocol)
    found = read_checkpoint("state.pth")
    assert same(found.state_dict, state) and found.config == {}
    assert found.state_dict["shared"].data_ptr() == found.state_dict["transposed"].data_ptr()


def test_what_is_not_plain_is_left_out_of_the_config() -> None:
    nested = {"keep": [1, object(), (None, 2.5)], "drop": torch.float32, "tensor": torch.ones(1), "set": {1}}
    config = {"a": 1, "b": nested, "device": torch.device("cpu"), 3: 4, "n": np.float64(1), "t": "ä", "no": False}
    torch.save({"state_dict": STATE, "config": config}, "file.pth")
    plain = {"a": 1, "b": {"keep": [1, [None, 2.5]]}, "t": "ä", "no": False}
    assert read_checkpoint("file.pth").config == plain


def test_a_pickle_full_of_other_objects_is_read() -> None:
    """DIN's checkpoint holds the dataset, ItemKNN's a scipy matrix."""
    others = [
        scipy.sparse.eye(3).tocsr(),
        np.arange(3),
        np.float64(2),
        collections.defaultdict(list, a=[1]),
        Path("x"),
        {1, 2},
        frozenset("ab"),
        collections.Counter("ab"),
        re.compile("a"),
        range(3),
        complex(1, 2),
        collections.deque([1]),
        bytearray(3),
        SimpleNamespace(a=1),
        torch.optim.Adam,
        np.random.default_rng(0),
        collections.OrderedDict(a=1),
        slice(1),
    ]
    for protocol in (2, 4):
        torch.save({"state_dict": STATE, "other_parameter": others}, "file.pth", pickle_protocol=protocol)
        assert same(read_checkpoint("file.pth").state_dict, STATE)


def test_only_the_state_dict_costs_memory(good: str) -> None:
    """An optimiser is twice the size of its model; its bytes are not even looked at."""
    file = changed("less.pth", lambda name, data: None if len(data) == 4000 else data)
    with pytest.raises(RuntimeError, match="data/"):
        torch.load(file)
    assert same(read_checkpoint(file).state_dict, STATE)


# -- nothing is executed -----------------------------------------------------------------------------------------------

TRAP = """
from pathlib import Path
def spring(*args, **kwargs):
    Path("executed").touch()
    return dict
spring()
class New:
    def __new__(cls, *args, **kwargs):
        spring()
        return object.__new__(cls)
class State:
    def __setstate__(self, state): spring()
class Item:
    def __setitem__(self, key, value): spring()
    def append(self, value): spring()
    def add(self, value): spring()
class Extend:
    def extend(self, values): spring()
class Hash:
    def __hash__(self):
        spring()
        return 1
class Arguments:
    def __init__(self, *args): spring()
class Outer:
    inner = spring
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when something was executed; even importing the module ``trap`` makes it appear."""
    Path("trap.py").write_text(TRAP)
    Path("hubconf.py").write_text("from trap import spring")
    monkeypatch.syspath_prepend(str(tmp_path))

    def browser(url: str) -> None:
        Path("executed").touch()

    browser.__module__, browser.__qualname__ = "webbrowser", "open"
    monkeypatch.setattr(webbrowser, "open", browser)
    for module in ("trap", "hubconf"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path / "executed"


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


CODE = "__import__('pathlib').Path('executed').touch()"
CALLS: dict[str, Callable[[], Any]] = {
    "system": lambda: Calls(os.system, "touch executed"),
    "eval": lambda: Calls(eval, CODE),
    "exec": lambda: Calls(exec, CODE),
    "popen": lambda: Calls(subprocess.Popen, ["touch", "executed"]),
    "import_module": lambda: Calls(importlib.import_module, "trap"),
    "import": lambda: Calls(__import__, "trap"),
    "run_path": lambda: Calls(runpy.run_path, "trap.py"),
    "touch": lambda: Calls(Path.touch, Path("executed")),
    "open": lambda: Calls(open, "executed", "w"),
    "load": lambda: Calls(partial(torch.load, weights_only=False), Calls(io.BytesIO, legacy(Calls(eval, CODE)))),
    "hub": lambda: Calls(torch.hub._load_local, ".", "spring"),
    "storage": lambda: Calls(torch.storage._load_from_bytes, legacy(Calls(eval, CODE))),
    "loads": lambda: Calls(pickle.loads, pickle.dumps(Calls(eval, CODE))),
    "partial": lambda: Calls(partial(eval, CODE)),
    "map": lambda: Calls(list, Calls(map, Calls(getattr, Calls(importlib.import_module, "builtins"), "eval"), [CODE])),
    "webbrowser": lambda: Calls(webbrowser.open, "http://localhost"),
    "timeit": lambda: Calls(timeit.timeit, CODE, "pass", timeit.default_timer, 1),
}

PLACES: dict[str, Callable[[Any], dict[Any, Any]]] = {
    "config": lambda evil: {"config": {"hidden_size": 4, "deep": {"list": [1, (evil, {"a": evil})]}}},
    "instead of a config": lambda evil: {"config": evil},
    "other_parameter": lambda evil: {"other_parameter": evil},
    "key": lambda evil: {evil: 1, (1, evil): 2},
    "optimizer": lambda evil: {"optimizer": {"state": {0: {evil: torch.ones(1)}}}},
    "attribute": lambda evil: {"state_dict": Attributed(evil)},
    "beside": lambda evil: {"epoch": evil, "state_dict": STATE},
}


class Attributed:
    """Pickles as a state dict with attributes of its own, one of them in the way."""

    def __init__(self, value: Any):
        self.value = value

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), {"_metadata": self.value, "items": self.value}, None, iter(STATE.items())


def executes(load: Callable[[], Any], trap: Path) -> bool:
    """Whether an ordinary unpickler springs the trap: what was refused or read unharmed could have done harm."""
    try:
        found = load()
    except Exception:
        found = None
    for _ in range(200):  # Popen does not wait
        if trap.exists():
            break
        time.sleep(0.01)
    del found
    return trap.exists()


def test_protocols_and_places_make_no_difference(trap: Path) -> None:
    for place, fill in PLACES.items():
        for protocol in (2, 4):
            torch.save({"state_dict": STATE, **fill(Calls(eval, CODE))}, "evil.pth", pickle_protocol=protocol)
            found = read_checkpoint("evil.pth")
            assert not trap.exists(), (place, protocol)
            assert same(found.state_dict, STATE)
            assert found.config == ({"hidden_size": 4, "deep": {"list": [1, [{}]]}} if place == "config" else {}), place
            assert executes(partial(torch.load, "evil.pth", weights_only=False), trap), place
            trap.unlink()


@pytest.mark.parametrize("call", CALLS)
def test_no_function_is_called(call: str, trap: Path) -> None:
    torch.save({"state_dict": STATE, "config": {"evil": CALLS[call]()}, "epoch": CALLS[call]()}, "evil.pth")
    assert same(read_checkpoint("evil.pth").state_dict, STATE)
    time.sleep(0.05 if call == "popen" else 0)
    assert not trap.exists() and "trap" not in sys.modules
    assert executes(partial(torch.load, "evil.pth", weights_only=False), trap)


OPCODES = {
    "GLOBAL": b"ctrap\nspring\n",
    "STACK_GLOBAL": b"\x8c\x04trap\x8c\x06spring\x93)R",
    "a dotted name": b"\x8c\x04trap\x8c\x0bOuter.inner\x93)R",
    "INST": b"(S'x'\nitrap\nspring\n",
    "INST without arguments": b"(itrap\nNew\n",
    "OBJ": b"(ctrap\nArguments\nS'x'\no",
    "REDUCE": b"ctrap\nspring\n(S'x'\ntR",
    "REDUCE of a result": b"ctrap\nspring\n)R)R",
    "NEWOBJ": b"ctrap\nNew\n(S'x'\nt\x81",
    "NEWOBJ_EX": b"ctrap\nNew\n(S'x'\nt}S'k'\nK\x01s\x92",
    "BUILD": b"ctrap\nState\n)\x81}S'append'\nK\x01sb",
    "BUILD of slots": b"ctrap\nState\n)\x81N}S'origin'\nK\x01s\x86b",
    "BUILD of anything": b"ctrap\nState\n)\x81K\x01b",
    "SETITEM": b"ctrap\nItem\n)\x81K\x01K\x02s",
    "SETITEMS": b"ctrap\nItem\n)\x81(K\x01K\x02K\x03K\x04u",
    "APPEND": b"ctrap\nItem\n)\x81K\x01a",
    "APPENDS": b"ctrap\nItem\n)\x81(K\x01K\x02e",
    "APPENDS by extend": b"ctrap\nExtend\n)\x81(K\x01K\x02e",
    "ADDITEMS": b"ctrap\nItem\n)\x81(K\x01K\x02\x90",
    "a key": b"}ctrap\nHash\n)\x81K\x01s",
    "FROZENSET": b"(ctrap\nHash\n)\x81\x91",
}
ALIEN = {  # nothing that pickles by itself asks for these
    "NEWOBJ of a result": b"ctrap\nspring\n)R)\x81",
    "BUILD of a class": b"ctrap\nState\n(N}S'spring'\nK\x01stb",
    "EXT1": b"\x82\x01",
    "BINPERSID": b"K\x01Q",
    "NEXT_BUFFER": b"\x97",
    "no such opcode": b"\xff",
}


def with_opcodes(fragment: bytes, file: str = "evil.pth") -> str:
    def change(data: bytes) -> bytes:
        assert data.endswith(b"u.")  # the end of a dict of several entries
        return data[:-2] + b"K\x07" + fragment + b"u."

    return repickled(file, change)


@pytest.mark.parametrize("opcode", OPCODES)
def test_no_opcode_reaches_what_it_names(opcode: str, good: str, trap: Path) -> None:
    file = with_opcodes(OPCODES[opcode])
    assert same(read_checkpoint(file).state_dict, STATE)
    assert not trap.exists() and "trap" not in sys.modules
    if opcode != "GLOBAL":  # of the others, more than the import must spring the trap
        importlib.import_module("trap")
        trap.unlink()
    assert executes(partial(pickle.loads, b"\x80\x04" + OPCODES[opcode] + b"."), trap)


@pytest.mark.parametrize("opcode", ALIEN)
def test_opcodes_that_make_no_sense_are_refused(opcode: str, good: str, trap: Path) -> None:
    with pytest.raises(ValueError, match=r"cf_checkpoint: evil\.pth is damaged"):
        read_checkpoint(with_opcodes(ALIEN[opcode]))
    assert not trap.exists() and "trap" not in sys.modules


@pytest.mark.parametrize(
    "name", ["torch._utils\n_rebuild_tensor_v2", "recbole_llm.classical.imported_checkpoint\nread_checkpoint"]
)
def test_no_function_can_be_changed(name: str, good: str) -> None:
    """An ordinary unpickler hands out the function itself, of which BUILD sets any attribute, for the whole process."""
    module, attribute = name.split("\n")
    function = getattr(importlib.import_module(module), attribute)
    before = function.__defaults__
    build = f"c{name}\n(N}}S'__defaults__'\n(I5\ntstb".encode()
    try:
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(with_opcodes(build))
        assert function.__defaults__ == before
        pickle.loads(build + b".")
        assert function.__defaults__ == (5,)
    finally:
        function.__defaults__ = before


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
