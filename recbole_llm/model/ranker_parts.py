"""Additional parts of rankers: scoring, evaluation users and training examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.scoring import NORMALIZATIONS, STRATEGIES, Scorer
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.model.parts import Parts, default_batch_tokens
from recbole_llm.settings import Settings

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.data.examples import ExampleSettings
    from recbole_llm.data.prompts import PromptBuilder
    from recbole_llm.llm.causal_lm import CausalLM


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """Settings of scoring; see ``properties/``, section *Scores*."""

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
        """Whether the score of a candidate is the logit of its label in the prompt."""
        return self.scorer == "label"


@dataclass(frozen=True)
class RankerParts(Parts):
    """The parts of a ranker."""

    scoring: ScoringSettings
    examples: ExampleSettings
    form: str  # of the data, for messages

    def eval_users(self, candidates: Mapping[str, CandidateSet], phase: str = "valid") -> EvalUsers:
        """The evaluation users of a phase, for early stopping and merging.

        Raises:
            ValueError: the run has no candidates in that phase.
        """
        if phase not in candidates:
            several = self.histories.held_out is not None
            remedy = (
                "--lora_valid=loss for a model of one adapter (TALLRec, LlamaRec), or --eval_args=\"{'split': {'LS': "
                "'valid_and_test'}, 'order': 'TO', 'mode': 'candidates'}\" and one .inter file"
                if several
                else "eval_args: {'mode': {'valid': 'candidates', 'test': 'full'}} for a full ranking of the test items"
            )
            raise ValueError(
                f"{self.form}: there are no candidates for {phase}, by which a ranker chooses weights, coefficients or a rule of "
                f"routing; give {remedy}"
            )
        metric, number = self.validation.metric, self.validation.users
        return EvalUsers(candidates[phase], self.histories, phase, seed=self.seed, metric=metric, number=number)

    def scorer(self, causal: CausalLM, strategy: str | None = None, normalize: str = "sum") -> Scorer:
        """Scores answers by the strategy of the settings, or another one, unless the LM cannot be read so."""
        return Scorer(
            strategy=causal.reading.scorer or strategy or self.scoring.scorer,
            normalize=normalize,
            pad_token_id=causal.pad_token_id,
            batch_tokens=self.scoring.batch_tokens or default_batch_tokens(causal),
            share=causal.reading.share,
        )

    def likelihood(self, causal: CausalLM, prompts: PromptBuilder | None = None, **parts: Any) -> TitleLikelihood:
        """The LM's scores of the target domain's candidates; ``parts`` are arguments of :class:`TitleLikelihood`."""
        prompts, normalize = prompts or self.builder(causal.tokenizer), self.scoring.normalize
        scorer = self.scorer(causal, normalize="sum" if normalize == "pmi" else normalize)
        found = TitleLikelihood(causal.model, prompts, scorer, several_titles=self.examples.top_k_target > 1, **parts)
        return replace(found, prior=found) if normalize == "pmi" and found.prior is None else found

    def shuffled_names(self) -> list[str]:
        """The catalogue's titles, permuted so that each item has the title of another, in histories and candidates.

        The interactions and the set of titles do not change. The metrics of this control therefore do not come from the LM's
        knowledge of the titles, such as their meaning or memorized parts of this dataset.
        """
        names = self.domain.items.names
        places = np.random.default_rng(self.seed).permutation(np.arange(1, len(names)))
        shuffled = list(names)
        for place, other in zip(places, np.roll(places, 1), strict=True):  # a single cycle: no item has its own title
            shuffled[place] = names[other]
        return shuffled

    def prompts_depend_on(self) -> dict[str, Any]:
        """JSON-serializable values that determine what the LM reads besides histories."""
        return {"backbone": self.backbone.fingerprint, "domain": self.domain.fingerprint, "prompts": self.prompts.as_dict()}

    def scores_depend_on(self) -> dict[str, Any]:
        """JSON-serializable values that determine likelihoods besides histories, weights and code."""
        own = {"scorer": self.scoring.scorer, "normalize": self.scoring.normalize}  # the size of batches changes no result
        scoring = {"scoring": own, "several_titles": self.examples.top_k_target > 1}
        return self.prompts_depend_on() | scoring
