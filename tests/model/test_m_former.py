"""The M-Former by itself: who is sent where, what reaches the router, what padding and missing states change, and sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_llm.model.laser.m_former import MFormer, MFormerConfig, Routing, WarmUp, load_balance, shares

EXPERTS, LENGTH, WIDTH, CF, LM = 4, 3, 8, 6, 10
RECIPE = MFormerConfig(EXPERTS, LENGTH, "gated", WIDTH, num_layers=4, num_heads=2, dropout=0.3)
LENGTHS = [5, 2, 1, 4, 3, 5]
Build = Callable[..., MFormer]


@pytest.fixture
def build() -> Build:
    """``build(**recipe)``: an M-Former whose router tells its states apart and whose blocks do much, without dropout."""

    def build(**changes: Any) -> MFormer:
        torch.manual_seed(0)
        made = MFormer(replace(RECIPE, **changes), CF, LM).eval()
        torch.nn.init.normal_(made.router.weight)
        torch.nn.init.normal_(made.experts)
        for parameter in made.former.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        return made

    return build


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """States [6, 5, CF], and where there is one: as many as LENGTHS."""
    states = torch.randn(len(LENGTHS), max(LENGTHS), CF, generator=torch.Generator().manual_seed(1))
    return states, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def probabilities(m_former: MFormer, states: Tensor) -> np.ndarray:
    """softmax(C W^T) of the states of one row, in numpy."""
    scores = np.exp(states.double().numpy() @ m_former.router.weight.detach().double().numpy().T)
    return scores / scores.sum(-1, keepdims=True)


# -- routing -----------------------------------------------------------------------------------------------------------


def test_a_row_goes_to_the_expert_of_the_largest_mean_probability_over_its_states(build: Build, batch: Any) -> None:
    known, m_former = batch[1], build()
    states = torch.randn(*known.shape, CF, generator=torch.Generator().manual_seed(2))
    _, routing = m_former(states, known)
    gates = [probabilities(m_former, row[mask]).mean(0) for row, mask in zip(states, known, strict=True)]
    assert routing.experts.tolist() == [int(gate.argmax()) for gate in gates] and len({*routing.experts.tolist()}) > 2
    close(m_former._gates(routing).double(), torch.tensor([gate.max() for gate in gates]))
    likely = routing.probabilities.argmax(-1)  # [B, N]: neither the first state decides nor the most frequent expert
    votes = [int(torch.bincount(row[mask]).argmax()) for row, mask in zip(likely, known, strict=True)]
    assert likely[:, 0].tolist() != routing.experts.tolist() != votes


def test_the_gate_is_multiplied_onto_the_output(build: Build, batch: Any) -> None:
    gated, hard = build(), build(router="hard")
    output, routing = gated.query(*batch)
    close(output, hard.query(*batch)[0] * gated._gates(routing)[:, None, None])
    assert torch.equal(hard(*batch)[1].experts, routing.experts) and output.shape == (6, LENGTH, WIDTH)


@pytest.mark.parametrize(("router", "reached"), [("gated", True), ("hard", False)])
def test_what_the_prefix_is_used_for_reaches_the_router_through_the_gate_alone(
    build: Build, batch: Any, router: str, reached: bool
) -> None:
    m_former = build(router=router)
    m_former(*batch)[0].square().sum().backward()
    weight = m_former.router.weight
    assert (weight.grad is not None and bool((weight.grad.abs().sum(1) > 1e-4).all())) == reached
    assert reached or weight.grad is None
    weight.grad = None
    load_balance(m_former(*batch)[1]).backward()
    assert weight.grad is not None and weight.grad.abs().max() > 1e-4  # this one does in both


@torch.no_grad()
def test_a_factor_on_the_queries_is_undone_by_the_first_layer_norm_and_the_gate_is_not(build: Build, batch: Any) -> None:
    gated, hard, scaled = build(), build(router="hard"), build(router="hard")
    scaled.experts *= 0.5  # what a gate on the queries would be
    output, routing = gated.query(*batch)
    close(scaled.query(*batch)[0], hard.query(*batch)[0], 1e-4)
    gates = gated._gates(routing)
    assert gates.min() < 0.5 and gates.std() > 0.01
    norms = output.flatten(1).norm(dim=1) / hard.query(*batch)[0].flatten(1).norm(dim=1)  # [B]
    close(norms, gates)


def test_a_gradient_reaches_the_chosen_experts_and_no_others(build: Build, batch: Any) -> None:
    m_former, (states, known) = build(), batch
    prefix, routing = m_former(states[:3], known[:3])
    prefix.square().sum().backward()
    reached = (m_former.experts.grad.flatten(1).abs().sum(1) > 0).nonzero().flatten().tolist()
    assert reached == sorted({*routing.experts.tolist()}) and 0 < len(reached) < EXPERTS


# -- load balance ------------------------------------------------------------------------------------------------------


def test_the_load_balance_is_the_formula_over_real_states_one_by_one(build: Build, batch: Any) -> None:
    states, known = batch
    m_former = build()
    _, routing = m_former(states, known)
    p = probabilities(m_former, states[known])  # the real states of all rows, [R, K]
    f = np.bincount(p.argmax(1), minlength=EXPERTS) / len(p)
    assert len(p) == sum(LENGTHS) and f.max() < 1 and f.sum() == pytest.approx(1)
    assert shares(routing).tolist() == pytest.approx(f.tolist()) and shares(routing).sum() == pytest.approx(1)
    assert load_balance(routing).item() == pytest.approx(EXPERTS * sum(f * p.mean(0)), abs=1e-6)


def test_the_load_balance_is_one_where_experts_are_used_alike_and_k_where_one_takes_all() -> None:
    alike = torch.eye(EXPERTS).repeat(2, 1)[None]  # [1, 2 K, K]
    one = torch.eye(EXPERTS)[[2] * 8][None]  # [1, 8, K]
    for p, expected in ((alike, 1.0), (one, EXPERTS), (torch.full((1, 8, EXPERTS), 1 / EXPERTS), 1.0)):
        routing = Routing(p, torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
        assert load_balance(routing).item() == pytest.approx(expected)
        assert shares(routing).sum().item() == pytest.approx(1)


def test_the_gradient_of_the_load_balance_goes_through_the_mean_probabilities_alone() -> None:
    draw = torch.Generator().manual_seed(5)
    p = torch.rand(2, 5, EXPERTS, generator=draw).requires_grad_()
    seen = torch.tensor([[True] * 5, [True, True, False, False, False]])
    routing = Routing(p, seen, torch.zeros(2, dtype=torch.long))
    assert not shares(routing).requires_grad
    load_balance(routing).backward()
    each = EXPERTS * shares(routing) / 7  # K f_j / R
    close(p.grad, each * seen[..., None])
    assert each.unique().numel() > 1


def test_the_load_balance_takes_from_an_expert_that_has_too_much(build: Build) -> None:
    m_former = build()
    with torch.no_grad():
        m_former.router.weight[2] += 0.5  # states have a mean of one
    states, known = torch.randn(30, 3, CF, generator=torch.Generator().manual_seed(2)) + 1, torch.ones(30, 3, dtype=torch.bool)
    optimizer, found = torch.optim.Adam([m_former.router.weight], lr=0.1), []
    for _ in range(60):
        routing = m_former.routing(states, known)[1]
        found.append((load_balance(routing), shares(routing).max()))
        optimizer.zero_grad()
        found[-1][0].backward()
        optimizer.step()
    assert found[0][1] > 0.6 > found[-1][1] and found[-1][0] < found[0][0]


# -- padding and missing states ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_counts_for_nothing(build: Build, batch: Any) -> None:
    """What stands in it, how much of it there is, and who else is in the batch."""
    states, known = batch
    m_former = build()
    expected, routing = m_former(states, known)
    filled = torch.where(known[..., None], states, 99.0)
    for padded, mask in ((filled, known), (F.pad(filled, (0, 0, 0, 4), value=-7.0), F.pad(known, (0, 4)))):
        prefix, other = m_former(padded, mask)
        close(prefix, expected)
        close(shares(other), shares(routing), 0.0)
        close(load_balance(other), load_balance(routing))
        assert torch.equal(other.experts, routing.experts)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(m_former(states[order], known[order])[0], expected[order])
    alone = [m_former(states[i : i + 1, :length], known[i : i + 1, :length])[0] for i, length in enumerate(LENGTHS)]
    close(torch.cat(alone), expected)
    assert expected.std(0).min() > 1e-3  # they are not all the same


@torch.no_grad()
def test_a_row_without_states_has_the_null_token_in_their_place_and_no_other_row_reads_it(build: Build, batch: Any) -> None:
    states, known = batch
    m_former = build()
    known = known.clone()
    known[1] = False
    before, routing = m_former(states, known)
    assert routing.seen[1].tolist() == [True, False, False, False, False] and torch.isfinite(before).all()
    assert torch.equal(routing.seen[[0, 2]], known[[0, 2]])
    close(before[1], m_former(m_former.null[None, None], torch.ones(1, 1, dtype=torch.bool))[0][0])
    for content in (1e4, float("nan")):  # what a row that knows nothing holds is not read
        close(m_former(torch.where(known[..., None], states, content), known)[0], before)
    m_former.null += 1
    after, _ = m_former(states, known)
    assert (after[1] - before[1]).abs().max() > 1e-3
    others = [0, 2, 3, 4, 5]
    close(after[others], before[others], 0.0)


def test_a_gradient_reaches_the_null_token_from_rows_without_states_alone(build: Build, batch: Any) -> None:
    states, known = batch
    for row, reached in ((slice(0), False), (slice(1), True)):
        m_former, mask = build(), known.clone()
        mask[row] = False
        m_former(states, mask)[0].square().sum().backward()
        assert (m_former.null.grad.abs().max() > 0) == reached


# -- the querying transformer ------------------------------------------------------------------------------------------


def test_every_second_block_reads_the_states(build: Build, batch: Any) -> None:
    states, known = batch
    m_former = build()
    read = [any("crossattention" in name for name, _ in block.named_parameters()) for block in m_former.former.encoder.layer]
    assert read == [True, False, True, False]
    shapes = [tuple(p.shape) for name, p in m_former.named_parameters() if name.endswith("crossattention.attention.key.weight")]
    assert shapes == [(WIDTH, CF)] * 2  # keys are of the collaborative states
    hard = build(router="hard", experts=1)
    with torch.no_grad():
        assert (hard(states, known)[0] - hard(states + 1, known)[0]).abs().amax((1, 2)).min() > 1e-2


def test_dropout_is_in_training_alone(build: Build, batch: Any) -> None:
    m_former = build()
    assert torch.equal(m_former(*batch)[0], m_former(*batch)[0])
    m_former.train()
    assert not torch.equal(m_former(*batch)[0], m_former(*batch)[0])


@pytest.mark.parametrize(("experts", "length"), [(1, 1), (2, 5)])
def test_the_number_of_experts_and_of_their_tokens_are_as_asked_for(build: Build, batch: Any, experts: int, length: int) -> None:
    m_former = build(experts=experts, length=length)
    prefix, routing = m_former(*batch)
    assert prefix.shape == (6, length, LM) and routing.probabilities.shape == (6, 5, experts)
    assert m_former.experts.shape == (experts, length, WIDTH) and {*routing.experts.tolist()} <= {*range(experts)}


def test_the_parts_have_the_papers_sizes() -> None:
    """K = 8 experts of L = 32 tokens, 12 blocks of 768, 64-wide states, a 4096-wide LM."""
    with torch.device("meta"):
        m_former = MFormer(MFormerConfig(8, 32, "gated", 768, 12, 12, 0.1), 64, 4096)
    sizes: dict[str, int] = {}
    for name, parameter in m_former.named_parameters():
        sizes[name.split(".")[0]] = sizes.get(name.split(".")[0], 0) + parameter.numel()
    square, norm = 768 * 768 + 768, 2 * 768
    attention, read = 4 * square + norm, 2 * square + 2 * (64 * 768 + 768) + norm
    feed_forward = 2 * 4 * 768 * 768 + 4 * 768 + 768 + norm
    assert sizes.pop("former") == 12 * (attention + feed_forward) + 6 * read + norm
    assert sizes == {"experts": 8 * 32 * 768, "null": 64, "router": 8 * 64, "project": 768 * 4096 + 4096}
    assert sum(p.numel() for p in m_former.parameters()) / 1e6 == pytest.approx(96.1, abs=0.1)


# -- settings ----------------------------------------------------------------------------------------------------------


CONFIG = {
    "num_experts": 8,
    "prefix_length": 32,
    "router": "gated",
    "m_former_hidden_size": 768,
    "m_former_num_layers": 12,
    "m_former_num_heads": 12,
    "m_former_dropout": 0.1,
    "moe": True,
}


def test_without_a_mixture_there_is_one_expert_and_no_gate() -> None:
    recipe = MFormerConfig.of(CONFIG)
    assert recipe == MFormerConfig(8, 32, "gated", 768, 12, 12, 0.1)
    assert MFormerConfig.of({**CONFIG, "moe": False}) == replace(recipe, experts=1, router="hard")
    assert json.loads(json.dumps(recipe.as_dict())) == recipe.as_dict() and len(recipe.as_dict()) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "soft"}, "router: 'soft' is unknown; choose gated or hard"),
        ({"num_experts": 0}, "num_experts: 0 must be at least 1"),
        ({"prefix_length": 0}, "prefix_length: 0 must be at least 1"),
        ({"m_former_num_layers": 0}, "m_former_num_layers: 0 must be at least 1"),
        ({"m_former_num_heads": 0}, "m_former_num_heads: 0 must be at least 1"),
        ({"m_former_num_heads": 7}, "m_former_hidden_size: 768 is not a multiple of m_former_num_heads, 7"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MFormerConfig.of({**CONFIG, **change})


# -- warm-up -----------------------------------------------------------------------------------------------------------


def test_the_warm_up_compares_the_closest_query_output_with_every_text_both_ways() -> None:
    torch.manual_seed(0)
    heads, rows = WarmUp(WIDTH, LM, joint=5, temperature=0.2), 4
    queried, text = torch.randn(rows, LENGTH, WIDTH, requires_grad=True), torch.randn(rows, LM)
    with torch.no_grad():
        behaviour, words = heads.behaviour(queried).numpy(), heads.text(text).numpy()
    similar = np.zeros((rows, rows))
    for one in range(rows):
        for other in range(rows):
            word = words[other] / np.linalg.norm(words[other])
            similar[one, other] = max(word @ vector / np.linalg.norm(vector) for vector in behaviour[one]) / 0.2
    total = 0.0
    for own in range(rows):
        for line in (similar[own], similar[:, own]):
            total -= np.log(np.exp(line[own]) / np.exp(line).sum())
    loss = heads(queried, text)
    assert loss.item() == pytest.approx(total / (2 * rows), abs=1e-5)
    loss.backward()
    assert all(part.grad.abs().max() > 0 for part in (queried, heads.behaviour.weight, heads.text.weight))


def test_the_warm_up_loss_falls_where_behaviour_and_text_agree() -> None:
    torch.manual_seed(0)
    heads = WarmUp(WIDTH, WIDTH, joint=WIDTH)
    with torch.no_grad():
        for head in (heads.behaviour, heads.text):
            head.weight.copy_(torch.eye(WIDTH))
            head.bias.zero_()
    text = torch.randn(6, WIDTH)
    noise = torch.randn(6, LENGTH, WIDTH)
    agree = noise.clone()
    agree[:, 1] = text  # one query output of each row is its text
    together, strangers, swapped = (heads(queried, text).item() for queried in (agree, noise, agree.roll(1, 0)))
    assert together < strangers < swapped
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = heads(noise, text)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * strangers
