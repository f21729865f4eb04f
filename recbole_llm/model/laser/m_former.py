"""Laser's M-Former: a mixture of query experts that computes the LM's prefix from collaborative states.

::

    C [N, H] --router--> p [N, K] --mean over N--> g [K] --argmax--> expert j* --> E [L, M] --+
       |                                            |                                         v
       +-------------------- keys and values of every second block -----------> querying transformer
                                                    |                                         |
                                                    +---------------- g_j* x ------> E' [L, M] -> linear -> prefix [L, D]

The querying transformer is BLIP-2's (Li et al., ICML 2023, arXiv 2301.12597), from ``transformers``. The gate g_j* scales its
output, as in Switch Transformers (Fedus et al., JMLR 2022, arXiv 2101.03961). Scaling the queries instead would have no effect
after the first layer norm, and the router would get no gradient from the recommendation loss.

Legend: B rows, N collaborative states, K experts, L tokens of an expert, H width of the collaborative model, M of the
M-Former, D of the LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.settings import Settings


@dataclass(frozen=True)
class MFormerConfig(Settings):
    """Size and routing of an M-Former.

    Attributes:
        experts, length: K query experts of L tokens each.
        router: ``gated``, or ``hard`` without the gate, where only the load-balancing loss trains the router.
        hidden_size, num_layers, num_heads: of the transformer; its feed-forward layers are four times as wide.
        dropout: of its hidden states and attention.
    """

    KEYS = {"experts": "num_experts", "length": "prefix_length"} | {
        name: f"m_former_{name}" for name in ("hidden_size", "num_layers", "num_heads", "dropout")
    }

    experts: int
    length: int
    router: str
    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float

    def __post_init__(self) -> None:
        for key in ("experts", "length", "hidden_size", "num_layers", "num_heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"{self.KEYS[key]}: {getattr(self, key)} must be at least 1")
        if self.router not in ("gated", "hard"):
            raise ValueError(f"router: {self.router!r} is unknown; choose gated or hard")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"m_former_dropout: {self.dropout} is not in [0, 1)")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"m_former_hidden_size: {self.hidden_size} is not a multiple of m_former_num_heads, {self.num_heads}"
            )

    @classmethod
    def of(cls, config: Any, **given: Any) -> MFormerConfig:
        """The settings of a configuration; with ``moe: False`` there is one expert."""
        return super().of(config, **({} if config["moe"] else {"experts": 1, "router": "hard"}), **given)


class Routing(NamedTuple):
    """Routing probabilities [B, N, K] of the states, the mask of real states [B, N] and the chosen experts [B]."""

    probabilities: Tensor
    seen: Tensor
    experts: Tensor


class MFormer(nn.Module):
    """Collaborative states [B, N, H] -> prefix [B, L, D]."""

    def __init__(self, recipe: MFormerConfig, cf_width: int, lm_width: int):
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.recipe = recipe
        self.experts = nn.Parameter(torch.randn(recipe.experts, recipe.length, recipe.hidden_size) * 0.02)  # [K, L, M]
        self.null = nn.Parameter(torch.randn(cf_width) * 0.02)  # [H], the state of rows without states
        self.router = nn.Linear(cf_width, recipe.experts, bias=False)
        self.router.requires_grad_(recipe.experts > 1)  # unused with one expert
        self.former = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=recipe.hidden_size,
                num_hidden_layers=recipe.num_layers,
                num_attention_heads=recipe.num_heads,
                intermediate_size=4 * recipe.hidden_size,
                hidden_dropout_prob=recipe.dropout,
                attention_probs_dropout_prob=recipe.dropout,
                cross_attention_frequency=2,
                encoder_hidden_size=cf_width,
            )
        )
        self.project = nn.Linear(recipe.hidden_size, lm_width)
        nn.init.normal_(self.project.weight, std=0.02)  # as in BERT
        nn.init.zeros_(self.project.bias)

    def forward(self, states: Tensor, known: Tensor) -> tuple[Tensor, Routing]:
        """Prefixes [B, L, D] for states [B, N, H], of which those ``known`` [B, N] are real."""
        queried, routing = self.query(states, known)  # [B, L, M]
        return self.project(queried), routing

    def query(self, states: Tensor, known: Tensor) -> tuple[Tensor, Routing]:
        """The gated output [B, L, M] of the querying transformer (eqs. 5-7)."""
        states, routing = self.routing(states, known)
        output = self.former(
            query_embeds=self.experts[routing.experts],  # [B, L, M]
            encoder_hidden_states=states,
            encoder_attention_mask=routing.seen.long(),
        ).last_hidden_state  # [B, L, M]
        if self.recipe.router == "hard":
            return output, routing
        return output * self._gates(routing)[:, None, None], routing

    def routing(self, states: Tensor, known: Tensor) -> tuple[Tensor, Routing]:
        """States [B, N, H], with the null token in rows without states, and the routing of each row."""
        missing = ~known.any(1, keepdim=True)  # [B, 1]
        first = torch.arange(known.size(1), device=known.device) == 0  # [N]
        seen = known | (missing & first)  # [B, N]
        states = torch.where(known.unsqueeze(-1), states, self.null)  # [B, N, H]
        p = self.router(states).softmax(-1)  # [B, N, K]
        return states, Routing(p, seen, _mean(p, seen).argmax(-1))

    def _gates(self, routing: Routing) -> Tensor:
        """g_j* [B]."""
        gates = _mean(routing.probabilities, routing.seen)  # [B, K]
        return gates.gather(1, routing.experts[:, None]).squeeze(1)


def _mean(p: Tensor, seen: Tensor) -> Tensor:
    """Means [B, K] of p [B, N, K] over the real states."""
    real = seen.unsqueeze(-1)  # [B, N, 1]
    return (p * real).sum(1) / real.sum(1)


def shares(routing: Routing) -> Tensor:
    """f [K]: the share of the real states of a batch whose most likely expert is j; the sum is 1."""
    chosen = routing.probabilities[routing.seen].argmax(-1)  # [R]
    return F.one_hot(chosen, routing.probabilities.size(-1)).float().mean(0)  # [K]


def load_balance(routing: Routing, batch: Routing | None = None) -> Tensor:
    """``K sum_j f_j P_j`` over the real states of a batch: 1 if experts are used equally, K if only one is used.

    f and P are those of the batch; in the paper they are those of one history, which is uninformative for an item (N = 1).

    Args:
        batch: the routing of the whole batch, if ``routing`` is that of some of its rows: their share of the sum. Only f and the
            number of states are taken from it, which have no gradient, so the shares of all rows have that of the whole.
    """
    batch = batch or routing
    p = routing.probabilities[routing.seen]  # [R, K]
    return p.size(1) * (shares(batch).detach() * p.sum(0)).sum() / batch.seen.sum()


class WarmUp(nn.Module):
    """Contrastive loss of behaviour and text in a batch, for the warm-up of the published code (not in the paper).

    As in BLIP-2, the similarity is the maximum over the L query outputs. The text vector is the mean hidden state of the
    prompt in the frozen LM, since this M-Former has no text branch.
    """

    def __init__(self, width: int, lm_width: int, joint: int = 256, temperature: float = 0.07):
        super().__init__()
        self.behaviour, self.text = nn.Linear(width, joint), nn.Linear(lm_width, joint)
        self.temperature = temperature

    def forward(self, queried: Tensor, text: Tensor) -> Tensor:
        """Loss of query outputs [B, L, M] and text vectors [B, D]: a scalar."""
        behaviour = F.normalize(self.behaviour(queried), dim=-1)  # [B, L, Z]
        text = F.normalize(self.text(text), dim=-1)  # [B, Z]
        similar = torch.einsum("blz,cz->bcl", behaviour, text).amax(-1) / self.temperature  # [B, B]
        own = torch.arange(len(similar), device=similar.device)
        return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
