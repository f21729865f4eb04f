"""Stage 1's loss equals equations 2 to 6 of arXiv 2404.11343, written down again in numpy; its gradients go where they may."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recbole_llm.model.allmrec.alignment import Alignment, LossWeights

USERS, HIDDEN, TEXT, JOINT = 7, 5, 9, 4
WEIGHTS = LossWeights(1.3, 0.7, 0.5, 0.2)  # no two alike
TERMS = ("recommendation", "matching", "item_reconstruction", "text_reconstruction")
CHANGES = [{}, *({term: 0.0} for term in TERMS), dict.fromkeys(TERMS[2:], 0.0)]


@pytest.fixture
def alignment() -> Alignment:
    torch.manual_seed(0)
    return Alignment(HIDDEN, TEXT, JOINT).double()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    sizes = {"states": HIDDEN, "item": HIDDEN, "other": HIDDEN, "text": TEXT, "other_text": TEXT}
    return {name: torch.randn(USERS, size, generator=draw, dtype=torch.float64) for name, size in sizes.items()}


def loss_of(alignment: Alignment, batch: dict[str, torch.Tensor], weights: LossWeights) -> torch.Tensor:
    texts = batch["text"], batch["other_text"]
    return alignment.loss(batch["states"], (batch["item"], batch["other"]), texts, weights)


def by_the_equations(alignment: Alignment, batch: dict[str, torch.Tensor], weights: LossWeights) -> float:
    """Users one by one; sums over dimensions where the paper sums, means where a mean squared error means."""
    layers = {name: parameter.detach().numpy() for name, parameter in alignment.named_parameters()}
    data = {name: tensor.detach().numpy() for name, tensor in batch.items()}

    def layer(name, vector):
        return layers[f"{name}.weight"] @ vector + layers[f"{name}.bias"]

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))

    def squared(one, other):
        return ((one - other) ** 2).mean()

    total = 0.0
    for user in range(USERS):
        state = data["states"][user]
        for target, item_name, text_name in ((1, "item", "text"), (0, "other", "other_text")):
            item, text = data[item_name][user], data[text_name][user]
            item_code, text_code = sigmoid(layer("item_encoder", item)), sigmoid(layer("text_encoder", text))
            item_back, text_back = layer("item_decoder", item_code), layer("text_decoder", text_code)
            logit = (state * item_back).sum() / (1 if weights.logits == "sum" else HIDDEN)
            likelihood = sigmoid(logit) if target else 1 - sigmoid(logit)
            total -= weights.recommendation * np.log(likelihood)  # eq. 5
            if target or weights.match_negatives:
                total += weights.matching * squared(item_code, text_code)  # eq. 2
            total += weights.item_reconstruction * squared(item, item_back)  # eq. 3
            total += weights.text_reconstruction * squared(text, text_back)  # eq. 4
    return total / USERS


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change) or "all")
@pytest.mark.parametrize("match_negatives", [False, True])
@pytest.mark.parametrize("logits", ["sum", "mean"])
def test_the_loss_is_that_of_the_equations(alignment, batch, logits, match_negatives, change):
    weights = replace(WEIGHTS, logits=logits, match_negatives=match_negatives, **change)
    expected = by_the_equations(alignment, batch, weights)
    assert loss_of(alignment, batch, weights).item() == pytest.approx(expected, abs=1e-6)
    single = {name: tensor.float() for name, tensor in batch.items()}
    assert loss_of(alignment.float(), single, weights).item() == pytest.approx(expected, abs=1e-5)


REACHED = {
    "recommendation": {"item_encoder", "item_decoder"},
    "matching": {"item_encoder", "text_encoder"},
    "item_reconstruction": {"item_encoder", "item_decoder"},
    "text_reconstruction": {"text_encoder", "text_decoder"},
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_trains_its_own_layers(alignment, batch, term):
    loss_of(alignment, batch, LossWeights(**{name: float(name == term) for name in TERMS})).backward()
    reached = {name.split(".")[0] for name, parameter in alignment.named_parameters() if parameter.grad.abs().max() > 0}
    assert reached == REACHED[term]


def test_all_terms_together_train_both_autoencoders_and_the_text_vectors(alignment, batch):
    texts = [batch[name].requires_grad_() for name in ("text", "other_text")]
    loss_of(alignment, batch, WEIGHTS).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in alignment.parameters())
    assert all((text.grad.abs().sum(-1) > 0).all() for text in texts)


@pytest.mark.parametrize("name", ["text", "other_text"])
def test_the_text_reconstruction_pulls_no_text_towards_its_copy(alignment, batch, name):
    """With an encoder that reads nothing, all that is left of a gradient would come through the target."""
    torch.nn.init.zeros_(alignment.text_encoder.weight)
    batch[name].requires_grad_()
    loss_of(alignment, batch, replace(WEIGHTS, recommendation=0.0)).backward()
    assert batch[name].grad.abs().max() == 0


def test_the_encoder_of_texts_gets_the_gradient_of_the_reconstruction_with_its_target_held(alignment, batch):
    weights = LossWeights(0.0, 0.0, 0.0, 1.0)
    text = batch["text"].requires_grad_()
    (found,) = torch.autograd.grad(loss_of(alignment, batch, weights), text)
    held, step = text.detach().clone(), 1e-6
    for place in ((0, 0), (3, 2), (6, 8)):  # central differences of what is decoded, against what was there
        moved = [text.detach().clone() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (((alignment.text_decoder(alignment.text_codes(some)) - held) ** 2).mean() for some in moved)
        assert found[place].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-7)


@pytest.mark.parametrize("logits", ["max", "", None])
def test_other_logits_are_refused(logits):
    with pytest.raises(ValueError, match="logits: .* is neither sum .* nor mean"):
        LossWeights(logits=logits)
