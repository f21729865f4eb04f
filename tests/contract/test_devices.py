"""Every model on a pretend accelerator, with a placed backbone, in bfloat16 and in 4 bits, as far as a CPU can run them.

Nothing on the pretend device may meet a tensor that was left on the CPU; see ``tests/pretend_device.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pretend_device import PRETEND, pretend_device
from torch import Tensor, nn

from recbole_llm.config import LLMConfig
from recbole_llm.llm import backbones, memory
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.model.merges import stages as merged
from recbole_llm.registry import MODELS, SHORTCUTS
from recbole_llm.training.loop import LoopOptions, TrainingLoop

CF = {"epochs": 1, "train_batch_size": 64, "hidden_size": 16, "inner_size": 32, "n_heads": 2}
SHORT: dict[str, Any] = {
    **{key: 1 for key in ("lora_epochs", "stage1_epochs", "stage2_epochs", "phase1_epochs", "phase2_epochs", "merge_steps")},
    **{"train_samples": 16, "lora_batch_size": 16, "save_every_seconds": 0, "valid_users": 6, "eval_users": 6},
    **{"merge_prompts": 3, "merge_points": 2, "domain_max_views": 1, "retriever_top": 4, "retriever_config": CF},
}
LISTWISE = {"prompt": "listwise", "lora_train_mode": "prefix"}
ON_AN_LM = [name for name in MODELS if name not in ("AlphaRec", "Imported", *SHORTCUTS)]
OWN: dict[str, dict[str, Any]] = {
    "LlamaRec": {"lora_train_mode": "prefix"},
    "MoLoRec": {"merge_learning_rate": [0.5, 1.0]},
    "Cascade": {"llm_ranker": "TALLRec", "cheap_config": CF},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: OWN.get(name, {}) for name in MODELS},
    "TALLRec naive": {"scorer": "naive", **LISTWISE},
    "TALLRec prefix": {"scorer": "prefix", "normalize": "pmi"},
    "TALLRec full ranking": {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}, "shuffled_title_control": True},
    "TALLRec retriever": {"candidates": {"num_negatives": 9, "source": "retriever"}},
    "TALLRec builtin": {
        "llm_path": "builtin",
        "builtin_lm": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 400, "batch_tokens": 256, "vocab_size": 300},
    },
    "LoRACocktail first tokens": {"merge_first_tokens": 3, "merge_granularity": "module", **LISTWISE},
    "LoRACocktail grid": {"merge": "grid"},
    "LoRACocktail ties": {"merge": "ties", "merge_compress_rank": 2},
    "WeaveRec controls": {"weave_controls": ["data_merging", "naive_merging"]},
    "ALLMRec tuned": {"tune_text_encoder": True, "soft_prompt": "allmrec", "item_vectors": "random"},
    "ALLMRec LightGCN": {"cf_model": "LightGCN", "normalize": "pmi"},
    "Laser warm-up": {"warmup_epochs": 1, "cf_model": "GRU4Rec", "pooling": "mean", "single_share": 0.5, "null_share": 0.5},
    "Laser full ranking": {"eval_args": {"mode": "full"}, "valid_metric": "NDCG@5", "cf_states": "items", "cf_model": "BPR"},
    **{name: {} for name in ("SASRec", "BERT4Rec", "GRU4Rec", "LightGCN", "BPR")},
}


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A pretend device, on which every configuration is."""
    init_device = LLMConfig._init_device

    def on_the_device(config: LLMConfig) -> None:
        init_device(config)
        config["device"] = PRETEND

    monkeypatch.setattr(LLMConfig, "_init_device", on_the_device)
    monkeypatch.setattr(memory, "free_memory", lambda *_: 2**30)
    with pretend_device() as device:
        yield device


@pytest.fixture
def run(assemble: Callable[..., SimpleNamespace], settings: dict[str, Any]) -> Callable[..., SimpleNamespace]:
    """Train one case, and evaluate all its rows."""

    def run(case: str, **changes: Any) -> SimpleNamespace:
        cf = CF | ({"embedding_size": 16} if "cf_model" in CASES[case] else {})
        made = assemble(case.split()[0], {**settings, **SHORT, **CASES[case], "cf_config": cf, **changes})
        made.trainer.fit(made.train, made.valid)
        made.results = {}
        for name, variant in made.trainer.recommender.variants().items():
            made.results[name] = made.trainer.evaluate(made.test, load_best_model=False, variant=variant)
        assert all(np.isfinite(value) for result in made.results.values() for value in result.values())
        return made

    return run


