"""The retriever: a classical model that ranks the whole catalogue. Its top N are candidates, or are re-ranked by an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.evaluation.full_ranking import RandomTies
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import fingerprint

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories


class Retriever(CollaborativeModel):
    """The model that ``retriever`` names, with the settings of ``retriever_config``.

    The constructor does not train: run :attr:`stage`, then :meth:`load` its result.

    Args:
        histories: of the run, to which its own must be equal.
        limit: of the items in the rows of the run, if it scores them.

    Raises:
        ValueError: the model reads more than a user and a history to rank; or as :meth:`check` and :meth:`check_length`.
    """

    KEYS = "retriever", "retriever_config"

    def __init__(self, config: Any, histories: Histories | None = None, limit: int | None = None):
        super().__init__(config, config["retriever"], config["retriever_config"])
        if histories is not None:
            self.check(histories)
        if limit is not None:
            self.check_length(limit)
        self._try_to_rank()
        self._loaded = False

    def _try_to_rank(self) -> None:
        if not self.is_sequential:
            return
        try:
            self.candidate_scores([1], [[1]], torch.tensor([[1]]))
        except KeyError as error:  # such as the target, which the CPR models read
            raise ValueError(
                f"retriever: {self.name} reads the column {error} of a row to rank, which is unknown when the next item is asked "
                "for; choose another model, such as SASRec"
            ) from error

    @property
    def identity(self) -> str:
        """``<model>-<SHA-256>`` of its stage and of the code that ranks."""
        return f"{self.name}-{fingerprint([self.stage.fingerprint, code_fingerprint(__name__)])}"

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._loaded = True

    @torch.no_grad()
    def top(self, phase: str, number: int) -> dict[int, list[int]]:
        """The ``number`` best items outside the user's history (with repeats kept, of all), best first, by internal user id.

        Ties are broken as in a full ranking, so the file's order of items decides nothing.

        Raises:
            RuntimeError: the stage's result is not loaded.
            ValueError: a user's history leaves fewer items.
        """
        if not self._loaded:
            raise RuntimeError(f"retriever {self.name}: it is not trained yet; run its stage and load the result")
        found: dict[int, list[int]] = {}
        ties = RandomTies(self.histories.user_ids, self.histories.item_ids)
        for interaction, *_ in self.loaders[1 if phase == "valid" else 2]:
            users = interaction[self.config["USER_ID_FIELD"]].tolist()
            scores = self.scores(interaction)  # [B, I], B users, I items
            scores[:, 0] = -torch.inf
            for row, user in zip(scores, users, strict=True):
                row[torch.from_numpy(self.histories.excluded(user, phase)).to(row.device)] = -torch.inf
            left = int(torch.isfinite(scores).sum(1).min())
            if left < number:
                raise ValueError(
                    f"candidates.num_negatives: {number - 1} is too large, the retriever ranks at most {left} items for a user"
                )
            ranked = ties(scores, torch.tensor(users), number)
            found.update(zip(users, ranked.topk(number).indices.tolist(), strict=True))
        return found
