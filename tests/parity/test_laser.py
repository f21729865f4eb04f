"""Laser's loss and its gradient equal the equations of arXiv 2409.01605, written down again one history at a time."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recbole_llm.model.laser.training import TowerTraining

HISTORIES = [[3, 7, 1, 12], [5], [20, 9], [4, 30], [8, 2, 11, 6, 17, 9], []]
TARGETS = [9, 40, 1, 7, 18, 3]
COLD = [4, 30, 9]  # of one history all items have no state, of two some
CHANGES: dict[str, dict[str, Any]] = {
    "as published": {},
    "hard": {"router": "hard"},
    "w/o MoE": {"moe": False},
    "w/o M-Former": {"m_former": False},
    "w/o prefix": {"prefix": False},
    "[EOS]": {"pooling": "eos"},
    "mean": {"pooling": "mean"},
    "item vectors": {"cf_states": "items"},
    "no states": {"cf_states": "none"},
}


@pytest.fixture(scope="module", params=CHANGES)
def made(request: pytest.FixtureRequest, module_settings: dict[str, Any], assemble: Any) -> SimpleNamespace:
    """A model whose weights were drawn large enough for every part to matter, and those weights in double precision."""
    changes = {"m_former_num_layers": 3, "load_balance_weight": 0.3, "temperature": 0.05, **CHANGES[request.param]}
    model, cache = (found := assemble("Laser", module_settings, **changes)).model, found.trainer.cache
    cache.run(model.cf.stage)
    reader = model._reader(cache)
    towers, draw = reader.towers().eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tower in (towers.user, towers.item):
            for name, parameter in tower.named_parameters():
                scale = 1.0 if "router" in name or "experts" in name else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    reader._has_state[COLD] = False
    towers.item_matrix = reader.encode_items(towers.item)
    weights = {name: p.detach().double().requires_grad_() for name, p in towers.user.named_parameters()}
    config = replace(model.training_config, null_share=0.0, single_share=0.0)
    loss = TowerTraining(config, model.parts, reader, lambda *_: 0.0).loss(towers, 10**6)
    double = deepcopy(reader.causal.model).double()
    return SimpleNamespace(reader=reader, towers=towers, loss=loss, weights=weights, changes=changes, lm=double)


# -- the equations -----------------------------------------------------------------------------------------------------


def layer(weights: dict[str, Tensor], name: str, rows: Tensor) -> Tensor:
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, Tensor], name: str, rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(weights: dict[str, Tensor], name: str, rows: Tensor, read: Tensor, heads: int) -> Tensor:
    """Rows [L, M] plus what they read in [N, .], by ``heads`` heads, after the layer norm."""
    query, key, value = (
        layer(weights, f"{name}.attention.{part}", given).chunk(heads, 1)
        for part, given in (("query", rows), ("key", read), ("value", read))
    )
    found = [(q @ k.T / math.sqrt(q.size(1))).softmax(1) @ v for q, k, v in zip(query, key, value, strict=True)]
    return norm(weights, f"{name}.output.LayerNorm", rows + layer(weights, f"{name}.output.dense", torch.cat(found, 1)))


def querying_transformer(weights: dict[str, Tensor], queries: Tensor, states: Tensor) -> Tensor:
    former = "m_former.former"
    rows = norm(weights, f"{former}.layernorm", queries)
    for block in range(3):
        name = f"{former}.encoder.layer.{block}"
        rows = attend(weights, f"{name}.attention", rows, rows, heads=2)
        if block % 2 == 0:
            rows = attend(weights, f"{name}.crossattention", rows, states, heads=2)
        inner = layer(weights, f"{name}.intermediate_query.dense", rows)
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))  # GELU
        rows = norm(weights, f"{name}.output_query.LayerNorm", rows + layer(weights, f"{name}.output_query.dense", inner))
    return rows


def states_of(made: SimpleNamespace, history: list[int]) -> Tensor:
    """C [N, H]: SASRec's state after each prefix of the items it knows, or their vectors; else the null token."""
    known = [item for item in history if item not in COLD]
    if made.changes.get("cf_states") == "none" or not known:
        return made.weights["m_former.null"][None]
    if made.changes.get("cf_states") == "items":
        return made.reader.cf.item_table[known].double()
    return torch.cat([made.reader.cf.user_states([1], [known[:end]]) for end in range(1, len(known) + 1)]).double()


