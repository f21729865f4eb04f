"""Which users an LLM ranks: features that are known before the LLM is asked, and a rule on one of them.

A rule routes the users on one side of a threshold. It is chosen by the gains of validation users: the metric with the LLM's
ranking minus that with the collaborative model's. The best of many rules looks better than it is, so :func:`choose` has two
safeguards: of all rules within one standard error of the best, it takes the one that routes fewest users; and it routes nobody
unless the same choice, made on other users, has gained more than one standard error (cross-fitting).

Legend: N users, C candidates, W weights of a fusion, R rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.settings import Settings

FOLDS = 5
Features = Mapping[str, np.ndarray]
"""Values [N] of each feature by name."""


@dataclass(frozen=True)
class RoutingSettings(Settings):
    """The ``routing_*`` keys; see ``properties/model/Cascade.yaml``."""

    KEYS = {name: f"routing_{name}" for name in ("features", "steps", "standard_errors", "fusion", "weights")}

    features: Sequence[str]
    steps: int
    standard_errors: float
    fusion: str
    weights: Sequence[float]

    def __post_init__(self) -> None:
        for key in ("features", "weights"):
            if not getattr(self, key):
                raise ValueError(f"routing_{key}: an empty list leaves no rule; remove it to use the default")

    @property
    def tried(self) -> Sequence[float]:
        """The weights [W] of the LLM that are tried."""
        return [1.0] if self.fusion == "llm" else self.weights


def features(histories: Sequence[Sequence[int]], candidates: Tensor, scores: Tensor, counts: Tensor) -> dict[str, np.ndarray]:
    """The features of N users by name, float64 [N] each.

    ``history_length``; ``history_popularity`` and ``candidate_popularity``, the means of log(1 + training interactions) over the
    history and over the candidates; ``unseen_candidates``, the share of candidates without training interactions; ``entropy``
    (nats) and ``margin`` (difference of the two largest probabilities) of the softmax of the collaborative model's scores.

    Args:
        candidates, scores: [N, C], the scores of the collaborative model.
        counts: training interactions of each item.
    """
    counts = counts.to(candidates.device)
    popularity = counts.double().log1p()
    own = [popularity[torch.tensor(list(history), dtype=torch.long, device=popularity.device)].sum() for history in histories]
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.float64, device=popularity.device)  # [N]
    log_p = scores.double().log_softmax(1)  # [N, C]
    best = log_p.exp().topk(min(2, log_p.size(1)), dim=1).values  # [N, 2]
    found = {
        "history_length": lengths,
        "history_popularity": torch.stack(own) / lengths.clamp(min=1),
        "candidate_popularity": popularity[candidates].mean(1),
        "unseen_candidates": (counts[candidates] == 0).double().mean(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "margin": best[:, 0] - best[:, -1],
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def fused(kind: str, cheap: Tensor, llm: Tensor, weight: float) -> Tensor:
    """Scores [N, C] of routed users from those of the collaborative model and of the LLM, both [N, C]."""
    if kind == "llm":
        return llm
    transform = _reciprocal_ranks if kind == "reciprocal_rank" else _standardised
    return weight * transform(llm) + (1 - weight) * transform(cheap)


def _reciprocal_ranks(scores: Tensor) -> Tensor:
    order = scores.argsort(dim=1, descending=True, stable=True)  # [N, C]; equal scores in the order of slots, as everywhere
    places = torch.arange(1, scores.size(1) + 1, device=scores.device, dtype=torch.float32).expand_as(order)
    return 1 / torch.empty_like(places).scatter_(1, order, places)


def _standardised(scores: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1; an item that a model excludes has the score of its last one."""
    scores = scores.float()
    excluded = scores <= torch.finfo(scores.dtype).min
    last = scores.masked_fill(excluded, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)
    scores = scores.where(~excluded, last)
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0).clamp(min=1e-9)


@dataclass(frozen=True)
class Rule:
    """Routes the users whose ``feature`` is above (``high``) or below the ``threshold``.

    Attributes:
        share: of the validation users who are routed; with 0 and 1 nobody and everybody is, and the threshold says nothing.
        weight: of the LLM in the fusion.
    """

    feature: str
    high: bool
    threshold: float
    share: float
    weight: float = 1.0

    def priority(self, known: Features) -> np.ndarray:
        """Numbers [N] in whose order, largest first, users are routed as the share grows."""
        return known[self.feature] if self.high else -known[self.feature]

    def __call__(self, known: Features) -> np.ndarray:
        """Which users are routed, bool [N]."""
        priority = self.priority(known)
        if self.share in (0, 1):
            return np.full(len(priority), self.share == 1)
        return priority > (self.threshold if self.high else -self.threshold)

    def __str__(self) -> str:
        if self.share in (0, 1):
            return (
                f"{'everybody' if self.share else 'nobody'} is routed (first by {'high' if self.high else 'low'} {self.feature})"
            )
        return f"{self.feature} {'>' if self.high else '<'} {self.threshold:.4g}, {self.share:.0%} of the validation users"


