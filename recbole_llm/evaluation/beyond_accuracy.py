"""Metrics of the recommended lists themselves: what they cover, how popular, new and different their items are.

RecBole has ItemCoverage, AveragePopularity, GiniIndex, ShannonEntropy and TailPercentage; :class:`Novelty` and :class:`Diversity`
are added to them (``registry.METRICS``). All describe lists of the whole catalogue. The configuration refuses them for drawn
candidates, where they would describe the draw.

Legend: N users, K longest list, I items, V words.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from recbole.evaluator import Collector
from recbole.evaluator.base_metric import AbstractMetric
from recbole.utils import EvaluatorType
from scipy.sparse import csr_matrix
from torch import Tensor

from recbole_llm.config.metrics import describes_lists

TITLES = "data.title_vectors"
ITEM_USERS = "data.item_users"  # of training, who chose each item


class ListMetric(AbstractMetric):
    """Base of the metrics of lists, means over users."""

    metric_type = EvaluatorType.RANKING

    def __init__(self, config: Any):
        super().__init__(config)
        self.topk = config["topk"]


class Novelty(ListMetric):
    """Mean self-information of the recommended items, in bits: log2(users / users who chose the item in training).

    Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender systems", PNAS 2010. An item that training never
    shows counts as chosen once.
    """

    metric_need = ["rec.items", ITEM_USERS, "data.num_users"]  # noqa: RUF012 (RecBole's form)

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        items = dataobject.get("rec.items").numpy()  # [N, K]
        counts, users = dataobject.get(ITEM_USERS), dataobject.get("data.num_users") - 1  # without the padding user
        recommended, places = np.unique(items, return_inverse=True)
        bits = np.log2(users / np.array([max(counts.get(item, 0), 1) for item in recommended.tolist()]))
        found = bits[places.reshape(items.shape)]  # [N, K]
        return {f"novelty@{k}": round(float(found[:, :k].mean()), self.decimal_place) for k in self.topk}


class Diversity(ListMetric):
    """1 minus the mean cosine of two items of a list, over TF-IDF vectors of their titles; none for lists of one item.

    Ziegler et al., "Improving Recommendation Lists Through Topic Diversification", WWW 2005 (intra-list similarity).
    """

    metric_need = ["rec.items", TITLES]  # noqa: RUF012 (RecBole's form)

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        items, vectors = dataobject.get("rec.items").numpy(), dataobject.get(TITLES)  # [N, K], [I, V]
        found: dict[str, float] = {}
        for k in (k for k in self.topk if k > 1):
            rows = np.repeat(np.arange(len(items)), k)
            chosen = csr_matrix((np.ones(len(rows)), (rows, items[:, :k].ravel())), shape=(len(items), vectors.shape[0]))
            sums = chosen @ vectors  # [N, V]
            own = chosen @ vectors.multiply(vectors).sum(1)  # [N, 1], squared lengths
            pairs = np.asarray(sums.multiply(sums).sum(1) - own).ravel()  # [N], each pair twice
            found[f"diversity@{k}"] = round(float(np.mean(1 - pairs / (k * (k - 1)))), self.decimal_place)
        return found


def accuracy(metrics: Iterable[str]) -> list[str]:
    """The metrics that do not describe the lists themselves; lists of candidates are not recommendations."""
    return [name for name in metrics if not describes_lists(name)]


def title_vectors(titles: list[str]) -> csr_matrix:
    """TF-IDF vectors [I, V] of unit length, of the words of the titles; zero for the padding item and a title without words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return csr_matrix(TfidfVectorizer(token_pattern=r"\w+").fit_transform(titles))


class SafeCollector(Collector):
    """RecBole's collector, with what metrics of lists need, counted alike for general and sequential models.

    RecBole's own fails at numbers without ``.cpu()`` (RUCAIBox/RecBole#2131), and the first item of each user is missing in its
    counts of a sequential model's training split.
    """

    def data_collect(self, train_data: Any) -> None:
        """Collect from the training data.

        Raises:
            ValueError: Diversity without titles.
        """
        data = train_data._dataset  # which RecBole's loader of knowledge-aware models does not also call dataset
        super().data_collect(SimpleNamespace(dataset=data))
        for need, counted in (("data.count_items", "train_counts"), (ITEM_USERS, "train_users")):
            if self.register.need(need):
                counts = getattr(data.histories, counted)
                self.data_struct.set(need, {int(item): int(counts[item]) for item in counts.nonzero()[0]})
        if self.register.need(TITLES):
            try:
                self.data_struct.set(TITLES, title_vectors(data.item_texts.titles))
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(f"metrics: Diversity compares titles, but {error}; remove it from metrics") from error

    def get_data_struct(self) -> Any:
        plain = {key: value for key, value in self.data_struct._data_dict.items() if not isinstance(value, Tensor)}
        for key in plain:
            del self.data_struct._data_dict[key]
        struct = super().get_data_struct()
        for owner in (self.data_struct, struct):
            owner._data_dict.update(plain)
        return struct
