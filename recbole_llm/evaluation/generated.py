"""``scoring: published``: the metrics of a paper's own protocol, measured beside ours on the same users and candidates.

Legend: N users, C candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from recbole_llm.data.templates import template
from recbole_llm.evaluation.published import PublishedProtocol
from recbole_llm.evaluation.ranks import Ranks
from recbole_llm.evaluation.recommender import Answers, Recommender
from recbole_llm.evaluation.record_files import by_user
from recbole_llm.evaluation.significance import compare
from recbole_llm.store.answers import CachedAnswers
from recbole_llm.store.files import fingerprint
from recbole_llm.store.progress import progress_bar

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

logger = getLogger()

LIKELIHOOD, PUBLISHED = "likelihood", "published"
USERS_AT_ONCE = 32  # between two saves of the answers


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of the answers of one row.

    Attributes:
        users: internal ids [N].
        ranks: of the target [N]; infinite where the answer misses it.
        matched: number of candidates that an answer names [N].
        begins: whether it names one first [N].
        seconds: of generating the answers.
        folder: the cached answers.
    """

    users: list[int]
    ranks: list[float]
    matched: list[int]
    begins: list[bool]
    seconds: float
    folder: Path

    @property
    def unmatched(self) -> float:
        """Share of the answers that name no candidate."""
        return float(np.mean(np.array(self.matched) == 0))

    @property
    def unmatched_first(self) -> float:
        """Share of the answers whose first title is no candidate."""
        return 1 - float(np.mean(self.begins))

    @property
    def several(self) -> float:
        """Share of the answers that name several candidates."""
        return float(np.mean(np.array(self.matched) > 1))

    @property
    def users_per_second(self) -> float:
        """Speed of the generation, that of cached answers included."""
        return len(self.users) / self.seconds

    def difference(self, ranks: Ranks) -> dict[str, float]:
        """Hit@1 of the answers minus Hit@1 of the likelihood on the same users, user by user."""
        by_user = dict(zip(ranks.users, ranks.ranks, strict=True))
        generated = [float(rank == 1) for rank in self.ranks]  # [N]
        scored = [float(by_user[user] == 1) for user in self.users]  # [N]
        found = compare(generated, scored)
        half_width = 1.96 * found.deviation / math.sqrt(found.users)
        return {
            "generated": float(np.mean(generated)),
            "likelihood": float(np.mean(scored)),
            "difference": found.difference,
            "half_width_95": half_width,
            "p_value": found.p_value,
        }


@dataclass(frozen=True)
class PublishedResults:
    """The results of a run's published protocol.

    Attributes:
        rows: outcomes by the name of a row.
        ranks: those by likelihood of the same rows.
        differences: settings of the run that are not the paper's.
    """

    protocol: PublishedProtocol
    rows: Mapping[str, Outcomes]
    ranks: Mapping[str, Ranks]
    differences: Sequence[str]

    def content(self, user_ids: Sequence[str]) -> dict[str, Any]:
        """The content of the run record; a missed target has no rank (None)."""
        return {
            "paper": self.protocol.paper,
            "rule": "exact title" if self.protocol.exact else "title contained in the answer",
            "max_new_tokens": self.protocol.max_new_tokens,
            "repetition_penalty": self.protocol.repetition_penalty,
            "not_as_published": list(self.differences),
            "rows": {name: self._row(name, user_ids) for name in self.rows},
        }

    def metrics(self) -> dict[str, dict[str, float]]:
        """The paper's metrics by the name of a row."""
        return {name: self.protocol.results(row.ranks)[0] for name, row in self.rows.items()}

    def _row(self, name: str, user_ids: Sequence[str]) -> dict[str, Any]:
        row = self.rows[name]
        values, widths = self.protocol.results(row.ranks)
        return {
            "results": values,
            "half_width_95": widths,
            "users": len(row.users),
            "unmatched": row.unmatched,
            "unmatched_first": row.unmatched_first,
            "several_matches": row.several,
            "hit@1": row.difference(self.ranks[name]),
            "seconds": row.seconds,
            "users_per_second": row.users_per_second,
            "ranks": by_user(user_ids, row.users, row.ranks),
            "answers": row.folder.name,
        }

    def table(self) -> str:
        """The results as plain text; the last columns compare Hit@1 with that of the likelihood, user by user."""
        lines = []
        for name, row in self.rows.items():
            values, widths = self.protocol.results(row.ranks)
            hit = row.difference(self.ranks[name])
            first, *others = values
            line = [name, f"{values[first]:.4f} ±{widths[first]:.3f}", *(f"{values[key]:.4f}" for key in others)]
            line += [f"{share:.1%}" for share in (row.unmatched, row.unmatched_first, row.several)]
            line += [f"{row.users_per_second:.2f}", f"{hit['likelihood']:.4f}"]
            lines.append([*line, f"{hit['difference']:+.4f} ±{hit['half_width_95']:.3f}, p {hit['p_value']:.3f}"])
        headers = ["", *values, "no candidate", "first is none", "several", "users/s", "hit@1 by likelihood", "difference"]
        users = len(row.users)
        tokens = self.protocol.max_new_tokens
        what = f"published protocol, {self.protocol.paper}: greedy answers of at most {tokens} tokens, {users} users"
        return f"{what}\n{tabulate(lines, headers=headers, disable_numparse=True)}"


