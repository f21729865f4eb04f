"""RepeatRule: the items of the user's own history, the latest first, then the most popular ones.

If users come back to the same items, this rule is hard to beat, and a model may have learned no more than this rule. If repeats
are dropped, the rule equals popularity.

Legend: B users, C candidates, L longest history, I items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.model.shortcut import Shortcut


class RepeatRule(Shortcut):
    """An item of the history scores its last place there, counted from 1; any other its popularity, which is below 1."""

    def catalogue_scores(self, interaction: Any) -> np.ndarray:
        items, lengths = (interaction[field].cpu().numpy() for field in (self.ITEM_SEQ, self.ITEM_SEQ_LEN))  # [B, L], [B]
        scores = np.tile(self.popularity, (len(items), 1))  # [B, I]
        rows, places = np.nonzero(np.arange(items.shape[1]) < lengths[:, None])
        np.maximum.at(scores, (rows, items[rows, places]), places + np.float32(1))
        return scores

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        items, lengths = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu()  # [B, L], [B]
        listed = candidates.cpu()  # [B, C]
        places = torch.arange(1, items.size(1) + 1) * (torch.arange(items.size(1)) < lengths[:, None])  # [B, L], 0 for padding
        last = torch.zeros_like(listed)
        for place, item in zip(places.T, items.T, strict=True):  # ascending places
            last = torch.where(listed == item[:, None], torch.maximum(last, place[:, None]), last)
        popularity = torch.from_numpy(self.popularity)[listed]  # [B, C]
        return torch.where(last > 0, last.float(), popularity).to(self.device)
