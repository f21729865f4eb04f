"""Laser's towers: trainable modules around a frozen LM, which encode a history as a vector.

::

    states [N, H] of the collaborative model --> M-Former --> prefix [L, D] --+
    history as text, one line an item ----------------------> tokens [T, D] --+--> LLM --> h [D] at s
    one trainable vector -----------------------------------> suffix s [1, D] +

Legend: B rows, N collaborative states, L prefix tokens, S soft tokens, T text tokens, I items, H width of the collaborative
model, D of the LM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data.prompts import Prompt, PromptBuilder, number_soft_tokens
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.encoding import encode
from recbole_llm.llm.packing import shared_batches
from recbole_llm.model.laser.m_former import MFormer, MFormerConfig, Routing
from recbole_llm.model.parts import default_batch_tokens
from recbole_llm.settings import Settings
from recbole_llm.store.curves import Curve
from recbole_llm.store.processes import current
from recbole_llm.store.progress import progress_bar

POOLINGS = ("suffix", "eos", "mean")
STATES = ("states", "items", "none")


logger = getLogger()

LEARNT = 0.05
"""Nats by which the loss of a trained tower is below that of equal scores."""


def warn_if_untrained(name: str, folder: Path, items: int, balance: float = 0.0) -> None:
    """Warn if the last quarter of the losses of a phase is not below that of equal scores for all items.

    Args:
        folder: of the result of the phase, which has its curve.
        balance: the weight of the load balance, a part of the loss that is 1 or more.
    """
    curve = Curve.read(folder, name)
    losses = [loss for _, loss in curve.points.get("loss", ())] if curve else []
    equal = math.log(items) + balance
    if losses and (last := fmean(losses[3 * len(losses) // 4 :])) > equal - LEARNT:
        logger.warning(
            f"{name}: nothing has been learnt: the loss, {last:.2f}, is not below that of equal scores for all {items:,} items, "
            f"{equal:.2f}; raise train_samples, {name}_epochs or {name}_learning_rate"
        )


@dataclass(frozen=True)
class TowerConfig(Settings):
    """Structure and input of a tower.

    Attributes:
        former: size and routing of the M-Former.
        m_former: False replaces the M-Former with trainable prefix vectors that all users share.
        prefix: False trains only the suffix.
        pooling: ``suffix``: the hidden state at a trainable vector; ``eos``: at the end-of-text token; ``mean``: over all tokens.
        states: input of the M-Former: ``states`` of the positions of a history, vectors of its ``items``, or ``none``.
        cold_threshold: an item with fewer training interactions has no state.
    """

    former: MFormerConfig
    m_former: bool
    prefix: bool
    pooling: str
    states: str
    cold_threshold: int

    def __post_init__(self) -> None:
        for key, value, known in (("pooling", self.pooling, POOLINGS), ("cf_states", self.states, STATES)):
            if value not in known:
                raise ValueError(f"{key}: {value!r} is unknown; choose {', '.join(known)}")
        if not self.prefix and self.pooling != "suffix":
            raise ValueError(f"prefix: False leaves nothing to train with pooling: {self.pooling}; choose pooling: suffix")

    @classmethod
    def of(cls, config: Any, **given: Any) -> TowerConfig:
        """The settings of a configuration; YAML's None stands for ``none``."""
        return super().of(config, former=MFormerConfig.of(config), states=config["cf_states"] or "none", **given)


class Tower(nn.Module):
    """The trainable modules: the M-Former or the prefix vectors, and the suffix."""

    def __init__(self, config: TowerConfig, cf_width: int, lm_width: int):
        super().__init__()
        size = config.former.length, lm_width
        self.m_former = MFormer(config.former, cf_width, lm_width) if config.prefix and config.m_former else None
        self.prefix = nn.Parameter(torch.randn(*size) * 0.02) if config.prefix and not config.m_former else None  # [L, D]
        self.suffix = nn.Parameter(torch.randn(1, lm_width) * 0.02) if config.pooling == "suffix" else None  # [1, D]

    def forward(self, states: Tensor, known: Tensor) -> tuple[Tensor, Routing | None]:
        """Soft tokens [B, S, D] (prefix, then suffix) for states [B, N, H], of which those ``known`` [B, N] are real."""
        routing, parts = None, []
        if self.m_former is not None:
            prefix, routing = self.m_former(states, known)  # [B, L, D]
            parts.append(prefix)
        parts += [part.expand(len(states), -1, -1) for part in (self.prefix, self.suffix) if part is not None]
        return torch.cat(parts, 1), routing


class Towers(nn.Module):
    """The user tower, and the item tower, which has the weights that encoded the item matrix."""

    def __init__(self, config: TowerConfig, cf_width: int, lm_width: int):
        super().__init__()
        self.user = Tower(config, cf_width, lm_width)
        self.item = deepcopy(self.user).requires_grad_(False).eval()
        self.item_matrix: Tensor | None = None  # [I, D]; see TowerReader.item_matrix

    def train(self, mode: bool = True) -> Towers:
        super().train(mode)
        self.item.eval()
        return self

    def refresh(self) -> None:
        """Copy the weights of the user tower to the item tower; the item matrix is then recomputed."""
        self.item.load_state_dict(self.user.state_dict())
        self.item_matrix = None


