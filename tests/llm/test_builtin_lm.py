"""The builtin LM learns what follows what, takes any title, and depends on nothing but its arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.data.prompts import PromptBuilder, PromptSettings
from recbole_llm.data.tokens import tokenise_as_text
from recbole_llm.llm.builtin_lm import BuiltinLMConfig, builtin_stage, train_builtin_lm, train_tokenizer
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.llm.scoring import Scorer
from recbole_llm.store.stages import StageCache
from recbole_llm.training import loop
from recbole_llm.training.loop import LoopOptions

THINGS = ["River", "House", "Wolf", "Train", "Song"]
FILMS = ["Alien", "Brazil", "Casino", "Dune", "Evita", "Fargo", "Gigi", "Heat", "Ikiru", "Jaws"]
TITLES = [
    "",
    *(f"The {word} {thing}" for word in ("Old", "New", "Red") for thing in THINGS),
    *(f"{film} ({year})" for year, film in enumerate(FILMS, 1970)),
    *(f"Part {numeral}" for numeral in ("I", "II", "III", "IV", "V")),
]
HOSTILE = [
    "<s>",
    "</s><pad>",
    "🎬👩‍👩‍👧 emoji",
    "שלום עולם",
    "a\x00b\x1f\tc\nd",
    "é vs é",
    "\u202eRTL",
    "x" * 5000,
    "[HistoryEmb] || {history}",
]
TINY = BuiltinLMConfig(
    vocab_size=800,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    window=6,
    tokens=24_000,
    batch_tokens=100,
    learning_rate=1e-2,
    matrix_learning_rate=0.05,
)
SHORT = BuiltinLMConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, window=6, tokens=1500, batch_tokens=200)

QUIET = LoopOptions(show_progress=False)


def chains(users: int = 120, seed: int = 0) -> list[np.ndarray]:
    """Histories in which item i is followed by item 7 i mod 31: a walk through all thirty titles."""
    starts = np.random.default_rng(seed).integers(1, 31, size=users)
    return [np.array([start * 7**step % 31 for step in range(9)]) for start in starts.tolist()]


def short(folder: Path, config: BuiltinLMConfig = SHORT, save_every: float = 20.0, **settings: Any) -> None:
    """A training of a few steps."""
    options = LoopOptions(save_every=save_every, show_progress=False)
    train_builtin_lm(folder, titles=TITLES, histories=chains(), config=config, options=options, **settings)


def weights(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("builtin")
    train_builtin_lm(folder, titles=TITLES, histories=chains(), config=TINY, seed=1, options=QUIET)
    return folder


def test_it_learns_which_title_follows(trained: Path) -> None:
    lm = load_causal_lm(trained)
    prompts = PromptBuilder(lm.tokenizer, TITLES, settings=PromptSettings("{history}", max_history=6))
    histories = [history.tolist() for history in chains(30, seed=5)]
    scores = Scorer("naive", "sum", lm.tokenizer.pad_token_id, 8192)(
        lm.model, [prompts.prompt(history[:-1]) for history in histories], [prompts.answers[1:]] * len(histories)
    )  # [30, 30]
    hits = scores.argmax(-1) + 1 == torch.tensor([history[-1] for history in histories])
    assert hits.float().mean() > 0.7  # chance is 1 in 30


def test_it_is_an_ordinary_folder(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert tokenizer("Part II").input_ids[0] == 1
    assert not list(trained.glob("*.bin")) and not list(trained.glob("*.pkl"))


@pytest.mark.parametrize("title", HOSTILE)
def test_any_title_goes_through_the_tokenizer_as_text(trained: Path, title: str) -> None:
    tokenizer = load_causal_lm(trained).tokenizer
    for ids in (tokenise_as_text(tokenizer, [title])[0], tokenizer(title, add_special_tokens=False).input_ids):
        assert tokenizer.decode(ids) == title
        assert all(2 < token < len(tokenizer) for token in ids)


def test_frequent_titles_become_one_token() -> None:
    counts = [900 if "House" in title else 1 for title in TITLES]
    tokenizer = train_tokenizer(TITLES, counts, 330)
    lengths = {title: len(ids) for title, ids in zip(TITLES, tokenise_as_text(tokenizer, TITLES), strict=True)}
    assert lengths["The Old House"] == lengths["The Red House"] == 1 < lengths["Gigi (1976)"]


def test_hostile_catalogue_trains_and_cuts_titles(tmp_path: Path) -> None:
    histories = [[item % len(HOSTILE) for item in range(start, start + 4)] for start in range(9)]
    train_builtin_lm(tmp_path, titles=HOSTILE, histories=histories, config=SHORT, options=QUIET)
    assert load_causal_lm(tmp_path).model.config.vocab_size <= 300


def test_bit_equal_whatever_the_global_random_state(tmp_path: Path) -> None:
    for run, state in enumerate((1, 2)):
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.get_rng_state()
        short(tmp_path / str(run), seed=3)
        assert torch.equal(before, torch.get_rng_state())
    assert weights(tmp_path / "0") == weights(tmp_path / "1")
    short(tmp_path / "2", seed=4)
    assert weights(tmp_path / "0") != weights(tmp_path / "2")


def test_killed_and_resumed_is_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short(tmp_path / "whole")
    step: Callable[[Any], Any] = loop.TrainingLoop._step

    def die(self: loop.TrainingLoop) -> Any:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.TrainingLoop, "_step", die)
        short(tmp_path / "killed", scratch=tmp_path / "scratch", save_every=0)
    assert list((tmp_path / "scratch" / "loop").glob("step-4"))
    short(tmp_path / "resumed", scratch=tmp_path / "scratch", save_every=0)
    assert weights(tmp_path / "whole") == weights(tmp_path / "resumed")


def test_the_stage_follows_config_seed_and_data_and_not_what_is_shown(tmp_path: Path) -> None:
    domain: Any = SimpleNamespace(items=SimpleNamespace(names=TITLES), histories=chains(), fingerprint="one")
    other: Any = SimpleNamespace(items=domain.items, histories=domain.histories, fingerprint="two")
    settings = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 400}
    cache = StageCache(tmp_path)
    stages = [
        builtin_stage(settings, [domain], 1, QUIET),
        builtin_stage(settings, [domain], 2, QUIET),
        builtin_stage(settings, [other], 1, QUIET),
        builtin_stage(settings | {"tokens": 401}, [domain], 1, QUIET),
    ]
    assert len({stage.fingerprint for stage in stages}) == 4
    assert load_causal_lm(cache.run(stages[0])).model.config.hidden_size == 16
    assert stages[0].fingerprint == builtin_stage(settings, [domain], 1, LoopOptions(save_every=0)).fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_float32_under_autocast(tmp_path: Path, dtype: str) -> None:
    config = BuiltinLMConfig(**(vars(SHORT) | {"tokens": 300, "dtype": dtype}))
    short(tmp_path, config)
    assert load_causal_lm(tmp_path, dtype="auto", device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "builtin_lm.vocab_size: 100 has no room"),
        ({"tokens": 0}, "builtin_lm.tokens: 0 must be at least 1"),
        ({"hidden_size": 100, "num_heads": 3}, "builtin_lm.hidden_size: 100 is not a multiple"),
        ({"dtype": "float16"}, "builtin_lm.dtype: 'float16'"),
        ({"hiden_size": 64}, "builtin_lm.hiden_size is unknown; there is hidden_size"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuiltinLMConfig.read(settings)


@pytest.mark.parametrize(
    ("titles", "histories", "message"),
    [
        (["", ""], [[1]], "titles: no item has one"),
        (TITLES, [[], []], "histories: the training split is empty"),
        (TITLES, [[1, 2], [3, 99]], "histories: item 99 of history 1 has no title, there are 31"),
        (TITLES, [[-1]], "histories: item -1 of history 0"),
    ],
)
def test_wrong_data_are_named(tmp_path: Path, titles: list[str], histories: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_builtin_lm(tmp_path, titles=titles, histories=histories, config=SHORT)
