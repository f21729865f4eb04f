"""The parts of a step hold every example once, their weights make the mean over its answer tokens, memory decides their size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recbole_llm.data.domains import TrainingExample
from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import micro_batches as module
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.micro_batches import MicroBatches, bounded_memory, parts
from recbole_llm.training.loop import LoopOptions

EXAMPLES = [TrainingExample(0, user, end) for user in range(5) for end in (1, 2)]


def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
    """Examples of many lengths, two prompt tokens and then the answer; one token is drawn, as negatives are."""
    answer = [10 + example.user, *range(20, 20 + 3 * example.end), int(rng.integers(50, 60))]
    return Example.of(Prompt([5, 6]), answer)


def of_two_tokens(first: int, second: int) -> Example:
    return Example.of(Prompt([first]), [second])


def test_steps_depend_on_their_index_alone():
    batches = [MicroBatches(EXAMPLES, encode, 4, 20, seed=3) for _ in range(2)]
    forward = [batches[0][step] for step in range(6)]
    backward = [batches[1][step] for step in reversed(range(6))]
    assert forward == backward[::-1]
    other = MicroBatches(EXAMPLES, encode, 4, 20, seed=4)
    assert forward != [other[step] for step in range(6)]


def test_every_example_of_a_step_is_encoded_once_and_is_in_one_part():
    encoded: list[TrainingExample] = []
    batches = MicroBatches(EXAMPLES, lambda example, rng: (encoded.append(example), encode(example, rng))[1], 8, 20, seed=0)
    step = batches[0]
    assert len(step) > 1 and len(encoded) == sum(len(batch) for batch, _ in step) == 8
    assert all(len(batch) * max(len(one.row) for one in batch) <= 20 for batch, _ in step)
    lengths = [len(one.row) for batch, _ in step for one in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_an_epoch_takes_every_example_once_and_the_next_one_in_another_order():
    batches = MicroBatches(EXAMPLES, lambda one, rng: of_two_tokens(10 * one.user + one.end, 1), 5, 4, seed=0)
    epochs = [
        [one.row.ids[0] for step in range(2) for batch, _ in batches[2 * epoch + step] for one in batch] for epoch in range(2)
    ]
    assert batches.steps_per_epoch == 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(10 * example.user + example.end for example in EXAMPLES)
    assert set(epochs[0][:5]) != set(epochs[1][:5])


def test_negatives_are_drawn_anew_in_every_epoch():
    batches = MicroBatches(EXAMPLES[:1], lambda _, rng: of_two_tokens(1, int(rng.integers(1000))), 1, 8, seed=0)
    assert len({batches[epoch][0][0][0].row.ids[1] for epoch in range(5)}) > 3


@pytest.fixture
def lm(tiny_lm: Path):
    return load_causal_lm(tiny_lm, device="cpu").model


def test_the_weighted_parts_make_the_mean_over_all_answer_tokens(lm):
    examples = [encode(example, np.random.default_rng(0)) for example in EXAMPLES]
    examples.append(Example(Prompt([7, 8, 9]), [1, 0, 0]))  # a first token is no target, so this one has none
    cut = parts(examples, 20)
    assert len(cut) > 2 and len({share for _, share in cut}) > 1
    assert sum(share for _, share in cut) == pytest.approx(1)
    with torch.no_grad():
        summed = sum(share * lm_loss(lm, batch) for batch, share in cut)
        torch.testing.assert_close(summed, lm_loss(lm, examples), atol=1e-6, rtol=0)
        logits = [lm(torch.tensor([one.row.ids])).logits[0, :-1] for one in examples[:-1]]
    answers = [(logit[1:], torch.tensor(one.row.ids[2:])) for logit, one in zip(logits, examples, strict=False)]
    oracle = F.cross_entropy(torch.cat([some for some, _ in answers]), torch.cat([some for _, some in answers]))
    torch.testing.assert_close(summed, oracle, atol=1e-5, rtol=0)


def test_chosen_tokens_stay_when_a_training_resumes_with_less_memory_and_given_ones_win(lm, tmp_path, monkeypatch):
    def tokens(**options) -> int:
        with bounded_memory(lm, LoopOptions(**options), tmp_path, r=4) as found:
            return found

    first = tokens()
    assert first & (first - 1) == 0
    monkeypatch.setattr(module, "micro_batch_tokens", lambda *_: 3)
    assert tokens() == first
    assert tokens(batch_tokens=7) == 7


def test_checkpointing_works_for_a_frozen_lm_in_eval_mode_with_soft_tokens(lm, tmp_path):
    examples = [Example.of(Prompt([5, 0, 6], {1: 0}), [11, 12]), Example.of(Prompt([0, 7], {0: 1}), [13])]
    lm_loss(lm, examples, soft=torch.zeros(2, lm.config.hidden_size))  # the first loss of an LM also tries its head
    entered = []
    layer = lm.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: entered.append(lm.training))
    layer.mlp.register_forward_pre_hook(lambda *_: entered.append("mlp"))
    gradients = []
    for on in (False, True):
        soft = torch.linspace(-1, 1, 2 * lm.config.hidden_size).view(2, -1).requires_grad_()
        with bounded_memory(lm, LoopOptions(gradient_checkpointing=on), tmp_path):
            lm_loss(lm, examples, soft=soft).backward()
        gradients.append(soft.grad)
        assert entered.count("mlp") == 1 + on and not lm.training  # computed again in the backward pass
        entered.clear()
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_an_unknown_value_of_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing: 'always' .* True, False or auto"):
        LoopOptions(gradient_checkpointing="always")