def vector(made: SimpleNamespace, history: list[int]) -> tuple[Tensor, Tensor | None]:
    """h [D] of one history, never padded, and p [N, K] of its states."""
    weights, changes, p = made.weights, made.changes, None
    parts = []
    if changes.get("prefix", True) and changes.get("m_former", True):
        states = states_of(made, history)
        p = (states @ weights["m_former.router.weight"].T).softmax(1)  # eq. 5
        gates = p.mean(0)  # eq. 6
        chosen = int(gates.argmax())  # eq. 7
        output = querying_transformer(weights, weights["m_former.experts"][chosen], states)
        if changes.get("router") != "hard" and changes.get("moe", True):
            output = gates[chosen] * output
        parts.append(layer(weights, "m_former.project", output))
    elif changes.get("prefix", True):
        parts.append(weights["prefix"])
    tokens = made.reader.prompts.prompt(history).ids
    if changes.get("pooling") == "eos":
        tokens = [*tokens, made.reader.causal.tokenizer.eos_token_id]
    parts.append(made.lm.get_input_embeddings().weight[tokens])
    if "pooling" not in changes:
        parts.append(weights["suffix"])
    hidden = made.lm.model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]  # [T, D]
    pooled = hidden.mean(0) if changes.get("pooling") == "mean" else hidden[-1]
    return pooled / pooled.norm(), p


def loss_of(made: SimpleNamespace, items: Tensor) -> Tensor:
    """Mean L_IIC over the histories plus lambda L_LB over all of their states."""
    found = [vector(made, history) for history in HISTORIES]
    total = torch.zeros((), dtype=torch.float64)
    for (user, _), target in zip(found, TARGETS, strict=True):
        alike = (items[1:] @ user / 0.05).exp()  # all items but padding
        total = total - (alike[target - 1] / alike.sum()).log() / len(found)
    if found[0][1] is None or not made.changes.get("moe", True):
        return total
    p = torch.cat([probabilities for _, probabilities in found])  # the states of all histories
    f = torch.from_numpy(np.bincount(p.argmax(1).numpy(), minlength=3) / len(p))
    return total + 0.3 * 3 * (f * p.mean(0)).sum()


# -- the model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_vector_is_that_of_the_equations(made: SimpleNamespace) -> None:
    expected = torch.stack([vector(made, history)[0] for history in HISTORIES])
    torch.testing.assert_close(made.reader.encode(made.towers.user, HISTORIES).double(), expected, atol=1e-4, rtol=0)
    assert expected.std(0).max() > 0.02


def test_the_loss_and_its_gradient_are_those_of_the_equations(made: SimpleNamespace) -> None:
    """The item matrix is a constant in both: no gradient goes through it."""
    towers, items = made.towers, made.towers.item_matrix
    expected = loss_of(made, items.double())
    for weight in (*made.weights.values(), *towers.user.parameters()):
        weight.grad = None
    expected.backward()
    (part,) = made.loss(HISTORIES, TARGETS)
    found = part()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    assert not items.requires_grad and towers.item_matrix is items
    assert all(parameter.grad is None for part in (towers.item, made.reader.causal.model) for parameter in part.parameters())
    reached = set()
    for name, parameter in towers.user.named_parameters():
        gradient = made.weights[name].grad
        zero = torch.zeros_like(parameter)
        ours, theirs = zero if parameter.grad is None else parameter.grad, zero if gradient is None else gradient.float()
        size = float(theirs.abs().max())
        assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, size), name
        reached |= {name} if size > 1e-3 else set()
    parts = {"m_former.null", "m_former.experts", "m_former.project.weight", "m_former.router.weight", "prefix", "suffix"}
    alone = {"m_former.router.weight"} if not made.changes.get("moe", True) else set()
    assert reached & parts == (parts & made.weights.keys()) - alone
