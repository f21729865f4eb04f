"""The loss and its gradient in chunks are those of the model's own logits; models that change their logits are noticed."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, OPTConfig

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import answer_loss as module
from recbole_llm.llm.forward import lm_loss, loss_scale

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**GATED),
    "gemma2": Gemma2Config(**GATED, head_dim=8, num_key_value_heads=1, final_logit_softcapping=2.0),  # caps its logits
    "cohere": CohereConfig(**GATED, logit_scale=3.0),  # scales them
    "opt": OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0),
}
EXAMPLES = [
    Example.of(Prompt([5, 6, 7]), [11, 12, 13]),
    Example.of(Prompt([8]), [14]),
    Example(Prompt([9, 10, 11, 12, 13]), [1, 1, 0, 1, 0]),
]


def expected(model: Any) -> torch.Tensor:
    """Row by row, without padding, from all logits."""
    losses = []
    for row, mask in EXAMPLES:
        logits = model(inputs_embeds=model.get_input_embeddings()(torch.tensor([row.ids]))).logits[0, :-1].float()
        targets = torch.tensor(mask[1:]).bool()
        losses.append(F.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")[targets])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("first", [0.0, 1.0])  # a padding token's embedding is 0, and so are the logits after it
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_equal_those_of_all_logits(name: str, first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * 60)  # two answers at a time
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).requires_grad_(False).eval()
    model.get_input_embeddings().weight.normal_()[0] = first
    weight = next(p for key, p in model.named_parameters() if "q_proj" in key).requires_grad_()
    head, sizes = model.get_output_embeddings(), []
    lm_loss(model, EXAMPLES)
    head.register_forward_hook(lambda _, __, logits: sizes.append(logits.shape[:-1].numel()))
    found = lm_loss(model, EXAMPLES)
    assert sizes == (
        [6] if name in ("gemma2", "cohere") else [1, 2, 2, 2]
    )  # the first is the model's own call, which is not used
    (gradient,) = torch.autograd.grad(3 * found, weight)
    oracle = expected(model)
    torch.testing.assert_close(found, oracle)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * oracle, weight)[0], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(lm_loss(model, EXAMPLES), oracle)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    head = model.get_output_embeddings().weight
    (found,) = torch.autograd.grad(lm_loss(model, EXAMPLES), head)
    (oracle,) = torch.autograd.grad(expected(model), head)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, oracle, atol=1e-6, rtol=1e-4)


def test_trying_the_head_draws_nothing() -> None:
    torch.manual_seed(0)
    config = OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.5)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).train()
    losses = []
    for _ in range(2):  # the first one tries the head
        torch.manual_seed(1)
        losses.append(lm_loss(model, EXAMPLES).item())
    assert losses[0] == losses[1]


def test_small_gradients_survive_float16() -> None:
    """A hundredth of the loss of a step: its gradients are that of the whole in fp32, but for rounding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).requires_grad_(False).eval()
    found, share = [], 1e-6
    for dtype in (torch.float32, torch.float16):
        own = copy.deepcopy(model).to(dtype)
        soft = torch.zeros(1, 16, requires_grad=True)
        row = Example(Prompt([0, *EXAMPLES[0].row.ids], {0: 0}), [0, *EXAMPLES[0].mask])
        (loss_scale(own) * share * lm_loss(own, [row], soft=soft)).backward()
        found.append(soft.grad / loss_scale(own) / share)
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()