class TowerReader:
    """Encodes histories with towers around one LM.

    Args:
        prompts: builds the text part of the input.
        has_state: bool [I], the items with collaborative states.
        longest: the most recent items of a history whose states are read; the test reads RecBole's rows, which have no more.
        batch_tokens: tokens in one forward pass without gradients; None: a default for the LM's device.
    """

    def __init__(
        self,
        config: TowerConfig,
        causal: CausalLM,
        prompts: PromptBuilder,
        cf: CollaborativeModel,
        has_state: Tensor,
        *,
        longest: int,
        batch_tokens: int | None,
        show_progress: bool,
    ):
        self.config, self.causal, self.prompts, self.cf = config, causal, prompts, cf
        self.width = int(causal.model.get_input_embeddings().weight.shape[1])
        self._has_state, self._longest = has_state, longest
        self._pad = causal.pad_token_id
        self._batch_tokens = batch_tokens or default_batch_tokens(causal)
        self._show_progress = show_progress

    def with_new_items(self, prompts: PromptBuilder, number: int) -> TowerReader:
        """The same reader for ``number`` more items without collaborative states; ``prompts`` has them after the catalogue."""
        other = copy(self)
        other.prompts = prompts
        other._has_state = F.pad(self._has_state, (0, number))
        return other

    def towers(self) -> Towers:
        """Untrained towers for the LM and the collaborative model."""
        cf_width = self.cf.item_table.size(1) if self.config.states == "items" else self.cf.state_width
        return Towers(self.config, cf_width, self.width).to(self.cf.device)

    def embed(
        self, tower: Tower, histories: Sequence[Sequence[int]], states: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Vectors [B, D] of unit length and the routing; differentiable.

        Args:
            states: what the M-Former reads instead of :meth:`states` of the histories.
        """
        soft, routing = tower(*(states or self.states(histories)))  # [B, S, D]
        size = soft.size(1)
        rows = [self._row(history, np.arange(size) + number * size) for number, history in enumerate(histories)]
        rows, _ = number_soft_tokens(rows)
        hidden = encode(self.causal.model, rows, self._pad, soft=soft.flatten(0, 1), mean=self.config.pooling == "mean")  # [B, D]
        return F.normalize(hidden, dim=-1).to(soft.device), routing

    def batches(self, histories: Sequence[Sequence[int]], tokens: int, processes: int = 1) -> list[list[int]]:
        """Indices of histories in batches of similar length, of at most ``tokens`` padded tokens, for ``processes`` in turn."""
        lengths = [len(self.prompts.prompt(history)) + self.config.former.length + 1 for history in histories]
        return shared_batches(lengths, tokens, processes)

    def text_vectors(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Mean hidden states [B, D] of the prompts without soft tokens."""
        return encode(self.causal.model, [self.prompts.prompt(history) for history in histories], self._pad, mean=True)

    def states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """States [B, N, H] of the items that have one, and their mask [B, N]."""
        known = [[item for item in history[-self._longest :] if self._has_state[item]] for history in histories]
        return self.cf.sequence_states(known) if self.config.states == "states" else self.cf.item_states(known)

    @torch.no_grad()
    def encode(self, tower: Tower, histories: Sequence[Sequence[int]], name: str = "") -> Tensor:
        """Vectors [N, D], computed in batches of similar length under a token budget; ``name`` is that of the progress bar."""
        found = torch.empty(len(histories), self.width, device=self.cf.device)
        with progress_bar(name, len(histories), show=self._show_progress and bool(name)) as bar:

            def vectors(batch: list[int]) -> Tensor:
                bar.advance(len(batch) * current().size)
                return self.embed(tower, [histories[i] for i in batch])[0]  # [B, D]

            batches = self.batches(histories, self._batch_tokens)
            computed = current().compute([partial(vectors, batch) for batch in batches], found.device)
            for batch, some in zip(batches, computed, strict=True):
                found[batch] = some
        return found

    def encode_items(self, tower: Tower) -> Tensor:
        """Encodes the catalogue [I, D]; an item is a history of length one, and row 0, the padding item, is zero."""
        matrix = self.encode(tower, [[item] for item in range(len(self._has_state))], "item matrix")  # [I, D]
        matrix[0] = 0
        return matrix

    def item_matrix(self, towers: Towers) -> Tensor:
        """The item matrix [I, D], encoded if it is None."""
        if towers.item_matrix is None:
            towers.item_matrix = self.encode_items(towers.item)
        return towers.item_matrix

    @torch.no_grad()
    def experts(self, tower: Tower, histories: Sequence[Sequence[int]]) -> list[int]:
        """The expert of each history."""
        assert tower.m_former is not None
        parts = (histories[i : i + 512] for i in range(0, len(histories), 512))  # bounds the memory
        routed = (tower.m_former.routing(*self.states(part))[1] for part in parts)
        return [expert for routing in routed for expert in routing.experts.tolist()]

    def knows_states(self) -> bool:
        """Whether any item has a state."""
        return bool(self._has_state.any())

    def _row(self, history: Sequence[int], soft: np.ndarray) -> Prompt:
        """The input of the LM: prefix, text, suffix; ``soft`` has the keys of the soft tokens."""
        keys = soft.tolist()
        cut = len(keys) - (self.config.pooling == "suffix")
        end = [self.causal.tokenizer.eos_token_id] if self.config.pooling == "eos" else []
        return (self.prompts.prompt(history) + end).surrounded(keys[:cut], keys[cut:])
