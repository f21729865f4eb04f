"""AlphaRec: item texts instead of ids, two linear layers and a graph convolution; no language model is trained or prompted.

Sheng et al., "Language Representations Can be What Recommenders Need: Findings and Potentials", ICLR 2025 (arXiv 2407.05441). A
frozen text encoder maps each item to a vector ``z_i``; a user is the mean of their items in the training split. One network maps
both to the space of the recommender, followed by LightGCN's convolution and a softmax over sampled items::

    e_i = W_2 LeakyReLU(W_1 z_i),     z_u = mean_{i in N_u} z_i,     (e_u, e_i) --LightGCN--> cosine / tau --InfoNCE-->

No parameter of the model belongs to a single item or user.

Legend: B users, N sampled items, U users, I items, T width of the text encoder, D of the recommender.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.model.general_recommender import LightGCN
from recbole.utils import InputType
from scipy.sparse import coo_matrix, csr_matrix, diags
from torch import Tensor, nn

from recbole_llm.data.items import text_fields
from recbole_llm.evaluation.recommender import ClassicalRecommender, Facts, Recommender, Variant
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import item_sentences
from recbole_llm.store.stages import Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

FIRST_LAYER = 3072 * 1536  # weights


class AlphaRec(Recommender, LightGCN):
    """LightGCN on projected text vectors; RecBole's trainer trains it after the text encoder's stage."""

    input_type = InputType.POINTWISE
    uses_item_text = True
    scores_unseen_items = True
    loss_is_mean = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        drawn = config["train_neg_sample_args"]
        if drawn["distribution"] != "none":  # RecBole's loader would add them to the pairs, as if users had chosen them
            raise ValueError(
                f"train_neg_sample_args: {drawn}: AlphaRec's loss draws its own negatives; remove it, and give their number, "
                f"--num_negatives={config['num_negatives']}"
            )
        self.temperature = config["temperature"]
        self.negatives = config["num_negatives"]
        self.seed = config["seed"]
        self.hidden_multiplier = config["hidden_multiplier"]
        new = dataset.histories.scenario.new  # which training does not know
        self.pool = torch.tensor([item for item in range(1, self.n_items) if item not in new])  # of the negatives
        self.text = TextBackbone(config, item_sentences(dataset.item_texts, text_fields(config, dataset.item_texts)))
        self.known = csr_matrix(self.interaction_matrix, dtype=bool)  # [U, I]
        mean = diags(1 / np.asarray(self.known.sum(1)).clip(min=1).ravel()) @ self.known.astype(np.float64)
        self.mean_of_items = SparseProduct(mean, self.device)
        adjacency = self.norm_adj_matrix.cpu().coalesce()
        self.convolution = SparseProduct(coo_matrix((adjacency.values(), adjacency.indices()), adjacency.shape), self.device)
        del self.user_embedding, self.item_embedding, self.norm_adj_matrix

    def __str__(self) -> str:
        return f"AlphaRec, text vectors of {self.text.name}"

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        return self.text.stages

    def load(self, cache: StageCache) -> None:
        """Encode the catalogue and initialize the network from the model's seed."""
        self._build(self.text.vectors(self.text.load(cache)))

    def trial_model(self) -> tuple[AlphaRec, float]:
        width, seconds = self.text.trial()
        model = copy.deepcopy(self)
        model._build(torch.rand(self.n_items, width))
        return model, seconds

    def _build(self, vectors: Tensor) -> None:
        """Set up the network on text vectors of items [I, T]."""
        self.register_buffer("text_vectors", vectors.to(self.device), persistent=False)  # [I, T]
        width = vectors.shape[1]
        hidden = hidden_width(width) if self.hidden_multiplier is None else max(1, round(self.hidden_multiplier * width))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, self.latent_dim))
        self.project = network.to(self.device)

    def variants(self) -> dict[str, Variant]:
        return ClassicalRecommender(self, self.ITEM_ID, type(self).__name__).variants()

    def facts(self) -> Facts:
        text = self.text
        return Facts(text.name, text.fingerprint, backbone_identity=text.identity, builtin=text.builtin)

    def get_ego_embeddings(self) -> Tensor:
        """Projections [U + I, D] of the text vectors of users and items.

        The first layer of a mean is the mean of the first layer, so users cost one sparse product.
        """
        first: Any = self.project[0]
        items = self.text_vectors @ first.weight.T  # [I, hidden]
        hidden = torch.cat([self.mean_of_items(items), items]) + first.bias  # [U + I, hidden]
        return self.project[1:](hidden)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Users [U, D] and items [I, D] of unit length, so that LightGCN's scores are cosines."""
        layers = [self.get_ego_embeddings()]  # [U + I, D] each
        for _ in range(self.n_layers):
            layers.append(self.convolution(layers[-1]))
        users, items = nn.functional.normalize(torch.stack(layers).mean(0), dim=-1).split([self.n_users, self.n_items])
        return users, items

    def calculate_loss(self, interaction: Any) -> Tensor:
        """InfoNCE of (user, item) pairs against sampled items that the batch shares: a scalar.

        A user's items of the training split are not negatives of that user, and items that a scenario keeps new are none at all.
        """
        self.restore_user_e = self.restore_item_e = None  # LightGCN's cache of the last evaluation
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]  # [B]
        drawn = self.pool[torch.randint(len(self.pool), (self.negatives,))]  # [N]
        known = torch.from_numpy(self.known[users.cpu().numpy()][:, drawn.numpy()].toarray()).to(self.device)  # [B, N]
        user_vectors, item_vectors = self.forward()
        vectors = user_vectors[users]  # [B, D]
        own = (vectors * item_vectors[items]).sum(-1, keepdim=True)  # [B, 1]
        others = vectors @ item_vectors[drawn.to(self.device)].T  # [B, N]
        logits = torch.cat([own, others.masked_fill(known, -torch.inf)], dim=1) / self.temperature  # [B, 1 + N]
        return nn.functional.cross_entropy(logits, torch.zeros_like(users))


class SparseProduct:
    """A constant sparse matrix [M, N], which multiplies dense ones [N, D], with gradients.

    PyTorch's own gradient of such a product transposes the matrix at each step.
    """

    def __init__(self, matrix: Any, device: torch.device):
        self._matrix, self._transposed = (_csr(part).to(device) for part in (matrix, matrix.T))

    def __deepcopy__(self, _: Any) -> SparseProduct:
        return self  # PyTorch cannot copy sparse tensors, and these do not change

    def __call__(self, dense: Tensor) -> Tensor:
        with torch.autocast(dense.device.type, enabled=False):  # which has no sparse products in half precision
            return _Product.apply(self._matrix, self._transposed, dense.float())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        context.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, context.transposed @ gradient


def _csr(matrix: Any) -> Tensor:
    """A SciPy matrix as a sparse tensor in float32."""
    rows = csr_matrix(matrix, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its CSR tensors a beta
        starts, columns, values = map(torch.from_numpy, (rows.indptr, rows.indices, rows.data))
        return torch.sparse_csr_tensor(starts, columns, values, rows.shape)


def hidden_width(width: int) -> int:
    """The hidden width for text vectors of a width.

    The paper's multipliers, 8 for 768 (BERT), 2 for 1,536, 1/2 for 3,072 and 9/32 for 4,096, give the first layer the same number
    of weights. It has no encoder narrower than BERT; these get half their width, since such a layer would be needlessly wide.
    """
    return round(FIRST_LAYER / width) if width >= 768 else round(width / 2)
