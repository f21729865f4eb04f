"""Checkpoints of RecBole's own trainer and of ours are read whole."""

from __future__ import annotations

import collections
import pickle
import re
import sys
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
from tests.classical.imported_checkpoint.conftest import STATE, Assemble, changed, same


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
