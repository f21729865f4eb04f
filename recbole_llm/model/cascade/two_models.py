"""The two models of a cascade: their scores, what is known of a user from the cheap one alone, and the stage that chooses a rule.

Legend: B users, C candidates, I items, N users of a phase, W weights of the fusion.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel, padded
from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.full_ranking import RandomTies, finite, mask
from recbole_llm.evaluation.ranks import target_ranks, target_slots
from recbole_llm.evaluation.recommender import Recommender
from recbole_llm.llm import likelihood, lora
from recbole_llm.model.cascade import routing
from recbole_llm.model.cascade.routing import Choice, Features, RoutingSettings, Rule
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.model.parts import Parts, histories_of
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.costs import Cost
from recbole_llm.store.stages import Stage, StageCache, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.model.ranker import LLMRanker

FILE = "routing.json"
_USERS_AT_ONCE = 512


class CheapModel(CollaborativeModel):
    """The model that ``cheap_model`` names."""

    KEYS = "cheap_model", "cheap_config", "cheap_checkpoint"


@dataclass
class Spent:
    """What scoring has cost: seconds of the CPU (all its threads) and of the clock, and for how many users."""

    users: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    def __call__(self, score: Callable[[], Tensor]) -> Tensor:
        """The scores [B, C] of a function, whose cost is added."""
        cpu, clock = time.process_time(), time.monotonic()
        scores = score()
        self.cpu_seconds += time.process_time() - cpu
        self.seconds += time.monotonic() - clock
        self.users += len(scores)
        return scores


class TwoModels:
    """A collaborative model and an LLM ranker on the same data.

    Args:
        metric: ``valid_metric``, in which gains are measured.
        number: of validation users; None: all.
        candidates: the candidate sets of the run by phase.
    """

    def __init__(self, llm: LLMRanker, cf: CheapModel, settings: RoutingSettings, *, metric: str, number: int | None):
        self.llm, self.cf, self.settings, self.metric, self.number = llm, cf, settings, metric, number
        self.histories, self.device = llm.parts.histories, llm.device
        self.ties = RandomTies(self.histories.user_ids, self.histories.item_ids)
        self.counts = torch.from_numpy(self.histories.train_counts)  # [I]
        self.candidates: Mapping[str, CandidateSet] = {}
        self._shares: dict[Rule, float] = {}
        self._asked: dict[tuple[int, bytes, bytes], Tensor] = {}  # the LLM's scores by user, history, candidates

    def load(self, results: Any) -> None:
        """Read the results of the stages of both models."""
        self._asked.clear()
        self._shares.clear()
        self.cf.load(results.folder(self.cf.stage))
        self.llm.load(results)

    # -- users ---------------------------------------------------------------------------------------------------------

    def drawn(self, phase: str, users: Sequence[int] = ()) -> Iterator[tuple[Interaction, Tensor | None, Tensor]]:
        """Interactions, candidates [B, C] and targets [B] of users of a phase; no candidates in a full ranking.

        Args:
            users: those of a phase without candidates.
        """
        targets, listed = torch.tensor([self.histories.target(user, phase) for user in users]), None
        if phase in self.candidates:
            number = (self.number if phase == "valid" else None) or len(self.candidates[phase].users)
            users, _, listed, targets = self._eval_users(phase).draw(number)
        for start in range(0, len(users), _USERS_AT_ONCE):
            part = slice(start, start + _USERS_AT_ONCE)
            shown = None if self.llm.reranks or listed is None else listed[part].to(self.device)
            yield self._interaction(users[part], phase), shown, targets[part].to(self.device)

    def batches(self, phase: str, users: Sequence[int] = ()) -> Iterator[tuple[Interaction, Tensor, Tensor]]:
        """As :meth:`drawn`; in a full ranking, the candidates are what the LLM re-ranks, the cheap model's best items."""
        for interaction, candidates, targets in self.drawn(phase, users):
            yield interaction, self._top(interaction, phase) if candidates is None else candidates, targets

    def _eval_users(self, phase: str) -> EvalUsers:
        return EvalUsers(self.candidates[phase], self.histories, phase, seed=self.llm.parts.seed, metric=self.metric, number=1)

    def _interaction(self, users: Sequence[int], phase: str) -> Interaction:
        items = padded([self.histories.before(user, phase).tolist() for user in users], self.llm.max_seq_length)  # [B, L]
        lengths = items.ne(0).sum(1)  # [B]
        fields = {self.llm.USER_ID: torch.tensor(users), self.llm.ITEM_SEQ: items, self.llm.ITEM_SEQ_LEN: lengths}
        return Interaction(fields).to(self.device)

    def _top(self, interaction: Interaction, phase: str) -> Tensor:
        """The best items [B, C] of the cheap model outside the history, if that is left out of a full ranking."""
        scores = mask(self.cf.scores(interaction), None)  # [B, I]
        if self.llm.parts.validation.masked:
            for row, user in zip(scores, interaction[self.llm.USER_ID].tolist(), strict=True):
                row[torch.from_numpy(self.histories.excluded(user, phase)).to(row.device)] = -torch.inf
        users, number = interaction[self.llm.USER_ID], min(self.llm.retriever_top, scores.size(1))
        ranked = self.ties(scores, users, number)  # [B, I]
        best, items = ranked.topk(number, dim=1)  # [B, C]
        items = items.where(best > -torch.inf, items[:, :1])
        return items.gather(1, self.ties.order(items, users))

    # -- scores --------------------------------------------------------------------------------------------------------

    def cheap_scores(self, interaction: Any, candidates: Tensor) -> Tensor:
        """The collaborative model's scores [B, C] of candidates [B, C], finite, as in an evaluation."""
        users = interaction[self.llm.USER_ID].tolist()
        scores = self.cf.candidate_scores(users, histories_of(self.llm, interaction), candidates)
        return finite(scores.float()).to(candidates.device)

    def llm_scores(self, interaction: Any, candidates: Tensor) -> Tensor:
        """The LLM's scores [B, C]. It is asked once for the same history and candidates, so rows share its scores."""
        users, histories = interaction[self.llm.USER_ID].tolist(), interaction[self.llm.ITEM_SEQ]  # [B], [B, L]
        keys = [*zip(users, *([row.tobytes() for row in part.cpu().numpy()] for part in (histories, candidates)), strict=True)]
        new = [place for place, key in enumerate(keys) if key not in self._asked]
        if new:
            scores = self.llm.score_candidates(interaction[new], candidates[new]).float().cpu()
            self._asked.update(zip([keys[place] for place in new], scores, strict=True))
        return torch.stack([self._asked[key] for key in keys]).to(candidates.device)

    def features(self, interaction: Any, candidates: Tensor, cheap: Tensor) -> Features:
        """What is known of B users before the LLM is asked; ``cheap`` are the collaborative model's scores [B, C]."""
        return routing.features(histories_of(self.llm, interaction), candidates, cheap, self.counts)

    def routed_scores(
        self, routes: Callable[[Features, Sequence[int]], np.ndarray], weight: float, interaction: Any, candidates: Tensor
    ) -> Tensor:
        """Scores [B, C]: the LLM's, or fused with its weight, for users whom ``routes`` chooses, otherwise the cheap ones.

        Args:
            routes: (features, internal ids of B users) -> bool [B].
        """
        scores = self.cheap_scores(interaction, candidates)
        chosen = routes(self.features(interaction, candidates, scores), interaction[self.llm.USER_ID].tolist())
        rows = np.flatnonzero(chosen).tolist()
        if rows:
            llm = self.llm_scores(interaction[rows], candidates[rows])
            scores[rows] = routing.fused(self.settings.fusion, scores[rows], llm, weight)
        return scores

    def share(self, rule: Rule) -> float:
        """Share of all test users whom a rule routes, which may differ from that of the validation users."""
        if rule not in self._shares:
            users = self.histories.evaluated("test").tolist()
            asked = [(interaction, listed) for interaction, listed, _ in self.batches("test", users)]
            routed = [rule(self.features(*batch, self.cheap_scores(*batch))) for batch in asked]
            self._shares[rule] = float(np.concatenate(routed).mean())
        return self._shares[rule]

    # -- the rule ------------------------------------------------------------------------------------------------------

    def stage(self, inputs: Sequence[Stage]) -> Stage:
        """The stage that scores validation users by both models, the results of ``inputs``, and writes the rule."""
        kinds = [*type(self.llm).__mro__, *type(self.llm.parts).__mro__]
        ranker = {kind.__module__ for kind in kinds if issubclass(kind, Recommender | Parts)}  # the user's own included
        depends = {
            "settings": self.settings.as_dict(),
            "users": [self._eval_users("valid").fingerprint, self.number],
            "reranked": self.llm.retriever_top if self.llm.reranks else 0,
            "masked": self.llm.parts.validation.masked,
            "longest": self.llm.max_seq_length,
            "scores": self.llm.parts.scores_depend_on(),
            "ranker": code_fingerprint(alone=ranker),
        }
        code = likelihood.__name__, lora.__name__
        return Stage("routing", depends, self._choose, inputs=(*inputs, self.cf.stage), code=code, cost=self._cost)

    @torch.no_grad()
    def _choose(self, work: Work) -> None:
        self.load(work)
        kind, weights = self.settings.fusion, self.settings.tried
        spent = {"cheap": Spent(), "llm": Spent()}
        gains, known = [], []
        for interaction, candidates, targets in self.batches("valid"):
            cheap = spent["cheap"](partial(self.cheap_scores, interaction, candidates))  # [B, C]
            llm = spent["llm"](partial(self.llm_scores, interaction, candidates))  # [B, C]
            before = self._values(cheap, candidates, targets)
            after = [self._values(routing.fused(kind, cheap, llm, weight), candidates, targets) for weight in weights]
            gains.append(np.stack(after) - before)  # [W, B]
            known.append(self.features(interaction, candidates, cheap))
        choice = routing.choose(np.concatenate(gains, 1), routing.joined(known), self.settings)
        found = {"choice": choice.as_dict(), "spent": {name: asdict(one) for name, one in spent.items()}}
        (work.out / FILE).write_text(json.dumps(found, indent=1))

    def _values(self, scores: Tensor, candidates: Tensor, targets: Tensor) -> np.ndarray:
        """The metric [B] of targets [B]; 0 where a target is not among the candidates [B, C]."""
        ranks, _ = target_ranks(scores, *target_slots(candidates, targets))
        return metrics.by_user(ranks.tolist(), [self.metric])[self.metric]

    def _cost(self) -> Cost:
        drawn = [(interaction, candidates) for interaction, candidates, _ in self.drawn("valid")]
        return self.llm.cost(drawn, StageCache(Path()), all_rows=False)

    @staticmethod
    def read(folder: Path) -> tuple[Choice, dict[str, Spent]]:
        """The rule, and what scoring the validation users has cost by each model, ``cheap`` and ``llm``."""
        found = json.loads((folder / FILE).read_text())
        return Choice.read(found["choice"]), {name: Spent(**values) for name, values in found["spent"].items()}
