"""Confidence against accuracy: how sure an LM is of its first candidate, and how often that is the target.

The probabilities are those of the softmax over the candidates' scores, divided by a temperature (Guo et al., "On Calibration of
Modern Neural Networks", ICML 2017, arXiv 1706.04599).

Legend: N users, C candidates.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from recbole_llm.evaluation.ranks import target_ranks
from recbole_llm.merging.objectives import entropies

BINS = 15  # as in the paper
RANGE = 1e-3, 1e3  # of temperatures; where the likelihood grows without end, the nearer bound


def temperature(scores: Tensor, slots: Tensor) -> float:
    """The temperature ``T`` at which the softmax of ``scores / T`` gives the targets the largest mean log-likelihood.

    The negative log-likelihood is convex in ``1 / T``, so the root of its derivative is the minimum.

    Args:
        scores: ``[N, C]``, finite.
        slots: of the targets, ``[N]``.
    """
    given = scores.double()
    target = given.gather(1, slots[:, None]).squeeze(1)  # [N]

    def slope(log_t: float) -> float:
        """Derivative by ``1 / T``: the mean expected score minus the target's; it falls with ``T``."""
        expected = (torch.softmax(given / np.exp(log_t), dim=-1) * given).sum(-1)  # [N]
        return float((expected - target).mean())

    low, high = np.log(RANGE)
    if not (given != given[:, :1]).any():  # no temperature changes a constant
        return 1.0
    if slope(low) <= 0:  # every target is first
        return RANGE[0]
    if slope(high) >= 0:  # the targets are worse than the average candidate
        return RANGE[1]
    return float(np.exp(brentq(slope, low, high, xtol=1e-10)))


def cross_entropies(scores: Tensor, slots: Tensor) -> Tensor:
    """``- log p`` ``[N]`` (nats) of the targets under the softmax of scores ``[N, C]``."""
    return -torch.log_softmax(scores.float(), dim=-1).gather(1, slots[:, None]).squeeze(1)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Mean over users of ``|accuracy - confidence|`` of their bin, of ``bins`` equal ones of (0, 1].

    Args:
        confidence: ``[N]``, the probability of the first candidate.
        correct: ``[N]``, whether it is the target.
    """
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1  # [N]
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, place, correct.double() - confidence.double())  # [bins]
    return float(gap.abs().sum() / len(confidence))


def confidence(scores: Tensor, slots: Tensor) -> dict[str, float]:
    """Mean largest probability, mean entropy (nats), expected calibration error and mean cross-entropy (nats).

    Args:
        scores: ``[N, C]``, already divided by a temperature.
        slots: of the targets, ``[N]``.
    """
    largest = torch.softmax(scores.double(), dim=-1).amax(-1)  # [N]
    return {
        "max_probability": float(largest.mean()),
        "entropy": float(entropies(scores).double().mean()),
        "calibration_error": expected_calibration_error(largest, target_ranks(scores, slots)[0] == 1),
        "cross_entropy": float(cross_entropies(scores, slots).double().mean()),
    }


def confidence_and_accuracy(scores: Tensor, slots: Tensor) -> dict[str, object]:
    """:func:`confidence`, the share of users whose first candidate is the target, and the same once calibrated.

    The temperature is fitted on the same users; it is one number, so this matters little.
    """
    fitted = temperature(scores, slots)
    hit = float((target_ranks(scores, slots)[0] == 1).double().mean())
    return {"hit@1": hit, **confidence(scores, slots), "temperature": fitted, "calibrated": confidence(scores / fitted, slots)}
