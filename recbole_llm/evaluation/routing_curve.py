"""The quality of a cascade against the share of users who are routed to its expensive model, on test users.

Users are routed in the order of a rule. The curve is a report: it uses test targets, and no choice is made from it.

Legend: N users, S shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from recbole_llm.evaluation.metrics import half_width
from recbole_llm.evaluation.plots import picture
from recbole_llm.store.files import atomic_write


@dataclass(frozen=True)
class Point:
    """The cascade at one share of users routed.

    Attributes:
        value, half_width: mean of the metric, and half the width of its 95 % interval over users.
        gain, gain_half_width: over the cheap model, paired by user.
        random: the same share routed at random (expected value).
        oracle: routed by the true gains of the test users, an upper bound that no rule can know.
        cpu_seconds: for 1,000 users; None if it was not measured.
    """

    share: float
    value: float
    half_width: float
    gain: float
    gain_half_width: float
    random: float
    oracle: float
    cpu_seconds: float | None


@dataclass(frozen=True)
class RoutingCurve:
    """Points by growing share.

    Attributes:
        metric: its name.
        points: [S], the first without any routed user, the last with all.
        break_even: the smallest share to which no larger share is significantly superior (95 %, paired by user).
        oracle: the highest value of :attr:`Point.oracle`, and its share.
        users: number of users.
    """

    metric: str
    points: Sequence[Point]
    break_even: float
    oracle: tuple[float, float]
    users: int

    @classmethod
    def of(
        cls,
        metric: str,
        cheap: np.ndarray,
        expensive: np.ndarray,
        priority: np.ndarray,
        *,
        steps: int,
        cpu_seconds: tuple[float, float] | None = None,
    ) -> RoutingCurve:
        """The curve of N users.

        Args:
            cheap, expensive: the metric of each user [N] by the two models.
            priority: users are routed by it, the largest first [N].
            steps: number of equal steps of the share.
            cpu_seconds: for one user, of the cheap model and of the expensive one, which a routed user needs beside it.
        """
        users, gains = len(cheap), expensive - cheap
        numbers = np.unique(np.rint(np.linspace(0, users, steps + 1)).astype(int))  # of routed users [S]
        places = np.empty(users, dtype=int)
        places[np.argsort(-priority, kind="stable")] = np.arange(users)
        routed = places < numbers[:, None]  # [S, N]
        values = np.where(routed, expensive, cheap)  # [S, N]
        best = cheap.mean() + np.concatenate([[0], np.cumsum(np.sort(gains)[::-1])]) / users  # [N + 1]
        points = []
        for number, row in zip(numbers.tolist(), values, strict=True):
            share = number / users
            point = Point(
                share,
                value=float(row.mean()),
                half_width=half_width(row),
                gain=float((row - cheap).mean()),
                gain_half_width=half_width(row - cheap),
                random=float(cheap.mean() + share * gains.mean()),
                oracle=float(best[number]),
                cpu_seconds=None if cpu_seconds is None else 1000 * (cpu_seconds[0] + share * cpu_seconds[1]),
            )
            points.append(point)
        later = [values[at + 1 :] - row for at, row in enumerate(values)]
        superior = [any(gain.mean() > half_width(gain) for gain in more) for more in later]
        top = int(best.argmax())
        return cls(metric, points, points[superior.index(False)].share, (float(best[top]), top / users), users)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the oracle is marked as one."""
        oracle = {"value": self.oracle[0], "share": self.oracle[1], "uses_test_targets": True}
        points = [asdict(point) for point in self.points]
        return {"metric": self.metric, "users": self.users, "break_even": self.break_even, "oracle": oracle, "points": points}

    def write(self, folder: Path, title: str) -> list[str]:
        """Write ``routing.csv`` and ``routing.png`` to a folder; returns lines for the log."""
        table = pd.DataFrame(self.points)
        atomic_write(folder / "routing.csv", table.to_csv(index=False, lineterminator="\n"))
        with picture(folder / "routing.png", (6, 4)) as figure:
            axes = figure.subplots()
            (line,) = axes.plot(table.share, table.value, label="rule")
            axes.fill_between(
                table.share, table.value - table.half_width, table.value + table.half_width, alpha=0.2, color=line.get_color()
            )
            axes.plot(table.share, table.random, "--", label="at random")
            axes.plot(table.share, table.oracle, "--", label="oracle (test targets)")
            axes.axvline(self.break_even, color="gray", linewidth=1, linestyle=":")
            axes.set(title=title, xlabel="share of users routed to the LLM", ylabel=self.metric)
            axes.legend(frameon=False)
        return [f"quality against share of users routed ({self.users} test users):\n{self.table()}", self.verdict()]

    def verdict(self) -> str:
        """The break-even point in words."""
        if not self.break_even:
            return "break-even: 0, no share of routed users is significantly superior to the cheap model alone"
        return f"break-even: {self.break_even:.0%}, no larger share of routed users is significantly superior to it"

    def table(self, most: int = 10) -> str:
        """At most about ``most`` points as plain text."""
        step = max(1, (len(self.points) - 1) // most)
        chosen = [point for at, point in enumerate(self.points) if at % step == 0 or at == len(self.points) - 1]
        rows = [
            [
                f"{point.share:.0%}",
                f"{point.value:.4f} ±{point.half_width:.3f}",
                f"{point.gain:+.4f} ±{point.gain_half_width:.3f}",
                f"{point.random:.4f}",
                f"{point.oracle:.4f}",
                "" if point.cpu_seconds is None else f"{point.cpu_seconds:,.2f}",
            ]
            for point in chosen
        ]
        headers = ["routed", self.metric, "gain", "at random", "oracle (test targets)", "CPU s for 1,000 users"]
        return tabulate(rows, headers=headers, disable_numparse=True, colalign=["right"] * len(headers))
