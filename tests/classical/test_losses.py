"""Losses over the catalogue against dense ones in a few lines: values, gradients, formulas and refusals."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from recbole_llm.classical import losses
from recbole_llm.classical.losses import SequenceLoss, gbce_beta, gbce_loss, sampled_softmax_loss, softmax_loss

TARGETS, ITEMS, WIDTH = 37, 23, 8


def given(bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """States, weights and biases that need gradients, and targets."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((TARGETS, WIDTH), (ITEMS, WIDTH), (ITEMS,))
    states, weight, biases = (torch.randn(shape, generator=draw).requires_grad_() for shape in shapes)
    return states, weight, biases if bias else None, torch.randint(1, ITEMS, (TARGETS,), generator=draw)


def assert_same(ours: Tensor, theirs: Tensor, *parameters: Tensor | None) -> None:
    torch.testing.assert_close(ours, theirs)
    known = [parameter for parameter in parameters if parameter is not None]
    pairs = zip(torch.autograd.grad(3 * ours, known, retain_graph=True), torch.autograd.grad(3 * theirs, known), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 10, TARGETS, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_softmax_in_chunks_is_the_dense_one(bias: bool, rows: int) -> None:
    states, weight, biases, targets = given(bias)
    dense = cross_entropy(states @ weight.T + (biases if bias else 0), targets)
    assert_same(softmax_loss(states, weight, biases, targets, rows), dense, states, weight, biases)


def test_softmax_is_finite_where_the_share_of_the_target_is_zero() -> None:
    states, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[0.0], [1.0], [-1.0]])
    loss = softmax_loss(states, weight, None, torch.tensor([2]))
    loss.backward()
    assert loss.item() == 400 and states.grad is not None and states.grad.item() == 2


def test_the_whole_score_matrix_is_never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: sizes.append(self.shape) or softmax(self, dim))
    states, weight, _, targets = given(False)
    softmax_loss(states, weight, None, targets, rows=16).backward()
    assert sizes == [(16, ITEMS), (16, ITEMS), (5, ITEMS)]  # once, and not again for the gradient


def sampled(items: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    states, weight, _, targets = given(False)
    scores = states @ weight.T
    return states, weight, targets, scores.gather(1, targets[:, None])[:, 0], scores[:, items], targets[:, None] == items


def test_sampled_softmax_of_all_items_is_the_softmax() -> None:
    items = torch.randperm(ITEMS - 1) + 1
    states, weight, targets, positive, negative, hits = sampled(items)
    dense = cross_entropy((states @ weight.T)[:, 1:], targets - 1)  # without the padding item
    assert_same(sampled_softmax_loss(positive, negative, hits, ITEMS - 1), dense, states, weight)


def test_sampled_softmax_estimates_the_sum_without_bias() -> None:
    """The mean of exp(loss - that of the target alone) over all pairs of negatives is the softmax's."""
    pairs = torch.combinations(torch.arange(1, ITEMS))
    states, weight, targets, *_ = sampled(pairs[0])
    scores = (states @ weight.T)[:1].double()
    target = targets[:1]
    ratios = [
        sampled_softmax_loss(scores[:, target].view(1), scores[:, pair], target[:, None] == pair, ITEMS - 1).exp()
        for pair in pairs
        if target not in pair
    ]
    torch.testing.assert_close(torch.stack(ratios).mean(), cross_entropy(scores[:, 1:], target - 1).exp())


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_the_papers_formula(t: float) -> None:
    items = torch.tensor([3, 9, 11, 20])
    states, weight, targets, positive, negative, hits = sampled(items)
    assert hits.any()  # which are left out
    alpha = 4 / (ITEMS - 2)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    likelihood = positive.sigmoid().pow(beta).log() + ((1 - negative.sigmoid()).log() * ~hits).sum(1)
    assert_same(gbce_loss(positive, negative, hits, ITEMS - 1, t), -(likelihood / 5).mean(), states, weight)


def test_gbce_is_binary_cross_entropy_without_and_calibrated_with_t() -> None:
    assert gbce_beta(4, 23, 0.0) == pytest.approx(1) and gbce_beta(4, 23, 1.0) == pytest.approx(4 / 22)
    *_, positive, negative, hits = sampled(torch.tensor([0]))  # no target
    scores = torch.cat([positive[:, None], negative], 1)
    plain = binary_cross_entropy_with_logits(scores, torch.tensor([1.0, 0.0]).expand_as(scores))
    torch.testing.assert_close(gbce_loss(positive, negative, hits, ITEMS - 1, 0.0), plain)


def test_gbce_with_t_1_has_its_minimum_at_the_true_probability() -> None:
    """Of two items, one is the target with probability p; negatives are drawn uniformly (sec. 5 of the paper)."""
    p, catalogue = 0.3, 11
    score = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([score], max_iter=50)
    no_hit = torch.zeros(1, 1, dtype=torch.bool)

    def loss() -> Tensor:
        optimiser.zero_grad()
        as_target = gbce_loss(score[None], torch.full((1, 1), -50.0, dtype=torch.double), no_hit, catalogue, 1.0)
        as_negative = gbce_loss(torch.full((1,), 50.0, dtype=torch.double), score[None, None], no_hit, catalogue, 1.0)
        total = p * as_target + (1 - p) / (catalogue - 1) * as_negative
        total.backward()
        return total

    optimiser.step(loss)
    assert score.sigmoid().item() == pytest.approx(p, abs=1e-4)


@pytest.mark.parametrize("name", ["softmax", "sampled_softmax", "gbce"])
def test_the_negatives_of_a_batch_are_shared_and_no_item_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, biases, targets = given()
    seen = []
    for kind in ("sampled_softmax_loss", "gbce_loss"):
        found = getattr(losses, kind)
        monkeypatch.setattr(losses, kind, lambda *args, found=found: seen.append(args) or found(*args))
    torch.manual_seed(3)
    first = SequenceLoss(name, negatives=6)(states, weight, biases, targets)
    torch.manual_seed(3)
    assert first == SequenceLoss(name, negatives=6)(states, weight, biases, targets)
    if name == "softmax":
        return
    positive, negative, hits, catalogue, *_ = seen[0]
    dense = states @ weight.T + biases
    torch.testing.assert_close(positive, dense.gather(1, targets[:, None])[:, 0])
    columns = [(dense - column[:, None]).abs().sum(0).argmin().item() for column in negative.T]
    assert len({*columns}) == 6 and 0 not in columns and catalogue == ITEMS - 1
    assert hits.tolist() == (targets[:, None] == torch.tensor(columns)).tolist()


def model(name: str = "SASRec", loss_type: str = "CE") -> object:
    return type(name, (SimpleNamespace,), {})(loss_type=loss_type, n_items=300)


@pytest.mark.parametrize(
    ("loss", "of", "message"),
    [
        (SequenceLoss("softmax"), model("NextItNet"), "sequence_loss: softmax .*regulariser.*--sequence_loss=recbole"),
        (SequenceLoss("gbce"), model(loss_type="BPR"), "sequence_loss: gbce .*loss_type is BPR; give --loss_type=CE"),
        (SequenceLoss("gbce", 299), model(), "sequence_negatives: 299 is too large.*299 items.*--sequence_loss=softmax"),
    ],
)
def test_models_and_numbers_that_do_not_fit_are_refused(loss: SequenceLoss, of: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss.check(of)
    SequenceLoss().check(of)
