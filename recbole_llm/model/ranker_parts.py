"""What rankers are put together from besides: how candidates are scored, on which users, and what training examples show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.scoring import NORMALIZATIONS, STRATEGIES, Scorer
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.model.parts import Parts
from recbole_llm.settings import Settings

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.data.examples import ExampleSettings
    from recbole_llm.data.prompts import PromptBuilder
    from recbole_llm.llm.causal_lm import CausalLM


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """How the likelihoods of titles are computed: see ``properties/``, section *Scores*."""

    KEYS = {"batch_tokens": "score_batch_tokens"}

    scorer: str
    normalize: str
    batch_tokens: int | None

    def __post_init__(self) -> None:
        for key, names in {"scorer": STRATEGIES, "normalize": (*NORMALIZATIONS, "pmi")}.items():
            if getattr(self, key) not in names:
                raise ValueError(f"{key}: {getattr(self, key)!r} is unknown; choose {', '.join(names)}")

    @property
    def reads_labels(self) -> bool:
        """Whether candidates are scored by the label that prompts list them with."""
        return self.scorer == "label"


@dataclass(frozen=True)
class RankerParts(Parts):
    """What rankers have besides: how candidates are scored, and what training examples show."""

    scoring: ScoringSettings
    examples: ExampleSettings

    def eval_users(self, candidates: Mapping[str, CandidateSet], phase: str = "valid") -> EvalUsers:
        """The users of a phase, for early stopping and merging.

        Raises:
            ValueError: the run has no candidates at that phase.
        """
        if phase not in candidates:
            raise ValueError(
                f"eval_args: a ranker is stopped on candidates, and there are none at {phase}; for a full ranking of the test "
                "items give eval_args: {'mode': {'valid': 'candidates', 'test': 'full'}}"
            )
        return EvalUsers(
            candidates[phase],
            self.histories,
            phase,
            seed=self.seed,
            metric=self.validation.metric,
            number=self.validation.users,
        )

    def likelihood(self, causal: CausalLM, prompts: PromptBuilder | None = None, **parts: Any) -> TitleLikelihood:
        """How the LM ranks candidates of the target; ``parts`` are those of :class:`TitleLikelihood`."""
        tokenizer, normalize = causal.tokenizer, self.scoring.normalize
        on_cpu = causal.model.get_input_embeddings().weight.device.type == "cpu"
        scorer = Scorer(
            strategy=self.scoring.scorer,
            normalize="sum" if normalize == "pmi" else normalize,
            pad_token_id=int(tokenizer.pad_token_id),
            batch_tokens=self.scoring.batch_tokens or (2048 if on_cpu else 16384),
        )
        found = TitleLikelihood(
            causal.model, prompts or self.builder(tokenizer), scorer, several_titles=self.examples.top_k_target > 1, **parts
        )
        return replace(found, prior=found) if normalize == "pmi" and found.prior is None else found

    def scores_depend_on(self) -> dict[str, Any]:
        """What the scores of a likelihood depend on besides histories, weights and code, as JSON-able values."""
        return {
            "backbone": self.backbone.fingerprint,
            "domain": self.domain.fingerprint,
            "prompts": self.prompts.as_dict(),
            "scoring": asdict(self.scoring),
            "several_titles": self.examples.top_k_target > 1,
        }
