"""Shared fixtures: a tiny atomic dataset whose titles tell what comes next, and a tiny causal LM in a folder.

Everything is made on the fly under a temporary folder; nothing is downloaded, and a test that tries is told so.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from recbole_llm import compat

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test ends with the machine, and waiting for the disk is a fifteenth of the time
gc.set_threshold(10_000)  # by default, a tenth of the time goes to searches in the half million objects of the imported libraries
compat.apply()  # for tests that use RecBole's own Config


def pytest_collection_finish() -> None:
    """Leave what was imported until now out of searches for garbage."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests do not use the network, but something connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write log/ and saved/ where they stand: never into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Tests that read the log do not depend on which test configured it before."""
    caplog.set_level("INFO")


@pytest.fixture(autouse=True)
def _log_handlers() -> Iterator[None]:
    """No handler of a run outlives the test, whose standard error is closed by then."""
    yield
    for handler in [*logging.getLogger().handlers]:
        if type(handler).__module__ == "recbole_llm.logs":
            logging.getLogger().removeHandler(handler)
            handler.close()


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_dataset(folder: Path, name: str = "tiny", users: int = 60, items: int = 40, seed: int = 0) -> Path:
    """An atomic dataset with titles, years and two categories; item i is mostly followed by item i + 1."""
    rng = np.random.default_rng(seed)
    target = folder / name
    target.mkdir(parents=True)
    words = ["red", "blue", "green", "old", "new"], ["river", "house", "wolf", "train", "song", "winter", "king", "sea"]
    rows = [
        f"i{i}\tThe {words[0][i % 5]} {words[1][i // 5]}\t{1980 + i}\t{'drama' if i % 2 else 'comedy'} film" for i in range(items)
    ]
    (target / f"{name}.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tyear:token\tgenre:token_seq", *rows]) + "\n")
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(users):
        item, seen = int(rng.integers(items)), []
        for step in range(int(rng.integers(5, 14))):
            seen.append(item)
            lines.append(f"u{user}\ti{item}\t{1_000_000_000 + user * 7 + step * 3}")
            item = (item + 1) % items if rng.random() < 0.8 else int(rng.integers(items))
            while item in seen:
                item = (item + 1) % items
    (target / f"{name}.inter").write_text("\n".join(lines) + "\n")
    return folder


def write_predictions(file: Path, users: int = 60, items: int = 40, seed: int = 0) -> Path:
    """Scores of all items for all users of ``tiny``, for the model Imported."""
    scores = np.random.default_rng(seed).random((users, items))
    lines = [f"u{user},i{item},{scores[user, item]}" for user in range(users) for item in range(items)]
    file.write_text("\n".join(["user_id,item_id,score", *lines]) + "\n")
    return file


def write_rows(folder: Path, name: str, rows: Sequence[tuple[str, str, float]], file: str = "") -> Path:
    """The ``.inter`` file of a dataset without titles, or one of its split files; returns ``folder``."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in rows), ""]
    (folder / name / f"{name}{file and '.'}{file}.inter").write_text("\n".join(lines))
    return folder


def dealt_anew(rows: list[list[str]], targets: dict[str, str], seed: int = 0) -> list[list[str]]:
    """Rows (user, item, time) with the targets of all users dealt out among them; nobody gets an item that they know."""
    known: dict[str, set[str]] = {}
    for user, item, _ in rows:
        known.setdefault(user, set()).update({item} - {targets.get(user)})  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    users, items = list(targets), rng.permutation(list(targets.values())).tolist()
    for place, user in enumerate(users):
        if items[place] in known[user]:
            others = rng.permutation(len(users)).tolist()
            other = next(o for o in others if items[o] not in known[user] and items[place] not in known[users[o]])
            items[place], items[other] = items[other], items[place]
    dealt = dict(zip(users, items, strict=True))
    return [[user, dealt[user] if targets.get(user) == item else item, time] for user, item, time in rows]


def write_lm(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """A random Llama of a few thousand weights with a byte-level tokenizer, in the ordinary folder layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["The red river", "The blue house", "green wolf old train", "new song winter king", " A B C D E F G H I J"]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,  # large enough for scores to differ
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the datasets ``tiny`` and ``other`` and ``predictions.csv``, which both can be evaluated with."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    write_predictions(folder / "predictions.csv")
    return write_dataset(folder, "other", seed=1)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny causal LM."""
    return write_lm(tmp_path_factory.mktemp("lm") / "tiny-llama")


@pytest.fixture(scope="session")
def wide_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a causal LM that is wide enough for 4-bit kernels."""
    return write_lm(tmp_path_factory.mktemp("wide") / "wide-llama", hidden=128)


