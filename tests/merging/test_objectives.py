"""Entropies: means of entropies, padding-blind, one gradient forward, and the memory-flat mean over batches."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recbole_llm.merging.objectives import Counted, candidate_entropy, first_tokens_entropy, mean_over_batches, token_entropies
from tests.llm import families


def test_mean_of_entropies_not_entropy_of_mean():
    sure = 50.0 * torch.eye(4)  # [B, C]: each user sure of another candidate; the mean is uniform
    assert candidate_entropy(sure) < 1e-6
    assert token_entropies(sure.reshape(2, 2, 4)).max() < 1e-6
    assert candidate_entropy(sure.mean(0, keepdim=True)) == pytest.approx(math.log(4))


def test_entropy_values_and_half_precision():
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) - 0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 2
    assert candidate_entropy(scores).item() == pytest.approx(expected, abs=1e-6)
    assert candidate_entropy(scores.bfloat16()).dtype == torch.float32


def test_absent_candidates_count_for_nothing():
    scores = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    entropy = candidate_entropy(scores)
    assert entropy.item() == pytest.approx(candidate_entropy(scores[:, :2]).item())
    entropy.backward()
    assert torch.isfinite(scores.grad).all() and scores.grad[0, 2] == 0


def test_ended_answers_are_not_counted():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[True, True, False], [True, False, False]])
    first, second, other = (token_entropies(logits[i, j][None, None])[0] for i, j in ((0, 0), (0, 1), (1, 0)))
    expected = ((first + second) / 2 + other) / 2
    torch.testing.assert_close(token_entropies(logits, counted).mean(), expected)


@pytest.fixture(scope="module", params=["relative", "absolute"])
def model(request):
    """Rotary positions forgive a shift by the padding; learned ones do not."""
    torch.manual_seed(0)
    if request.param == "absolute":
        config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4)
        return GPT2LMHeadModel(config).eval()
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.4, **sizes)).eval()


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [3, 11, 12, 13]]


def by_generation(model, prompt, k, eos=None):
    """The same k entropies, one whole forward a token."""
    ids, entropies = list(prompt), []
    for _ in range(k):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        ids.append(int(logits.argmax()))
        if ids[-1] == eos:
            break
    return entropies, ids[len(prompt) :]


@pytest.mark.parametrize("k", [1, 3])
def test_first_k_equals_token_by_token_generation(model, k):
    expected = torch.stack([h for prompt in PROMPTS for h in by_generation(model, prompt, k)[0]]).mean()
    got = first_tokens_entropy(model, PROMPTS, Counted(k), pad_token_id=0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.requires_grad


def test_first_k_stops_at_the_end_token(model):
    eos = by_generation(model, PROMPTS[0], 3)[1][0]
    expected = torch.stack([torch.stack(by_generation(model, prompt, 3, eos)[0]).mean() for prompt in PROMPTS]).mean()
    torch.testing.assert_close(first_tokens_entropy(model, PROMPTS, Counted(3), 0, eos), expected, atol=1e-5, rtol=1e-5)


def test_first_k_refuses_nothing_to_read(model):
    for prompts in ([], [[]]):
        with pytest.raises(ValueError, match="needs non-empty prompts"):
            first_tokens_entropy(model, prompts, Counted(3), 0)
    for wrong in ({"k": 0}, {"k": 3, "titles": 2}):
        with pytest.raises(ValueError, match="needs k >= 1, and a separator for several titles"):
            Counted(**wrong)


def test_the_first_tokens_of_every_title_count():
    """MoLoRec's code: k tokens at the beginning and k again after each separator, here 7 7."""
    counted = Counted(2, titles=3, separator=(7, 7), most=50)
    answer = [1, 2, 3, 7, 7, 4, 5, 6, 7, 7, 8, 9, 3]
    assert counted.places(answer, eos_token_id=0) == ([0, 1, 5, 6, 10, 11], True)
    for end in range(12):  # the next token counts as soon as all before it are known
        found, done = counted.places(answer[:end], eos_token_id=0)
        assert found == [place for place in (0, 1, 5, 6, 10, 11) if place <= end] and done == (end == 11)
    assert counted.places([1, 0, 7, 7, 3], eos_token_id=0) == ([0, 1], True)  # ended before its first separator
    assert Counted(2, 3, (7, 7), most=4).places([1, 2, 3], None) == ([0, 1], True)


