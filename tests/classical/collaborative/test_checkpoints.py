"""A part may be read from a file of RecBole or of this package, which is never executed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed
from safetensors.torch import save_file

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.config import LLMConfig
from tests.classical.collaborative.conftest import SMALL, Make, asked, close
from tests.conftest import write_dataset

NUMBERS = itertools.count()


@pytest.fixture
def plain(shared_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Any]]:
    """Train a model with nothing but RecBole; returns the file that it saved and the model."""

    def plain(name: str, dataset_path: Any = None, **values: Any) -> tuple[str, Any]:
        monkeypatch.setattr(sys, "argv", ["recbole"])
        settings = {
            "data_path": str(dataset_path or shared_settings["data_path"]),
            "checkpoint_dir": "saved",
            "show_progress": False,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "epochs": 1,
            "train_batch_size": 64,
            "seed": 3,
            "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
            **values,
        }
        if name != "BPR":
            settings["train_neg_sample_args"] = None
        config = Config(name, "tiny", config_dict=settings)
        init_seed(3, True)
        data = create_dataset(config)
        train, valid, _ = data_preparation(config, data)
        model = get_model(name)(config, train._dataset)
        trainer = Trainer(config, model)
        trainer.fit(train, valid, show_progress=False)
        file = Path(trainer.saved_model_file)  # RecBole's names have a resolution of one second, at which tests collide
        return str(file.rename(file.with_stem(f"{file.stem}-{next(NUMBERS)}"))), model.eval()

    return plain


PLAIN = {
    "SASRec": {"hidden_size": 24, "inner_size": 20, "n_heads": 3, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 7},
    "BPR": {"embedding_size": 24},
    "NextItNet": {"embedding_size": 8, "block_num": 1, "MAX_ITEM_LIST_LENGTH": 20},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_file_of_plain_recbole_gives_its_model_with_sizes_read_from_it(make: Make, plain: Any, name: str) -> None:
    file, model = plain(name, **PLAIN[name])
    cf = make(name, checkpoint=file, values={})
    interaction, users, histories = asked(cf)
    if name != "BPR":
        assert interaction["item_id_list"].shape[1] == PLAIN[name]["MAX_ITEM_LIST_LENGTH"]
    with torch.no_grad():
        own = model.full_sort_predict(interaction).view(len(users), -1)
    assert own.std() > 0
    close(cf.scores(interaction), own)
    close(cf.user_states(users, histories) @ cf.item_table.T, own)  # NextItNet's as RecBole reads it, too


def test_a_file_of_our_own_trainer_is_read_as_it_was_trained(make: Make, settings: dict[str, Any], assemble: Any) -> None:
    made = assemble("NextItNet", {**settings, **SMALL})  # on whole sequences
    made.trainer.fit(made.train, made.valid, show_progress=False)
    made.trainer.load_best()
    made.model.eval()
    cf = make("NextItNet", checkpoint=made.trainer.saved_model_file, values={})
    interaction, users, histories = asked(cf)
    with torch.no_grad():
        close(cf.user_states(users, histories), made.model(interaction["item_id_list"]))


def test_a_file_in_the_home_folder_and_one_in_safetensors_will_do(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make("BPR")
    save_file(trained.model.state_dict(), tmp_path / "bpr.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(make("BPR", checkpoint="~/bpr.safetensors", values=SMALL).item_table, trained.item_table)


def test_a_file_of_another_catalogue_or_size_is_refused_by_name(make: Make, plain: Any, tmp_path: Path) -> None:
    file, _ = plain("BPR", embedding_size=8)
    with pytest.raises(ValueError, match=f"cf_checkpoint: .*{Path(file).name} does not fit BPR on tiny .*size mismatch"):
        make("BPR", checkpoint=file, values={"embedding_size": 16})
    with pytest.raises(ValueError, match=r"does not fit SASRec on tiny \(Missing key.*Give the dataset .*--cf_model"):
        make("SASRec", checkpoint=file, values={})
    smaller, _ = plain("BPR", dataset_path=write_dataset(tmp_path / "smaller", items=30), embedding_size=8)
    with pytest.raises(ValueError, match=f"cf_checkpoint: .*{Path(smaller).name} does not fit BPR on tiny .*embedding"):
        make("BPR", checkpoint=smaller, values={})


def test_counts_beside_the_weights_are_read_too(make: Make, plain: Any, tmp_path: Path) -> None:
    """RecBole's Pop has no weights, only counts."""
    file, model = plain("Pop")
    cf = make("Pop", checkpoint=file, values={})
    interaction, users, _ = asked(cf)
    own = model.full_sort_predict(interaction).view(len(users), -1)
    assert own.std() > 0
    close(cf.scores(interaction), own.float())
    smaller, _ = plain("Pop", dataset_path=write_dataset(tmp_path / "smaller", items=30))
    with pytest.raises(ValueError, match=r"does not fit Pop on tiny \(item_cnt: size mismatch, \[31, 1\] and"):
        make("Pop", checkpoint=smaller, values={})


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_a_malicious_file_is_refused_unexecuted(make: Make) -> None:
    torch.save({"state_dict": {"item_embedding.weight": Trap()}}, "trap.pth")
    with pytest.raises(ValueError, match="cf_checkpoint: trap.pth is refused: state_dict.*is no ordinary tensor"):
        make("BPR", checkpoint="trap.pth", values={})
    assert not Path("executed").exists()
    torch.load("trap.pth", weights_only=False)
    assert Path("executed").exists()  # the trap works


def test_another_file_is_another_stage_and_a_copy_is_not(make: Make, shared_settings: dict[str, Any]) -> None:
    state = {name: tensor.clone() for name, tensor in make("BPR").model.state_dict().items()}

    def fingerprint(file: str) -> str:
        save_file(state, file)
        return CollaborativeModel(LLMConfig("ALLMRec", "tiny", config_dict=shared_settings), "BPR", SMALL, file).stage.fingerprint

    first, copy = fingerprint("one.safetensors"), fingerprint("copy.safetensors")
    next(iter(state.values()))[1, 0] += 1e-3
    assert first == copy != fingerprint("changed.safetensors")
    assert make("BPR").stage.fingerprint != first  # trained, not taken over
