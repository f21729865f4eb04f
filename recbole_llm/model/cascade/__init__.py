"""Cascade: an LLM ranks only the users whom it is likely to help; a collaborative model answers the others.

Cascades ask an expensive model only where a cheap one is not good enough (FrugalGPT, arXiv 2305.05176). In recommendation,
CoReLLa (arXiv 2403.16378) asks the LLM where the entropy of a conventional model is high, Kaur and Shah (arXiv 2405.00824) for
users with few interactions. Here, the feature and its threshold are chosen by the gains of validation users, and routing nobody
is a possible result.

The model contains two others, ``cheap_model`` of RecBole and ``llm_ranker`` of this package. Their stages are its own, so what
another run has trained is reused. A last stage scores validation users by both (``two_models.py``) and chooses
the rule (``routing.py``).

Legend: B users, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_llm import registry
from recbole_llm.data.scenarios import draw_lots
from recbole_llm.evaluation import metrics
from recbole_llm.evaluation.full_ranking import ranked_catalogue
from recbole_llm.evaluation.recommender import Facts, StagedRecommender, Variant
from recbole_llm.evaluation.routing_curve import RoutingCurve
from recbole_llm.model.cascade.routing import Choice, Features, RoutingSettings, joined
from recbole_llm.model.cascade.two_models import CheapModel, Spent, TwoModels
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import fingerprint
from recbole_llm.store.processes import current
from recbole_llm.store.stages import Folders, Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.evaluation.record import Row

RANDOM = "random routing"


class Cascade(StagedRecommender, SequentialRecommender):
    """A collaborative model for all users, and an LLM ranker for those whom a rule routes to it.

    Attributes:
        llm, cf: the two models.
        choice: the rule, once it is loaded.
        spent: what scoring the validation users has cost by each model, once it is loaded.
    """

    uses_item_text = True
    uses_cf_model = True
    scores_full_catalogue = False
    contains = "llm_ranker"

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        settings, kind = RoutingSettings.of(config), registry.get_model(config["llm_ranker"])
        if not issubclass(kind, LLMRanker):
            raise ValueError(f"llm_ranker: {kind.__name__} does not rank candidates by an LLM; give LoRACocktail or TALLRec")
        self.llm: LLMRanker = kind(config, dataset)
        self.cf = CheapModel.of(config, dataset.histories, self.max_seq_length)
        if self.llm.reranks:
            self.llm.retriever = self.cf  # both rank the same items
        number, metric = config["routing_users"], config["valid_metric"].lower()
        self.models = TwoModels(self.llm, self.cf, settings, metric=metric, number=number)
        self.lots = draw_lots(dataset.histories.user_ids, config["seed"], RANDOM)  # [U], of all users
        self.choice: Choice | None = None
        self.spent: Mapping[str, Spent] = {}
        self.curve: RoutingCurve | None = None

    def __str__(self) -> str:
        return f"Cascade, {self.cf.name} for all users and for some of them {self.llm}"

    @property
    def parts(self) -> RankerParts:
        """Those of the LLM ranker."""
        return self.llm.parts

    @property
    def backbone(self) -> Any:
        return self.llm.backbone

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        self.parts.eval_users(candidates)  # raises if there are no validation candidates
        self.models.candidates = candidates
        self.routing = self.models.stage(self.llm.plan(candidates))
        return [self.routing]

    def check(self) -> None:
        self.llm.check()

    def load(self, cache: StageCache) -> None:
        self.models.load(cache)
        self.choice, self.spent = self.models.read(cache.folder(self.routing))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def variants(self) -> dict[str, Variant]:
        """The cascade, the cheap model, the LLM (and the fusion) for all users, and as many users routed at random."""
        models, choice, llm = self.models, self.choice, next(iter(self.llm.variants().values()))
        if choice is None:
            raise ValueError("Cascade: the rule is not chosen yet; run the stages and load their results")
        rule = choice.rule

        def row(name: str, routes: Callable[[Features, Sequence[int]], np.ndarray]) -> Variant:
            identity = fingerprint([name, code_fingerprint(alone=[__name__]), self.routing.fingerprint, llm.fingerprint])
            score = partial(models.routed_scores, routes, rule.weight)
            return Variant(score, self.cf.scores, identity, reranked=llm.reranked)

        rows = {
            "Cascade": row("Cascade", lambda known, _: rule(known)),
            self.cf.name: Variant(models.cheap_scores, self.cf.scores),
            self.llm_row: replace(llm, score=models.llm_scores, answers=None),
        }
        if self.routed_row != self.llm_row:
            rows[self.routed_row] = row(self.routed_row, lambda _, users: np.ones(len(users), dtype=bool))
        return rows | {RANDOM: row(RANDOM, lambda _, users: self.lots[users] < models.share(rule))}

    @property
    def llm_row(self) -> str:
        """The name of the row in which the LLM ranks for all users."""
        return type(self.llm).__name__

    @property
    def routed_row(self) -> str:
        """The name of the row in which all users are routed."""
        return self.llm_row if self.models.settings.fusion == "llm" else f"{self.cf.name} + {self.llm_row}"

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the catalogue, history included: the cheap model's, with its top items in the cascade's order."""
        return ranked_catalogue(self.variants()["Cascade"], interaction, self.USER_ID, self.parts.histories)

    # -- cost and findings ---------------------------------------------------------------------------------------------

    def cost(self, batches: Sequence[tuple[Any, Tensor | None]], results: Folders, *, all_rows: bool) -> Cost:
        found = self.llm.cost(batches, results, all_rows=False)
        if all_rows:  # the rows share the LLM's scores, in batches of other users
            return replace(found, exact=False)
        return replace(found, at_most=True, note="at most: the rule may route fewer users to the LLM")

    def facts(self) -> Facts:
        return self.llm.facts()

    @property
    def cpu_seconds(self) -> tuple[float, float] | None:
        """CPU seconds for a user, of the cheap model and of the LLM; None on an accelerator or in several processes."""
        devices = torch.device(self.device).type, torch.device(self.backbone.outline.device).type
        cheap, llm = (self.spent[name].cpu_seconds / max(self.spent[name].users, 1) for name in ("cheap", "llm"))
        return (cheap, llm) if devices == ("cpu", "cpu") and current().size == 1 else None

    @torch.no_grad()
    def findings(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """``routing``: the rule, the share of the test users whom it routes, the speed of both models, and the curve."""
        ranks, choice = {row.name: row.ranks for row in rows}, self.choice
        users = sorted(ranks[self.cf.name].users)
        if not users or choice is None:
            return {}
        first = next(iter(rows[0].metrics))
        metric = first if metrics.by_user([1], [first]) else self.models.metric  # one that ranks determine
        cheap, routed = (
            metrics.by_user(ranks[name].ranks, [metric])[metric][np.argsort(ranks[name].users)]
            for name in (self.cf.name, self.routed_row)
        )
        known, order = [], list[int]()
        for interaction, candidates, _ in self.models.batches("test", users):
            scores = self.models.cheap_scores(interaction, candidates)
            known.append(self.models.features(interaction, candidates, scores))
            order += interaction[self.USER_ID].tolist()
        features = {name: values[np.argsort(order)] for name, values in joined(known).items()}
        rule, steps = choice.rule, self.models.settings.steps
        self.curve = RoutingCurve.of(metric, cheap, routed, rule.priority(features), steps=steps, cpu_seconds=self.cpu_seconds)
        speed = {name: one.users / one.seconds for name, one in self.spent.items() if one.seconds}
        shares = {"share": float(rule(features).mean()), "users_per_second": speed}
        return {"routing": {"choice": choice.as_dict(), **shares, "curve": self.curve.as_dict()}}

    def report(self, folder: Path) -> list[str]:
        lines, choice = self.llm.report(folder), self.choice
        if self.curve is None or choice is None:
            return lines
        lines.append(f"routing: {choice.rule}; {self.models.metric} of {choice.users} validation users: {choice.words}")
        return lines + self.curve.write(folder, f"{self.cf.name}, and {self.llm_row} for routed users")
