"""The parts that all LLM models are put together from: a domain, its histories, a backbone, prompts, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.domains import Domain
from recbole_llm.data.examples import ExampleSettings
from recbole_llm.data.histories import Histories
from recbole_llm.data.prompts import PromptBuilder, PromptSettings, template
from recbole_llm.evaluation.metrics import check_valid_metric
from recbole_llm.llm.backbones import Backbone
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.likelihood import TitleLikelihood
from recbole_llm.llm.scoring import NORMALIZATIONS, STRATEGIES, Scorer
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.training.loop import LoopOptions

LABELS = (*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",)


@dataclass(frozen=True)
class Validation:
    """What stops a training and chooses its weights: ``valid_metric`` of ``valid_users`` users."""

    metric: str
    users: int

    @classmethod
    def of(cls, config: Any) -> Validation:
        """The settings of a configuration.

        Raises:
            ValueError: a metric that does not follow from a target's rank.
        """
        check_valid_metric(config["valid_metric"])
        return cls(config["valid_metric"].lower(), config["valid_users"])


@dataclass(frozen=True)
class ScoringSettings:
    """How the likelihoods of titles are computed: see ``properties/``, section *Scores*."""

    scorer: str
    normalize: str
    batch_tokens: int | None

    def __post_init__(self) -> None:
        known = {"scorer": STRATEGIES, "normalize": (*NORMALIZATIONS, "pmi")}
        for key, names in known.items():
            if getattr(self, key) not in names:
                raise ValueError(f"{key}: {getattr(self, key)!r} is unknown; choose {', '.join(names)}")

    @classmethod
    def of(cls, config: Any) -> ScoringSettings:
        """The settings of a configuration."""
        return cls(config["scorer"], config["normalize"], config["score_batch_tokens"])

    @property
    def reads_labels(self) -> bool:
        """Whether candidates are scored by the label that prompts list them with."""
        return self.scorer == "label"


@dataclass(frozen=True)
class Parts:
    """What rankers and encoders share."""

    domain: Domain
    histories: Histories
    backbone: Backbone
    prompts: PromptSettings
    validation: Validation
    options: LoopOptions
    seed: int

    @classmethod
    def shared(cls, config: Any, dataset: Any, prompts: PromptSettings) -> dict[str, Any]:
        """The parts that a configuration and a RecBole dataset give, by name."""
        domain = domains.of_dataset(config, dataset)
        return {
            "domain": domain,
            "histories": dataset.histories,
            "backbone": Backbone.of(config, [domain]),
            "prompts": prompts,
            "validation": Validation.of(config),
            "options": LoopOptions.of(config),
            "seed": config["seed"],
        }

    def builder(
        self, tokenizer: Any, domain: Domain | None = None, *, names: Sequence[str] | None = None,
        prompts: PromptSettings | None = None,
    ) -> PromptBuilder:  # fmt: skip
        """Builds the prompts of a domain, by default the target."""
        domain = domain or self.domain
        return PromptBuilder(
            tokenizer, names or domain.items.names, settings=prompts or self.prompts, noun=domain.noun, verb=domain.verb
        )


@dataclass(frozen=True)
class RankerParts(Parts):
    """What rankers have besides: how candidates are scored, and what training examples show."""

    scoring: ScoringSettings
    examples: ExampleSettings

    @classmethod
    def of(cls, config: Any, dataset: Any, **prompts: Any) -> RankerParts:
        """The parts that a configuration and a RecBole dataset give; ``prompts`` changes the settings of prompts."""
        scoring, examples = ScoringSettings.of(config), ExampleSettings.of(config)
        if scoring.reads_labels:
            prompts = {"template": template(config, "labelled"), "labels": LABELS[: examples.num_negatives + 1], **prompts}
        return cls(**cls.shared(config, dataset, PromptSettings.of(config, **prompts)), scoring=scoring, examples=examples)

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
            candidates[phase], self.histories, phase,
            seed=self.seed, metric=self.validation.metric, number=self.validation.users,
        )  # fmt: skip

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
        """What the scores of a likelihood depend on besides weights and code, as JSON-able values."""
        return {
            "backbone": self.backbone.fingerprint,
            "domain": self.domain.fingerprint,
            "histories": self.histories.fingerprint,
            "prompts": self.prompts.as_dict(),
            "scoring": asdict(self.scoring),
            "several_titles": self.examples.top_k_target > 1,
        }


def text_fields(config: Any) -> list[str]:
    """Columns of the .item file that are read beside the title: ``text_fields``, or all that the dataset names."""
    given = config["text_fields"]
    return [config[key] for key in ("year_field", "brand_field", "category_field") if config[key]] if given is None else given


def histories_of(model: Any, interaction: Any) -> list[list[int]]:
    """The histories of a RecBole interaction, as internal item ids from old to new."""
    items, lengths = interaction[model.ITEM_SEQ].tolist(), interaction[model.ITEM_SEQ_LEN].tolist()
    return [row[:length] for row, length in zip(items, lengths, strict=True)]
