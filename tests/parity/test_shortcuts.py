"""TransitionGraph against a reference of ten lines on whole histories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def reference(
    histories: list[list[int]], items: int, history: list[int], *, last: int, steps: int, s: float, a: float
) -> np.ndarray:
    """Scores [I] after a history, from training histories."""
    n, p = np.zeros((items, items)), np.zeros(items)
    for own in histories:
        for place, item in enumerate(own):
            p[item] += 1
            for d in range(1, min(steps, place) + 1):
                n[own[place - d], item] += d**-a
    p /= p.sum()
    weights = [k**-a for k in range(1, last + 1)]
    latest = [*history[::-1], *[0] * last][:last]  # no transition leads from the padding item
    return sum(w * (n[i] + s * p) / (n[i].sum() + s) for w, i in zip(weights, latest, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("last", "steps", "s", "a"), [(2, 10, 1.0, 1.0), (1, 1, 0.5, 0.0), (20, 3, 2.0, 2.0)], ids=["default", "Markov chain", "long"]
)
def test_scores_equal_the_reference(last: int, steps: int, s: float, a: float, assemble: Any, settings: dict[str, Any]) -> None:
    changes = {"last_items": last, "transition_steps": steps, "smoothing": s, "recency": a}
    made = assemble("TransitionGraph", settings, **changes)
    made.trainer.fit(made.train, None)
    interaction = next(iter(made.test))[0]
    histories = made.test._dataset.histories
    trained = [histories.train(user).tolist() for user in range(len(histories.items))]
    scores = made.model.full_sort_predict(interaction).numpy()
    for user, found in zip(interaction["user_id"].tolist(), scores, strict=True):
        history = histories.before(user, "test").tolist()
        expected = reference(trained, len(histories.item_ids), history, last=last, steps=steps, s=s, a=a)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
