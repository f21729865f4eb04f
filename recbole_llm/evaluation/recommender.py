"""The interface of all models, ours and RecBole's, with defaults."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole.utils import InputType
from torch import Tensor

from recbole_llm.evaluation.candidate_scores import CandidateScores
from recbole_llm.evaluation.published import PublishedProtocol
from recbole_llm.store import files
from recbole_llm.store.costs import Cost
from recbole_llm.store.stages import Folders, Stage, StageCache

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.evaluation.record import Row


@dataclass(frozen=True)
class Answers:
    """Generated answers, for the published protocol of a model (``scoring: published``).

    Args:
        generate: (internal ids of B test users, candidates [B, C]) -> B texts.
        titles: of each item, as the LM reads and generates it.
        separator: between two titles of an answer.
        fingerprint: of what the answers depend on besides the candidates.
    """

    generate: Callable[[Sequence[int], Tensor], list[str]]
    titles: Sequence[str]
    separator: str
    fingerprint: str


@dataclass(frozen=True)
class Variant:
    """A way to score candidates: one row of the results.

    Args:
        score: (RecBole interaction of B users, candidates [B, C]) -> scores [B, C].
        score_catalogue: interaction -> scores [B, I] of the whole catalogue, history included.
        fingerprint: of what the scores depend on besides the candidates; None disables caching.
        answers: generated answers of the same users, if the model has a published protocol that evaluates such answers.
        partial: an item whose score is minus infinity is not ranked; such a target is missed.
        reranked: number of the best items of ``score_catalogue``, history left out, that ``score`` ranks anew; 0 for none.
    """

    score: Callable[[Any, Tensor], Tensor]
    score_catalogue: Callable[[Any], Tensor]
    fingerprint: str | None = None
    answers: Answers | None = None
    partial: bool = False
    reranked: int = 0

    def scores_folder(self, checkpoint_dir: str | Path, candidates_sha256: str, users: Tensor) -> Path | None:
        """The folder of its cached scores of candidates, of users [N] in this order; None if they are not cached."""
        if self.fingerprint is None:
            return None
        name = files.fingerprint([self.fingerprint, candidates_sha256, users.tolist()])
        return Path(checkpoint_dir) / "scores" / name[:16]


@dataclass(frozen=True)
class Facts:
    """What a run record says about a trained model.

    Attributes:
        backbone, backbone_fingerprint: the name in tables and the fingerprint of the language model or text encoder.
        merge: how adapters were merged.
        backbone_identity: ``id@commit`` of a model from the hub, otherwise a hash of its folder or of its stage.
        given_adapters: folder and SHA-256 of each adapter that was given and not trained, by its name.
        memorisation: what the LM knows of the catalogue before any training, if that was measured.
        builtin: the parts that are not pretrained: ``llm``, ``text_encoder``.
        imported: file, SHA-256, origin and gaps of predictions that were made elsewhere.
    """

    backbone: str | None = None
    backbone_fingerprint: str | None = None
    merge: Mapping[str, Any] | None = None
    backbone_identity: str | None = None
    given_adapters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    builtin: tuple[str, ...] = ()
    memorisation: Mapping[str, Any] | None = None
    imported: Mapping[str, Any] | None = None


class Recommender:
    """Base class of our models and, through :func:`recommender_of`, the interface of every model.

    The class attributes declare what a model needs and supports; docs and contract tests read them.

    Attributes:
        trained_in_stages: the stages of :meth:`plan` are the whole training; otherwise RecBole's trainer runs after them.
        has_validation: there are scores of the validation users, too.
        loss_is_mean: RecBole's trainer trains the model, and ``calculate_loss`` is a mean over the pairs of a batch, so that
            several processes can share one.
        shortcut: an untrained rule, with which leaderboards compare every other row.
        published: the paper's evaluation of generated answers; None for a model that is published with scores.
        contains: the key that names a model which is a part of this one, so that its settings are this model's, too.
    """

    uses_item_text = False
    uses_cf_model = False
    scores_unseen_items = False
    scores_full_catalogue = True
    supports_init_from = False
    trained_in_stages = False
    has_validation = True
    loss_is_mean = False
    shortcut = False
    published: PublishedProtocol | None = None
    contains: str | None = None

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        """The stages of the model, not yet run; the first one makes the model itself.

        ``candidates`` are the candidate sets of the run by phase.
        """
        return ()

    def check(self) -> None:
        """Raise a ValueError, before the first stage runs, for what would fail or be wrong after the training."""

    def load(self, cache: StageCache) -> None:
        """Read the results of the stages after they have run."""

    def variants(self) -> dict[str, Variant]:
        """What is evaluated, by name: the model itself, then the rows that are always reported with it."""
        raise NotImplementedError

    @property
    def backbone(self) -> Any:
        """The causal LM, a :class:`~recbole_llm.llm.backbones.Backbone`; None without one."""
        return None

    def cost(self, batches: Sequence[tuple[Any, Tensor | None]], results: Folders, *, all_rows: bool) -> Cost:
        """What an evaluation costs, before training; without figures if that is not estimated.

        Args:
            batches: interactions of B users with their candidates [B, C]; None in a full ranking.
            results: the folders of the stages, which need not exist.
            all_rows: all variants, not only the model itself.
        """
        return Cost(note="not estimated")

    def answers_cost(self, candidates: CandidateSet) -> Cost | None:
        """What :attr:`published` costs on these candidates; None without it, or if no LM generates the answers."""
        return None

    def trial_model(self) -> tuple[Any, float]:
        """A copy of the model as RecBole's trainer gets it, with any weights, and the seconds that its :meth:`load` takes."""
        return copy.deepcopy(self), 0.0

    def facts(self) -> Facts:
        """What the run record says about the model."""
        return Facts()

    def findings(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """What follows from the ranks of all rows, by the name of an entry of the run record."""
        return {}

    def report(self, folder: Path) -> list[str]:
        """Write further results to ``folder``, that of the record; returns lines for the log."""
        return []


class StagedRecommender(Recommender):
    """Base of models that are trained by their stages alone, or not at all, and score any candidates."""

    input_type = InputType.POINTWISE
    trained_in_stages = True

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] of candidates [B, C], those of the first variant."""
        return next(iter(self.variants().values())).score(interaction, candidates)

    def predict(self: Any, interaction: Any) -> Tensor:
        """Scores [B] of the items of a RecBole interaction."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None]).squeeze(1)


@dataclass
class ClassicalRecommender(Recommender):
    """A model of RecBole."""

    model: Any
    item_field: str
    name: str = ""

    def trial_model(self) -> tuple[Any, float]:
        return copy.deepcopy(self.model), 0.0

    def variants(self) -> dict[str, Variant]:
        """The model with the weights of now: each evaluation during training asks anew."""
        return {self.name: Variant(CandidateScores(self.model, self.item_field), self.model.full_sort_predict)}


def recommender_of(model: Any, config: Any) -> Recommender:
    """The model as a :class:`Recommender`."""
    return model if isinstance(model, Recommender) else ClassicalRecommender(model, config["ITEM_ID_FIELD"], config["model"])
