"""The evaluation users of a phase, and the items that their candidates are drawn from.

Legend: N users of a phase, I items, U users of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data import forms
from recbole_llm.data.drawing import Catalogue, token_order
from recbole_llm.data.histories import Histories
from recbole_llm.data.items import title_key
from recbole_llm.store.files import fingerprint

_USERS = 2**16  # whose histories are sorted at once


class CatalogueItems:
    """What the candidates of all phases need of the items of a dataset, computed once.

    Args:
        weighted: whether they are drawn by popularity.
    """

    def __init__(self, dataset: Any, *, weighted: bool):
        self._dataset, self._weighted = dataset, weighted
        self.histories: Histories = dataset.histories

    @cached_property
    def order(self) -> list[int]:
        """:func:`~recbole_llm.data.drawing.token_order`."""
        return token_order(self.histories.item_ids)

    @cached_property
    def tokens(self) -> str:
        """Fingerprint of the item ids."""
        return fingerprint([self.histories.item_ids[item] for item in self.order])

    @cached_property
    def keys(self) -> list[str]:
        """Key of the title of each item, by internal id."""
        return [*map(title_key, self._dataset.catalogue_titles)]

    @cached_property
    def titles(self) -> str:
        """Fingerprint of the keys."""
        return fingerprint([self.keys[item] for item in self.order])

    @cached_property
    def weights(self) -> np.ndarray | None:
        """The training interactions of each item [I]; None for a uniform draw."""
        return self.histories.train_counts.astype(np.float64) if self._weighted else None

    @cached_property
    def catalogue(self) -> Catalogue:
        """From which negatives are drawn."""
        return Catalogue(self.keys, self.order, self.weights)


@dataclass(frozen=True)
class EvalPhase:
    """The N evaluation users of a phase, who need candidates.

    Attributes:
        name: ``valid`` or ``test``.
        items: of the dataset; all phases share them.
        users, targets: internal ids [N].
    """

    config: Any
    name: str
    items: CatalogueItems
    users: Tensor
    targets: Tensor

    @classmethod
    def of(cls, config: Any, items: CatalogueItems, name: str) -> EvalPhase:
        """The users of the phase ``name``.

        Raises:
            ValueError: there are none, or one has several targets.
        """
        histories = items.histories
        _check_one_target(config, histories, name)
        users = torch.from_numpy(histories.evaluated(name))  # [N]
        if not len(users):
            whole = histories.held_out is None
            needed = "the four interactions that a split needs" if whole else f"a {name} item and one before it"
            raise ValueError(f"candidates: no user of {config['dataset']} has {needed}")
        return cls(config, name, items, users, torch.from_numpy(histories.targets(users.tolist(), name)))

    @property
    def histories(self) -> Histories:
        """Those of the dataset."""
        return self.items.histories

    @property
    def source(self) -> str:
        """``candidates.source``."""
        return str(self.config["candidates"]["source"])

    @property
    def number(self) -> int:
        """``candidates.num_negatives``."""
        return int(self.config["candidates"]["num_negatives"])

    @property
    def seed(self) -> int:
        """``candidates.seed``."""
        return int(self.config["candidates"]["seed"])


def _check_one_target(config: Any, histories: Histories, phase: str) -> None:
    counts = histories.target_counts(phase)  # [U]
    if counts is None or histories.one_target(phase):
        return
    user = int(counts.argmax())
    raise ValueError(
        f"{forms.described(config)}: user {histories.user_ids[user]} has {counts[user]} {phase} interactions, and mode "
        "'candidates' needs one target for each user; give --eval_args=\"{'split': {'LS': 'valid_and_test'}, 'order': 'TO'}\" "
        "and one .inter file, or, for a model that ranks the catalogue, --eval_args=\"{'mode': 'full'}\""
    )


def histories_fingerprint(users: Iterable[int], histories: Histories, phase: str, order: list[int]) -> str:
    """SHA-256 of users, targets and the set of each user's items before the target; ``order`` is :attr:`CatalogueItems.order`."""
    place = np.zeros(len(order) + 1, dtype=np.int64)
    place[order] = np.arange(1, len(order) + 1)
    digest, number = sha256(), len(place)
    ids = histories.user_ids
    ranked = sorted(users, key=ids.__getitem__)
    for start in range(0, len(ranked), _USERS):
        part = ranked[start : start + _USERS]
        before, targets = histories.all_before(part, phase), place[histories.targets(part, phase)].tolist()
        rows = np.repeat(np.arange(len(part)), [*map(len, before)])
        known = np.sort(rows * number + place[np.concatenate(before)])  # of all rows, by row
        known = known[np.diff(known, prepend=-1) > 0]
        ends = np.searchsorted(known, np.arange(1, len(part) + 1) * number).tolist()
        content, pieces = (known % number).astype("<i8").tobytes(), list[bytes]()
        for user, target, begin, end in zip(part, targets, [0, *ends], ends, strict=False):
            pieces += [f"{ids[user]}\t{target}\t{end - begin}\n".encode(), content[8 * begin : 8 * end]]
        digest.update(b"".join(pieces))
    return digest.hexdigest()
