"""What a model reads of somebody: RecBole's interaction of users of the dataset, or of histories that nobody in it has.

A row of an evaluation ends before its target. *Now* is one item later: the target has joined the history.

Legend: B users, L longest history that the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_llm.classical.collaborative import CollaborativeModel, padded
from recbole_llm.evaluation.recommender import Recommender

MOMENTS = ("now", "test", "valid")
"""Where a history ends: after all of the user's items, or before the test or the validation items."""


def check_moment(until: str) -> None:
    """Raise a ValueError for a moment that is not one of :data:`MOMENTS`."""
    if until not in MOMENTS:
        raise ValueError(f"--until={until}: give {', '.join(MOMENTS)}")


class Readers:
    """Makes interactions.

    Args:
        model: RecBole's or ours.
        config: of the run.
        loaders: RecBole's evaluation loaders, by phase.
    """

    def __init__(self, model: Any, config: Any, loaders: dict[str, Any]):
        self._model, self._config, self._loaders = model, config, loaders
        self._sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self._data = loaders["test"]._dataset
        self._rows: dict[str, dict[int, int]] = {}
        self.histories = self._data.histories

    def history(self, user: int, moment: str) -> np.ndarray:
        """Internal ids [n] of the items of a user, oldest first."""
        return self.histories.items[user] if moment == "now" else self.histories.before(user, moment)

    def users(self, users: Sequence[int], moment: str) -> Any:
        """The interaction of users [B] of the dataset.

        Raises:
            ValueError: a user has no items before that moment.
        """
        for user in users:
            if not len(self.history(user, moment)):
                token, when = self.histories.user_ids[user], "" if moment == "now" else f" before the {moment} item"
                raise ValueError(f"user {token!r} has no items{when}, so nothing is known to recommend from")
        if not self._sequential:
            rows = self._data.join(Interaction({self._data.uid_field: torch.tensor(users)}))
            return rows.to(self._config["device"])
        loader = self._loaders["valid" if moment == "valid" else "test"]
        places = [self._places(loader, moment).get(user) for user in users]
        if None in places:  # too few interactions for a row of the evaluation
            return self.unknown([self.history(user, moment).tolist() for user in users], users)
        rows = loader._dataset[torch.tensor(places)]
        if moment == "now":
            rows = self._after_target(rows)
        return loader.transform(loader._dataset, rows).to(self._config["device"])

    def unknown(self, histories: Sequence[Sequence[int]], users: Sequence[int] | None = None) -> Any:
        """The interaction of histories [B] of internal item ids, oldest first, without any other column.

        Args:
            users: internal ids, if the histories are theirs.

        Raises:
            ValueError: the model knows users by their ids alone.
        """
        model = self._config["model"]
        if not self._sequential:
            raise ValueError(
                f"{model} knows the users of the dataset by their ids and reads no history; give --user, or "
                "a run of a sequential model such as SASRec, or of an LLM recommender"
            )
        for part in vars(self._model).values() if users is None else ():
            if isinstance(part, CollaborativeModel) and not part.is_sequential:
                raise ValueError(
                    f"{part.name}, a part of {model}, has learnt a vector for each user of the dataset and reads no history; "
                    "give --user, or a run with a sequential model such as SASRec in its place"
                )
        items = padded(histories, self._config["MAX_ITEM_LIST_LENGTH"])  # [B, L]
        lengths = items.ne(0).sum(1)  # [B]
        fields = {self._data.iid_field + self._config["LIST_SUFFIX"]: items, self._data.item_list_length_field: lengths}
        if users is not None or isinstance(self._model, Recommender):  # ours read an id only to draw by it
            fields[self._data.uid_field] = torch.tensor([0] * len(histories) if users is None else list(users))
        return Interaction(fields).to(self._config["device"])

    def explained(self, error: KeyError) -> ValueError:
        """What a column that an interaction of :meth:`unknown` lacks means."""
        model, column = self._config["model"], error.args[0]
        if column == self._data.uid_field:
            reason = "has learnt a vector for each user of the dataset"
        else:
            reason = f"reads the column {column} of a history"
        return ValueError(f"{model} {reason}, which somebody who is not in the dataset does not have; give --user")

    def _places(self, loader: Any, moment: str) -> dict[int, int]:
        """The row of each user: the first one of the split, or now the last one."""
        if moment not in self._rows:
            users = loader._dataset.inter_feat[self._data.uid_field].tolist()
            pairs = enumerate(users) if moment == "now" else reversed([*enumerate(users)])
            self._rows[moment] = {user: row for row, user in pairs}
        return self._rows[moment]

    def _after_target(self, rows: Any) -> Any:
        """Rows whose targets have joined the lists, which stay at their length."""
        data, longest = self._data, self._config["MAX_ITEM_LIST_LENGTH"]
        lengths = rows[data.item_list_length_field]  # [B]
        full, row = lengths >= longest, torch.arange(len(rows))
        for field in [name for name in rows.columns if name + self._config["LIST_SUFFIX"] in rows]:
            listed = rows[field + self._config["LIST_SUFFIX"]].clone()  # [B, L, ...]
            listed[full] = listed[full].roll(-1, dims=1)
            listed[row, lengths.clamp(max=longest - 1)] = rows[field].to(listed.dtype)
            rows[field + self._config["LIST_SUFFIX"]] = listed
        rows[data.item_list_length_field] = (lengths + 1).clamp(max=longest)
        return rows
