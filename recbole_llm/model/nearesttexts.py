"""NearestTexts: the items whose texts are nearest to those of the user's latest items, by a frozen text encoder.

The same as NearestTitles, with the vectors of ``text_encoder`` in place of TF-IDF, so texts may be near without a common word.
The texts are those that every text encoder of this package reads: titles and ``text_fields``.

Legend: B users, K latest items, I items, T width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn.functional import normalize

from recbole_llm.data.items import text_fields
from recbole_llm.evaluation.recommender import Facts
from recbole_llm.llm.text_backbone import TextBackbone
from recbole_llm.llm.text_encoder import item_sentences
from recbole_llm.model.shortcut import TIE_BREAK, LatestItems, Shortcut
from recbole_llm.store.stages import Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet


class NearestTexts(Shortcut):
    """Cosines of vectors of a text encoder; the builtin one is made in a stage."""

    uses_item_text = True
    scores_unseen_items = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.latest = LatestItems.of(config)
        self.text = TextBackbone(config, item_sentences(dataset.item_texts, text_fields(config, dataset.item_texts)))

    def __str__(self) -> str:
        return f"{super().__str__()}, text vectors of {self.text.name}"

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        return self.text.stages

    def load(self, cache: StageCache) -> None:
        """Encode the catalogue."""
        super().load(cache)
        self.vectors = normalize(self.text.vectors(self.text.load(cache)), dim=1).numpy()  # [I, T]

    def facts(self) -> Facts:
        text = self.text
        return Facts(text.name, text.fingerprint, backbone_identity=text.identity, builtin=text.builtin)

    def catalogue_scores(self, interaction: Any) -> np.ndarray:
        profiles = self.weighted_history(interaction, self.latest) @ self.vectors
        return profiles @ self.vectors.T + TIE_BREAK * self.popularity