def test_several_titles_equal_token_by_token_generation(model):
    entropies, answer = zip(*(by_generation(model, prompt, 12) for prompt in PROMPTS), strict=True)
    separator = (answer[0][2],)  # the first prompt's answer has a second title
    counted = Counted(2, titles=2, separator=separator, most=12)
    places = [counted.places(tokens[:11], None)[0] for tokens in answer]
    assert max(map(len, places)) > 2
    expected = [torch.stack([own[place] for place in found]).mean() for own, found in zip(entropies, places, strict=True)]
    got = first_tokens_entropy(model, PROMPTS, counted, pad_token_id=0)
    torch.testing.assert_close(got, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_mean_over_batches_has_the_value_and_gradient_of_the_mean():
    data = torch.randn(7, 5, 2, generator=torch.Generator().manual_seed(1))  # [users, C, K]
    batched = mean_over_batches(lambda w, batch: candidate_entropy(batch @ w), data.split(3))
    weights = torch.tensor([0.3, 0.7], requires_grad=True)
    expected, got = candidate_entropy(data @ weights), batched(weights * 1)
    torch.testing.assert_close(got, expected)
    (one,), (two,) = torch.autograd.grad(expected, weights), torch.autograd.grad(got, weights)
    torch.testing.assert_close(two, one)
    with torch.no_grad():
        torch.testing.assert_close(batched(weights), expected)


def test_gradients_that_float16_would_round_to_zero_survive_a_scale():
    def term(weights, _):
        return 1e-8 * weights.half().float().sum()  # as through a model in float16

    for scale, expected in ((1.0, 0.0), (1024.0, 1e-8)):
        weights = torch.tensor([0.3, 0.7], requires_grad=True)
        mean_over_batches(term, [[0], [1]], scale=scale)(weights).backward()
        torch.testing.assert_close(weights.grad, torch.full((2,), expected), rtol=0.01, atol=0)


@pytest.mark.parametrize(("family", "pad"), [("mamba", 0), ("lfm2", 0), ("bart", None)])
def test_entropy_of_first_tokens_of_models_without_a_cache_or_padding(family: str, pad: int | None) -> None:
    model, draw = families.build(family), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, families.VOCABULARY, (length,), generator=draw).tolist() for length in (20, 9, 14, 9)]
    alone = [first_tokens_entropy(model, [prompt], Counted(3), 0) for prompt in prompts]
    torch.testing.assert_close(
        first_tokens_entropy(model, prompts, Counted(3), pad), torch.stack(alone).mean(), atol=1e-4, rtol=0
    )


def test_only_the_graph_of_one_batch_is_alive():
    """The bytes that autograd keeps at once, for eight batches and for one; without gradients, larger batches are used."""
    torch.manual_seed(0)
    layer, data, sizes = torch.nn.Linear(2, 500), torch.randn(8, 64, 2), []

    def term(weights, batch):
        sizes.append(len(batch))
        return candidate_entropy(layer(batch * weights).relu().exp().mean(-1))

    def peak(batches) -> int:
        alive = most = 0

        class Kept:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.numel() * 4
                alive += self.size
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.size

        weights = torch.tensor([0.3, 0.7], requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            value = mean_over_batches(term, batches)(weights)
        value.backward()
        return most

    assert peak(data.split(1)) < 1.3 * peak(data[:1].split(1)) < 0.3 * peak(data.split(8))
    objective, weights = mean_over_batches(term, data.split(1), measured=data.split(4)), torch.tensor([0.3, 0.7])
    sizes.clear()
    assert objective(weights.requires_grad_()).item() == pytest.approx(objective(weights.detach()).item(), rel=1e-6)
    assert sizes == [1] * 8 + [4, 4]
