"""Fast Transformer layers: RecBole's states, gradients and rate of dropout."""

import copy

import pytest
import torch
from recbole.model.layers import MultiHeadAttention, TransformerEncoder

import recbole_llm  # noqa: F401  (shims)
from recbole_llm.classical import fast_transformer
from recbole_llm.classical.fast_transformer import BLOCK, causal_attention, fast_dropout, has_attention, make_fast


def encoders(length: int, dropout: float = 0.0) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor, torch.Tensor]:
    """RecBole's encoder and a fast copy, states of two histories, and RecBole's mask of padding and later items."""
    torch.manual_seed(0)
    slow = TransformerEncoder(2, 2, 16, 32, dropout, dropout, "gelu", 1e-12)
    fast = make_fast(copy.deepcopy(slow))
    real = torch.arange(length) < torch.tensor([[length], [max(1, length // 3)]])
    seen = real[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    return slow, fast, torch.randn(2, length, 16), torch.where(seen, 0.0, -10000.0)


@pytest.mark.parametrize("length", [1, 5, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("training", [False, True])
def test_states_and_gradients_are_recboles(length: int, training: bool) -> None:
    slow, fast, states, mask = encoders(length)
    real = mask[:, 0].diagonal(dim1=1, dim2=2) == 0  # [B, L]
    grads = []
    for encoder in (slow, fast):
        encoder.train(training)
        encoder(states, mask)[-1][real].square().sum().backward()
        grads.append([parameter.grad for parameter in encoder.parameters()])
    torch.testing.assert_close(fast(states, mask)[-1][real], slow(states, mask)[-1][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1, 3, BLOCK, 2 * BLOCK + 1])
def test_attention_in_blocks_is_the_fused_one(length: int) -> None:
    query, key, value = torch.randn(3, 2, 2, length, 4)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(causal_attention(query, key, value, lambda shares: shares), fused, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_the_attention_and_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast, states, mask = encoders(BLOCK + 3, dropout=0.5)
    seen = []
    monkeypatch.setattr(fast_transformer, "fast_dropout", lambda values, share: seen.append((values.shape, share)) or values)
    fast.eval()(states, mask)
    assert {share for _, share in seen} == {0.0}
    seen.clear()
    fast.train()(states, mask)
    assert {share for _, share in seen} == {0.5}
    assert [shape for shape, _ in seen if len(shape) == 4] == 2 * [(2, 2, BLOCK, BLOCK), (2, 2, 3, BLOCK + 3)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(share: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(401, 499, requires_grad=True)  # no multiple of 4
    dropped = fast_dropout(values, share)
    dropped.sum().backward()
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.01)
    torch.testing.assert_close(dropped.max(), torch.tensor(1 / (1 - share)))
    assert values.grad is not None and torch.equal(values.grad, dropped.detach())
    assert torch.equal(fast_dropout(values, 0.0), values)


def test_a_copy_computes_with_its_own_weights() -> None:
    """As ``AveragedModel`` makes one."""
    _, fast, states, mask = encoders(4)
    copied, before = copy.deepcopy(fast), fast(states, mask)[-1]
    for parameter in copied.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(fast(states, mask)[-1], before) and not copied(states, mask)[-1].any()


def test_other_activations_stay() -> None:
    encoder = make_fast(TransformerEncoder(1, 2, 16, 32, 0.0, 0.0, "tanh", 1e-12))
    assert encoder.layer[0].feed_forward.intermediate_act_fn is torch.tanh
    assert has_attention(encoder) and not has_attention(torch.nn.GRU(2, 2))
    assert isinstance(encoder.layer[0].multi_head_attention, MultiHeadAttention)