def tiny_settings(data_path: Path, tiny_lm: Path, folder: Path) -> dict[str, Any]:
    """Settings that make any model run on ``tiny`` in seconds, and learn something."""
    return {
        "data_path": str(data_path),
        "checkpoint_dir": str(folder / "saved"),
        "show_progress": False,
        "epochs": 1,
        "train_batch_size": 64,
        "year_field": "year",
        "category_field": "genre",
        "llm_path": str(tiny_lm),
        "candidates": {"num_negatives": 9},
        "train_samples": 32,
        "lora_epochs": 4,
        "lora_batch_size": 8,
        "r": 4,
        "prompt": "history",
        "lora_train_mode": "sequence",
        "lora_learning_rate": 5e-2,
        "lora_eval_steps": None,
        "max_history": 5,
        "valid_users": 20,
        "merge_prompts": 8,
        "merge_steps": 2,
        "merge_points": 3,
        "domain_min_users": 5,
        "topk": [1, 5],
        "eval_args": {"mode": "candidates"},
        "metrics": ["Hit", "NDCG", "MRR"],
        "valid_metric": "NDCG@5",
        "soft_prompt": "allmrec_history",
        "user_text": "{user}",
        "user_before_bos": False,
        "title_quote": "",
        "top_k_target": 1,
        "train_positions": "all",
        "lora_valid": "ranking",
        "general_positions": "all",
        "general_samples": 32,
        "general_epochs": 4,
        "merge_start": "lattice",
        "merge_first_tokens": 0,
        "merge_beside": {},
        "system": None,
        "history_separator": "\n",
        "candidate_separator": "\n",
        "history_label": "",
        "joint_size": 16,
        "builtin_text_encoder": {"dim": 16, "vocab_size": 300},
        "stage1_epochs": 2,
        "stage2_epochs": 2,
        "stage1_learning_rate": 1e-2,
        "stage2_learning_rate": 1e-2,
        "stage1_batch_size": 16,
        "stage2_batch_size": 16,
        "num_experts": 3,
        "prefix_length": 2,
        "m_former_hidden_size": 16,
        "m_former_num_layers": 2,
        "m_former_num_heads": 2,
        "cf_model": "SASRec",
        "laser_batch_size": 8,
        "laser_optimizer": "AdamW",
        "lr_scheduler_type": "cosine",
        "null_share": 0.1,
        "phase1_epochs": 2,
        "phase2_epochs": 1,
        "phase1_learning_rate": 1e-2,
        "phase2_learning_rate": 1e-2,
        "predictions": str(data_path / "predictions.csv"),
        "cf_config": {"epochs": 1, "train_batch_size": 64, "hidden_size": 16, "inner_size": 32, "n_heads": 2},
        "cheap_config": {"epochs": 1, "train_batch_size": 64, "hidden_size": 16, "inner_size": 32, "n_heads": 2},
    }


@pytest.fixture
def settings(data_path: Path, tiny_lm: Path, tmp_path: Path) -> dict[str, Any]:
    """:func:`tiny_settings` for one test."""
    return tiny_settings(data_path, tiny_lm, tmp_path)


@pytest.fixture(scope="module")
def module_settings(data_path: Path, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """:func:`tiny_settings` for runs that the tests of a file share."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        yield tiny_settings(data_path, tiny_lm, folder)


@pytest.fixture(scope="session")
def shared_settings(data_path: Path, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """:func:`tiny_settings` for runs that the tests of several files share."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        yield tiny_settings(data_path, tiny_lm, folder)


def assembled(name: str, settings: dict[str, Any], dataset: str = "tiny", **changes: Any) -> SimpleNamespace:
    """A model with its config, loaders and trainer, as ``run_recbole_llm`` puts them together, not yet trained."""
    from recbole_llm import logs
    from recbole_llm.config import LLMConfig
    from recbole_llm.quick_start import assemble

    config = LLMConfig(name, dataset, config_dict={**settings, **changes})
    logs.init_logging(config)
    return SimpleNamespace(**vars(assemble(config)))


@pytest.fixture(scope="session")
def assemble() -> Callable[..., SimpleNamespace]:
    """:func:`assembled`, for tests that look inside a model or a loader."""
    return assembled