def check(config: Any, recommender: Recommender, candidates: CandidateSet | None) -> None:
    """Check ``scoring`` before anything is trained, and log which settings of the run differ from the paper's.

    Raises:
        ValueError: an unknown value, or a published protocol without candidates at test.
    """
    if config["scoring"] not in (LIKELIHOOD, PUBLISHED):
        raise ValueError(f"scoring: {config['scoring']!r} is unknown; choose {LIKELIHOOD} or {PUBLISHED}")
    protocol = recommender.published
    if config["scoring"] == LIKELIHOOD:
        return
    if protocol is None:
        logger.warning(f"scoring: published adds nothing, since {config['model']} ranks by scores and generates no titles")
        return
    if candidates is None:
        raise ValueError(
            "scoring: published generates from prompts with candidates, but the test of this run has none; "
            "give --eval_args=\"{'mode': 'candidates'}\", or scoring: likelihood"
        )
    if differences := protocol.differences(config):
        logger.warning(f"scoring: not as in {protocol.paper}: {', '.join(differences)}")
    if "{candidates}" not in template(config, config[protocol.prompt_key]):
        logger.warning("scoring: the prompt lists no candidates, so answers may name any title of the catalogue")


def evaluate(
    config: Any, recommender: Recommender, candidates: CandidateSet | None, ranks: Mapping[str, Ranks]
) -> PublishedResults | None:
    """Generate answers for each variant that has them, and read them by the paper's rule; None if there is no such variant.

    Args:
        candidates: the candidates of the test.
        ranks: of the same users by likelihood, by the names of the variants.
    """
    protocol = recommender.published
    rows = {name: variant.answers for name, variant in recommender.variants().items() if variant.answers is not None}
    if config["scoring"] != PUBLISHED or protocol is None or candidates is None or not rows:
        return None
    root, show = Path(config["checkpoint_dir"]) / "answers", config["show_progress"]
    found = {name: _outcomes(name, protocol, answers, candidates, root, show) for name, answers in rows.items()}
    return PublishedResults(protocol, found, ranks, protocol.differences(config))


def _outcomes(
    name: str, protocol: PublishedProtocol, answers: Answers, candidates: CandidateSet, root: Path, show: bool
) -> Outcomes:
    digest = fingerprint([answers.fingerprint, candidates.sha256, candidates.users.tolist()])
    cache = CachedAnswers(root / digest[:16])
    rows = [row for row, user in enumerate(candidates.users.tolist()) if user not in cache]
    with progress_bar(f"generating, {name}", len(rows), show=show) as bar:
        for start in range(0, len(rows), USERS_AT_ONCE):
            some = rows[start : start + USERS_AT_ONCE]
            users = candidates.users[some].tolist()
            began = time.monotonic()
            cache.add(users, answers.generate(users, candidates.items[some]), time.monotonic() - began)
            bar.advance(len(some))
    found = Outcomes(candidates.users.tolist(), [], [], [], cache.seconds, cache.folder)
    for user, target, listed in zip(found.users, candidates.targets.tolist(), candidates.items.tolist(), strict=True):
        # a retriever's candidates may lack the target, which then is missed
        places = protocol.places(cache[user], [answers.titles[item] for item in listed], answers.separator)
        place = places[listed.index(target)] if target in listed else 0
        found.ranks.append(place or math.inf)
        found.matched.append(sum(map(bool, places)))
        found.begins.append(1 in places)
    return found