def rules(known: Features, names: Sequence[str], steps: int) -> Iterator[Rule]:
    """Rules of each feature that route some of N users and not all, at about equal steps of the share."""
    for name in names:
        for high in (False, True):
            ordered = np.sort(known[name] if high else -known[name])[::-1]  # [N], priorities
            changes = np.flatnonzero(np.diff(ordered)) + 1  # numbers of users before which the value changes
            if not len(changes):
                continue
            wanted = np.arange(1, steps) * len(ordered) / steps
            for number in np.unique(changes[np.abs(changes[:, None] - wanted).argmin(0)]):
                middle = float(ordered[number - 1] + ordered[number]) / 2
                yield Rule(name, high, middle if high else -middle, float(number / len(ordered)))


@dataclass(frozen=True)
class Choice:
    """A rule, and what its choice is based on.

    Attributes:
        gain, standard_error: mean gain of the rule over all validation users, who gain 0 where they are not routed.
        cross_fitted_gain, cross_fitted_standard_error: of the rules that are chosen on the other folds.
        everybody: mean gain if everybody is routed.
        users: number of validation users.
    """

    rule: Rule
    gain: float
    standard_error: float
    cross_fitted_gain: float
    cross_fitted_standard_error: float
    everybody: float
    users: int

    @property
    def words(self) -> str:
        """The gains, with half the width of their 95 % intervals."""
        own, crossed = 1.96 * self.standard_error, 1.96 * self.cross_fitted_standard_error
        found = f"gain {self.gain:+.4f} ±{own:.4f}, cross-fitted {self.cross_fitted_gain:+.4f} ±{crossed:.4f}"
        return f"{found}, with everybody routed {self.everybody:+.4f}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "text": str(self.rule)}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Choice:
        """The choice of :meth:`as_dict`."""
        return cls(Rule(**values["rule"]), **{key: value for key, value in values.items() if key not in ("rule", "text")})


def choose(gains: np.ndarray, known: Features, settings: RoutingSettings) -> Choice:
    """The rule for gains [W, N] of N validation users, in a random order, at each weight of :attr:`RoutingSettings.tried`."""
    users, places = gains.shape[1], np.arange(gains.shape[1]) % FOLDS
    crossed = np.zeros(users)
    for fold in range(FOLDS):
        there = places == fold
        if there.any() and not there.all():
            rule, row = _best(gains[:, ~there], {name: values[~there] for name, values in known.items()}, settings)
            crossed[there] = gains[row][there] * rule({name: values[there] for name, values in known.items()})
    rule, row = _best(gains, known, settings)
    if crossed.mean() <= settings.standard_errors * _standard_error(crossed):
        rule, row = _all_alike(gains, known, settings, share=0.0)
    routed = gains[row] * rule(known)
    return Choice(
        rule,
        gain=float(routed.mean()),
        standard_error=_standard_error(routed),
        cross_fitted_gain=float(crossed.mean()),
        cross_fitted_standard_error=_standard_error(crossed),
        everybody=float(gains[row].mean()),
        users=users,
    )


def _best(gains: np.ndarray, known: Features, settings: RoutingSettings) -> tuple[Rule, int]:
    """The rule that routes fewest users within some standard errors of the best one, and the row of its weight."""
    users, tried = gains.shape[1], list(rules(known, settings.features, settings.steps))
    routes = np.array([*(rule(known) for rule in tried), np.zeros(users), np.ones(users)], dtype=np.float64)  # [R + 2, N]
    means = gains @ routes.T / users  # [W, R + 2]
    row, best = map(int, np.unravel_index(means.argmax(), means.shape))
    top = gains[row] * routes[best]  # [N]
    behind = means[row, best] - means  # [W, R + 2], what the best rule gains over each
    squares = (top**2).mean() + (gains**2 @ routes.T - 2 * (gains * top) @ routes.T) / users
    errors = np.sqrt((squares - behind**2).clip(min=0) / users)
    shares = np.where(behind <= settings.standard_errors * errors + 1e-12, routes.mean(1), np.inf)
    row, place = map(int, np.unravel_index(np.where(shares == shares.min(), means, -np.inf).argmax(), means.shape))
    share = float(routes[place].mean())
    if place >= len(tried):
        return _all_alike(gains, known, settings, share)
    return replace(tried[place], share=share, weight=float(settings.tried[row])), row


def _all_alike(gains: np.ndarray, known: Features, settings: RoutingSettings, share: float) -> tuple[Rule, int]:
    """The rule that routes nobody (``share`` 0) or everybody (1), with the weight that is best for everybody, and its row.

    The curve has the order of the rule that is best among those that route some users with this weight.
    """
    row, tried = int(gains.mean(1).argmax()), list(rules(known, settings.features, settings.steps))
    weight = float(settings.tried[row])
    if not tried:  # no feature tells two users apart
        return Rule(settings.features[0], True, 0.0, share, weight), row
    place = int(np.argmax([gains[row] @ rule(known) for rule in tried]))
    return replace(tried[place], share=share, weight=weight), row


def joined(known: Sequence[Features]) -> Features:
    """The features of the users of several batches."""
    return {name: np.concatenate([one[name] for one in known]) for name in known[0]}


def _standard_error(values: np.ndarray) -> float:
    return float(values.std() / np.sqrt(len(values)))
