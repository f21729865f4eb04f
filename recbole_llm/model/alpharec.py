"""AlphaRec: item texts in place of ids, two linear layers and a graph convolution; no language model is trained or asked.

Sheng et al., "Language Representations Can be What Recommenders Need: Findings and Potentials", ICLR 2025 (arXiv 2407.05441). A
frozen text encoder gives each item a vector ``z_i``; a user is the mean of the items of the training split; one network maps both
to the space of the recommender, in which LightGCN's convolution and a softmax over sampled items do the rest::

    e_i = W_2 LeakyReLU(W_1 z_i),     z_u = mean_{i in N_u} z_i,     (e_u, e_i) --LightGCN--> cosine / tau --InfoNCE-->

So the model has no parameter that belongs to an item or to a user.

Legend: B users, N sampled items, U users, I items, T width of the text encoder, D of the recommender.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.general_recommender import LightGCN
from recbole.utils import InputType
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from recbole_llm.llm.text_encoder import catalogue_vectors, item_sentences
from recbole_llm.model.base import text_fields
from recbole_llm.store.stages import StageCache


class AlphaRec(LightGCN):
    """LightGCN whose embeddings are projected text vectors."""

    input_type = InputType.POINTWISE
    uses_item_text = True
    uses_cf_model = False
    scores_unseen_items = True
    scores_full_catalogue = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.temperature = config["temperature"]
        self.negatives = config["num_negatives"]
        self.cache = StageCache(Path(config["checkpoint_dir"]) / "stages", seed=config["seed"])
        sentences = item_sentences(dataset.item_texts, text_fields(config))
        self.backbone_name, vectors = catalogue_vectors(config, sentences, self.cache)  # [I, T]

        self.known = csr_matrix(self.interaction_matrix, dtype=bool)  # [U, I]
        counts = self.known.sum(1).clip(min=1)  # [U, 1]
        users = torch.from_numpy(np.asarray(self.known.astype(np.float32) @ vectors.numpy() / counts, dtype=np.float32))
        self.register_buffer("text_vectors", torch.cat([users, vectors]), persistent=False)  # [U + I, T]
        del self.user_embedding, self.item_embedding
        width, hidden = vectors.shape[1], round(config["hidden_multiplier"] * vectors.shape[1])
        self.project = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, self.latent_dim))

    def __str__(self) -> str:
        trained = sum(parameter.numel() for parameter in self.parameters())
        return f"AlphaRec on {self.backbone_name}: {trained:,} parameters are trained, the text encoder's are not"

    def get_ego_embeddings(self) -> Tensor:
        return self.project(self.text_vectors)  # [U + I, D]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Users [U, D] and items [I, D] of unit length, so that LightGCN's products are cosines."""
        return tuple(nn.functional.normalize(vectors, dim=-1) for vectors in super().forward())  # type: ignore[return-value]

    def calculate_loss(self, interaction: Any) -> Tensor:
        """InfoNCE of a batch of (user, item) rows against items that are drawn once for all of them: a scalar.

        An item that the training split shows with a user is no negative of that user.
        """
        self.restore_user_e = self.restore_item_e = None  # what evaluation has kept
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]  # [B]
        drawn = torch.randint(1, self.n_items, (self.negatives,))  # [N]
        known = torch.from_numpy(self.known[users.cpu().numpy()][:, drawn.numpy()].toarray()).to(self.device)  # [B, N]
        user_vectors, item_vectors = self.forward()
        asked = user_vectors[users]  # [B, D]
        own = (asked * item_vectors[items]).sum(-1, keepdim=True)  # [B, 1]
        others = asked @ item_vectors[drawn.to(self.device)].T  # [B, N]
        logits = torch.cat([own, others.masked_fill(known, -torch.inf)], dim=1) / self.temperature  # [B, 1 + N]
        return nn.functional.cross_entropy(logits, torch.zeros_like(users))
