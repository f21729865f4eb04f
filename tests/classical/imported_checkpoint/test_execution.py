"""Nothing in a checkpoint is executed, imported or changed."""

from __future__ import annotations

import collections
import importlib
import io
import os
import pickle
import runpy
import subprocess
import sys
import time
import timeit
import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.classical.imported_checkpoint import read_checkpoint
from tests.classical.imported_checkpoint.conftest import STATE, Calls, legacy, same, with_opcodes

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
