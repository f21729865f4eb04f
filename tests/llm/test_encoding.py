"""One vector for a row: the LM's own last hidden state, whatever is padded, batched or put in a token's place."""

import pytest
import torch

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.encoding import encode

FAMILIES = ("llama", "qwen2-gqa", "opt", "gpt2")
IDS = [[1, 7, 9, 4, 30, 12, 8], [1, 5], [33], [1, 21, 4, 4, 50], [1, 7, 9, 4, 30, 12, 9]]
ROWS = [Prompt(ids) for ids in IDS]


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def hidden(model, row):
    """Hidden states [T, D] of one row by itself, from ids, without a mask or positions of ours."""
    return model.base_model(torch.tensor([row])).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_vector_is_the_models_own_last_hidden_state(build_model, family):
    model = build_model(family)
    found = encode(model, ROWS, 0)
    close(found, torch.stack([hidden(model, row)[-1] for row in IDS]))
    head = model.get_output_embeddings()
    close(head(found), torch.stack([model(torch.tensor([row])).logits[0, -1] for row in IDS]))  # after the final norm
    assert found.std(0).min() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_mean_is_over_a_rows_own_tokens(build_model, family):
    model = build_model(family)
    found = encode(model, ROWS, 0, mean=True)
    close(found, torch.stack([hidden(model, row).mean(0) for row in IDS]))
    close(found[2], encode(model, ROWS, 0)[2])  # of one token
    assert (found - encode(model, ROWS, 0))[0].abs().max() > 0.05


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_neither_padding_nor_the_others_of_a_batch_change_a_vector(build_model, family, mean):
    model = build_model(family)
    together = encode(model, ROWS, 0, mean=mean)
    close(torch.cat([encode(model, [row], 0, mean=mean) for row in ROWS]), together)
    close(encode(model, [Prompt([6] * 60), *ROWS], 0, mean=mean)[1:], together)
    close(encode(model, ROWS[::-1], 0, mean=mean), together.flip(0))
    close(encode(model, ROWS, 17, mean=mean), together)  # another token to pad with
    close(encode(model, ROWS, None, mean=mean), together)  # rows of equal length, without padding


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_slot_reads_its_row_of_the_soft_tokens(build_model, family):
    model = build_model(family)
    embed, tokens = model.get_input_embeddings(), [7, 9, 33]
    soft = embed(torch.tensor(tokens)).detach().requires_grad_()  # [3, D]
    rows = [Prompt([0, 5, 0], {0: 1, 2: 0}), Prompt([4, 0], {1: 2}), Prompt([8])]
    found = encode(model, rows, 0, soft=soft)
    pull = torch.randn(found.size(1), generator=torch.Generator().manual_seed(0))  # [D]; a layer norm's plain sum is constant
    close(found, encode(model, [Prompt([9, 5, 7]), Prompt([4, 33]), Prompt([8])], 0))
    for row, read in ((0, [True, True, False]), (1, [False, False, True]), (2, [False] * 3)):
        (gradient,) = torch.autograd.grad(found[row] @ pull, soft, retain_graph=True)
        assert (gradient.abs().sum(1) > 1e-4).tolist() == read
    (encode(model, rows, 0, soft=soft, mean=True) @ pull).sum().backward()
    assert (soft.grad.abs().sum(1) > 1e-4).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_vectors_are_fp32_also_of_a_model_that_is_not(build_model):
    model = build_model("llama").to(torch.bfloat16)
    soft = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    for mean in (False, True):
        found = encode(model, [Prompt([0, 4, 5], {0: 0}), Prompt([6])], 0, soft=soft, mean=mean)
        assert found.dtype == torch.float32 and torch.isfinite(found).all()


def test_no_logits_are_computed(build_model, monkeypatch):
    model = build_model("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("lm_head has run"))
    encode(model, ROWS, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], []], "a row has no tokens"),
        ([[1], [4] * 129], "a row has 129 tokens, more than the model's context of 128; lower max_prompt_tokens or max_history"),
    ],
)
def test_what_cannot_be_encoded_is_refused(build_model, rows, message):
    with pytest.raises(ValueError, match=message):
        encode(build_model("llama"), [Prompt(row) for row in rows], 0)


@torch.no_grad()
def test_a_row_may_fill_the_models_context(build_model):
    for family in FAMILIES:
        assert torch.isfinite(encode(build_model(family), [Prompt([4] * 128), Prompt([5])], 0)).all()
