"""Training of a ranker's adapters: each stage trains one LoRA of the pre-trained LM on a mixture of domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_llm.costs.lora import lora_cost
from recbole_llm.costs.parts import blank
from recbole_llm.data import domains
from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.data.prompts import Example
from recbole_llm.llm import micro_batches
from recbole_llm.llm.finetune import LoRATrainingConfig, finetune
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.micro_batches import Encode
from recbole_llm.model.parts import default_batch_tokens
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.domains import Domain, TrainingExample
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers
    from recbole_llm.model.ranker_parts import RankerParts
    from recbole_llm.store.costs import Cost


@dataclass(frozen=True)
class AdapterTraining:
    """Trains adapters of one LM for one target domain."""

    parts: RankerParts
    config: LoRATrainingConfig

    def stage(
        self,
        name: str,
        sources: Sequence[Domain],
        *,
        valid: EvalUsers | None = None,
        samples: int | None = None,
        of_each: bool = False,
    ) -> Stage:
        """A stage that trains one adapter on a mixture of domains; its folder is an ordinary PEFT folder.

        Args:
            valid: the best weights are those that best rank the candidates of these users; None: those of lowest loss on
                examples held out from the mixture.
            samples: number of examples; None: ``train_samples``.
            of_each: draw ``samples`` examples from each domain.

        Raises:
            ValueError: the prompts do not fit ``lora_train_mode: sequence``.
        """
        parts, samples = self.parts, samples or self.config.samples
        prompts = parts.prompts
        if parts.examples.whole_histories and (prompts.shows_candidates or not prompts.is_continuation):
            raise ValueError(
                "lora_train_mode: sequence needs a prompt that ends in {history} and lists no candidates, unlike "
                f"{prompts.template!r}; give --lora_train_mode=prefix"
            )
        if tokenizer := parts.backbone.tokenizer:
            parts.builder(tokenizer)  # raises before training if the prompts do not suit the tokenizer
        depends = {
            "backbone": parts.backbone.fingerprint,
            "domains": [domain.fingerprint for domain in sources],
            "prompts": prompts.as_dict(),
            "training": self.config.as_dict() | {"samples": [samples, "of each"] if of_each else samples},
            "examples": parts.examples.as_dict() if prompts.shows_candidates else None,
            "valid": valid and [valid.fingerprint, parts.scoring.normalize],
        }

        def examples() -> list[TrainingExample]:
            return domains.training_examples(
                sources,
                window=prompts.max_history + 1 if parts.examples.whole_histories else None,
                samples=samples,
                seed=parts.seed,
                of_each=of_each,
            )

        def build(work: Work) -> None:
            self._train(name, sources, examples(), valid, work)

        def cost() -> Cost:
            causal = blank(parts.backbone.outline)
            given = self._given(causal, sources, examples(), valid)
            return lora_cost(parts.backbone.outline, causal, *given, options=parts.options)

        runs = "parts" if valid is None else "ranker_parts"  # without evaluation users, nothing is scored
        code = (f"recbole_llm.model.{runs}",)
        return Stage(name, depends, build, inputs=parts.backbone.stages, code=code, cost=cost)

    def _train(
        self, name: str, sources: Sequence[Domain], examples: list[TrainingExample], valid: EvalUsers | None, work: Work
    ) -> None:
        causal = self.parts.backbone.load(work)
        given = self._given(causal, sources, examples, valid)
        finetune(causal.model, name, *given, work=work, options=self.parts.options)

    def _given(
        self, causal: CausalLM, sources: Sequence[Domain], examples: list[TrainingExample], valid: EvalUsers | None
    ) -> tuple[list[TrainingExample], Encode, LoRATrainingConfig, int, Callable[[Any], float]]:
        """The arguments of :func:`finetune`: examples, their encoding, the settings, the padding token, a validation."""
        parts = self.parts
        pad, longest = int(causal.tokenizer.pad_token_id), parts.prompts.max_history
        encoders = [ExampleEncoder(domain, parts.builder(causal.tokenizer, domain), parts.examples) for domain in sources]

        def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
            history = sources[example.domain].histories[example.user]
            shown = history[max(0, example.end - longest) : example.end + 1].tolist()
            return encoders[example.domain](shown, rng, known=history)

        held_out: list[TrainingExample] = []
        if valid is None:  # the paper's own split: 2 % of the mixture, at most 500 examples
            size = min(500, max(1, len(examples) // 50))
            examples, held_out = examples[size:] or examples, examples[:size]
        likelihood = None if valid is None else parts.likelihood(causal)

        def score(model: Any) -> float:
            if valid is not None and likelihood is not None:
                return valid.score(likelihood.with_lm(model))
            encoded = [encode(example, np.random.default_rng([parts.seed, i])) for i, example in enumerate(held_out)]
            batches = micro_batches.parts(encoded, default_batch_tokens(causal))
            return -sum(share * float(lm_loss(model, batch, pad)) for batch, share in batches)

        return examples, encode, self.config, pad, score
