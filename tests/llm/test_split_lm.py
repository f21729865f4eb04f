"""An LM whose layers are on several accelerators, as ``device_map: auto`` places them, and one that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pretend_device import pretend_device
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.llm.exactness import exact_reading
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import attach_lora
from recbole_llm.llm.scoring import Scorer
from recbole_llm.merging.objectives import Counted, first_tokens_entropy

FIRST, SECOND = "cuda:0", "cuda:1"


def split(*, tied: bool) -> Any:
    """A Llama of two layers on two devices; accelerate puts a head that is tied to the embeddings beside them."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval().requires_grad_(False)
    places = {"model.embed_tokens": FIRST, "model.layers.0": FIRST, "model.layers.1": SECOND, "model.norm": SECOND}
    places |= {"model.rotary_emb": SECOND, "lm_head": FIRST if tied else SECOND}
    for name, device in places.items():
        part = model.get_submodule(name)
        if name == "lm_head" and tied:
            part.weight = model.get_input_embeddings().weight
        else:
            part.to(device)
        for module in part.modules():
            add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(device)), append=True)
    return add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    with pretend_device():
        yield split(tied=request.param)


@pytest.mark.parametrize("scorer", ["tree", None], ids=["ranker", "encoder"])
def test_it_is_run_as_on_one_device(scorer: str | None, model: Any) -> None:
    found = exact_reading(model, scorer=scorer, longest=100, source="x")
    assert found.padding and (scorer is None or found.scorer in (None, "tree"))


def test_an_adapter_is_trained_and_the_entropy_of_the_first_tokens_is_read(model: Any) -> None:
    adapted = attach_lora(model, name="one", r=2, lora_alpha=4, lora_dropout=0.0, seed=0)
    lm_loss(adapted, [Example.of(Prompt([1, 2, 3, 4]), [5, 6, 7])]).backward()
    assert all(weights.grad is not None for weights in adapted.parameters() if weights.requires_grad)
    assert first_tokens_entropy(adapted, [[1, 2, 3], [4, 5]], Counted(3), 0, 0).item() > 0


def test_one_whose_layers_are_offloaded_is_read_but_not_trained(tiny_lm: Path) -> None:
    weights = sum(file.stat().st_size for file in tiny_lm.glob("*.safetensors"))
    part, whole = (
        load_causal_lm(tiny_lm, **given) for given in ({"device_map": "auto", "max_memory": {"cpu": weights * 4 // 5}}, {})
    )
    prompts, answers = [Prompt([5, 6, 7])], [[[8], [9]]]
    torch.testing.assert_close(Scorer()(part.model, prompts, answers), Scorer()(whole.model, prompts, answers))
    with pytest.raises(ValueError, match=r"max_memory: \d+ weights of the LM are offloaded, .* give more max_memory"):
        attach_lora(part.model, name="one", r=2, lora_alpha=4, lora_dropout=0.0, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_whose_head_is_offloaded_is_read(dtype: torch.dtype, tiny_lm: Path) -> None:
    """The head is the last module, which ``device_map: auto`` offloads first."""
    part, whole = (
        load_causal_lm(tiny_lm, dtype=dtype, **given) for given in ({"device_map": {"model": "cpu", "lm_head": "disk"}}, {})
    )
    assert part.model.get_output_embeddings().weight.device.type == "meta"
    assert exact_reading(part.model, scorer="tree", longest=100, source="x") == exact_reading(
        whole.model, scorer="tree", longest=100, source="x"
    )
    prompts, answers = [Prompt([5, 6, 7])], [[[8, 9], [9]]]
    torch.testing.assert_close(Scorer()(part.model, prompts, answers), Scorer()(whole.model, prompts, answers))