DEAR = ("MoLoRec", "WeaveRec", "Laser", "Cascade")  # the first two train and merge as LoRACocktail does

# -- the pretend device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in MODELS or case in DEAR)) for case in CASES]
)
def test_a_model_trains_merges_and_scores_on_a_device(case: str, run: Any, on_device: torch.device) -> None:
    made = run(case)
    assert made.config["device"] == on_device
    if made.trainer.recommender.backbone is not None:
        lm = made.model.parts.backbone.load(made.trainer.cache).model
        assert {parameter.device for parameter in lm.parameters()} == {on_device}


def test_a_scalar_on_the_cpu_that_takes_up_values_of_a_device_is_found(
    run: Any, on_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over batches as it was: ``value`` is on the CPU, as the coefficients are, and is written to."""

    def mean_over_batches(term: Any, batches: Any, **_: Any) -> Callable[[Tensor], Tensor]:
        def objective(weights: Tensor) -> Tensor:
            value = torch.zeros_like(weights[..., 0].sum())
            for batch in list(batches):
                value += term(weights.detach(), batch)
            return value

        return objective

    monkeypatch.setattr(merged, "mean_over_batches", mean_over_batches)
    with pytest.raises(RuntimeError, match=r"add_.*same device.*\[\] on cpu, \[\] on cuda:0"):
        run("LoRACocktail")


def test_a_training_resumes_on_a_device(tmp_path: Any, on_device: torch.device) -> None:
    def loop(steps: int) -> TrainingLoop:
        torch.manual_seed(0)
        layer, data = nn.Linear(3, 1).to(on_device), torch.rand(8, 3).to(on_device)
        return TrainingLoop(
            name="linear",
            parameters=dict(layer.named_parameters()),
            optimizer=torch.optim.AdamW(layer.parameters(), lr=0.1),
            loss=lambda step: [lambda: layer(data[[step % 8]]).square().sum()],
            total_steps=steps,
            validate=lambda: -float(layer(data).square().mean()),
            eval_every=1,
            folder=tmp_path,
            options=LoopOptions(save_every=0, show_progress=False),
        )

    loop(3).run()
    resumed = loop(6)
    assert resumed.run().step == 6
    assert all(parameter.device == on_device for parameter in resumed.parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ON_AN_LM, "TALLRec full ranking", "Laser warm-up"])
def test_a_backbone_may_be_on_another_device_than_the_rest(
    case: str, run: Any, on_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``device_map`` may place it."""
    elsewhere = torch.device("cuda:1")

    def load(*arguments: Any, **options: Any) -> Any:
        return load_causal_lm(*arguments, **options | {"device": elsewhere})

    monkeypatch.setattr(backbones, "load_causal_lm", load)
    made = run(case)
    model = made.model.parts.backbone.load(made.trainer.cache).model
    assert {parameter.device for parameter in model.parameters()} == {elsewhere}


@pytest.mark.parametrize("wanted", ["high", "highest"])
def test_products_of_float32_use_tf32_on_a_device_alone(
    wanted: str, settings: dict[str, Any], assemble: Any, on_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    made = assemble("SASRec", settings, float32_matmul_precision=wanted)
    assert chosen and {*chosen} == {wanted}
    chosen.clear()
    monkeypatch.setattr(LLMConfig, "_init_device", type(made.config).__mro__[1]._init_device)
    assemble("SASRec", settings, float32_matmul_precision=wanted)
    assert {*chosen} == {"highest"}


# -- placement and precision -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["device_map", "bfloat16", "4 bits"])
@pytest.mark.parametrize("case", ON_AN_LM)
def test_a_placed_backbone_stays_where_it_is_and_other_precisions_compose(
    case: str, precision: str, run: Any, wide_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "4 bits" and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    changes = {
        "device_map": {"device_map": {"": "cpu"}},
        "bfloat16": {"dtype": "bfloat16"},
        "4 bits": {"load_in_4bit": True, "llm_path": str(wide_lm)},
    }
    moves: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        causal = load_causal_lm(*arguments, **options)
        kind, to = type(causal.model), type(causal.model).to
        monkeypatch.setattr(kind, "to", lambda self, *given, **named: moves.append(given) or to(self, *given, **named))
        return causal

    monkeypatch.setattr(backbones, "load_causal_lm", load)
    made = run(case, **changes[precision])
    model = made.model.parts.backbone.load(made.trainer.cache).model
    assert moves == []
    if precision == "bfloat16":
        adapters = {key for key, _ in model.named_parameters() if "lora_" in key}
        assert {parameter.dtype for key, parameter in model.named_parameters() if key not in adapters} == {torch.bfloat16}
