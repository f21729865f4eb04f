"""Training of a ranker's adapters: each stage trains one LoRA of the pre-trained LM on a mixture of domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from recbole_llm.costs.lora import lora_cost
from recbole_llm.costs.parts import blank
from recbole_llm.data import domains
from recbole_llm.data.examples import ExampleEncoder, check_negatives
from recbole_llm.data.prompts import Example
from recbole_llm.llm import micro_batches
from recbole_llm.llm.finetune import LoRATrainingConfig, finetune
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.micro_batches import Encode
from recbole_llm.model.parts import default_batch_tokens
from recbole_llm.store.processes import current
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.data.domains import Domain, TrainingExample
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers
    from recbole_llm.model.ranker_parts import RankerParts
    from recbole_llm.store.costs import Cost


@dataclass(frozen=True)
class AdapterSpec:
    """What one adapter is trained on.

    Args:
        name: of the stage.
        sources: the mixture of domains.
        valid: the best weights are those that best rank the candidates of these users; None: those of lowest loss on
            examples held out from the mixture.
        training: other settings than those of the model's adapters.
        of_each: draw ``samples`` examples from each domain.
        most: maximum number of examples of each domain.
    """

    name: str
    sources: Sequence[Domain]
    valid: EvalUsers | None = None
    training: LoRATrainingConfig | None = None
    of_each: bool = False
    most: int | None = None


@dataclass(frozen=True)
class AdapterTraining:
    """Trains adapters of one LM for one target domain.

    Attributes:
        own_code: modules of a subclass, which stages depend on.
    """

    own_code: ClassVar[tuple[str, ...]] = ()

    parts: RankerParts
    config: LoRATrainingConfig

    def valid(self, candidates: Mapping[str, CandidateSet]) -> EvalUsers | None:
        """The users whose ranking chooses the weights of an adapter of the target; None with ``lora_valid: loss``."""
        return self.parts.eval_users(candidates) if self.config.valid == "ranking" else None

    def stage(self, spec: AdapterSpec) -> Stage:
        """A stage that trains one adapter; its folder is an ordinary PEFT folder.

        Raises:
            ValueError: the prompts do not fit ``lora_train_mode: sequence``.
        """
        parts, training = self.parts, self._training(spec)
        prompts = parts.prompts
        if parts.examples.whole_histories and (prompts.shows_candidates or not prompts.is_continuation):
            raise ValueError(
                "lora_train_mode: sequence needs a prompt that ends in {history} and lists no candidates, unlike "
                f"{prompts.template!r}; give --lora_train_mode=prefix"
            )
        if "{user}" in prompts.template:
            raise ValueError(
                f"prompt: the slot {{user}} is for the soft token of a user, which only ALLMRec has: {prompts.template!r}; "
                "choose another key of `prompts`"
            )
        for source in spec.sources if prompts.shows_candidates and not parts.examples.whole_histories else ():
            check_negatives(source, parts.examples)
        if tokenizer := parts.backbone.tokenizer:
            parts.builder(tokenizer)  # raises before training if the prompts do not suit the tokenizer
        # how the weights are chosen follows from spec.valid; without held-out examples their share has no meaning
        chosen = {"valid": None, "held_out": None if spec.valid else training.held_out}
        depends = {
            "backbone": parts.backbone.fingerprint,
            "domains": [domain.fingerprint for domain in spec.sources],
            "prompts": prompts.as_dict(),
            "training": training.as_dict() | chosen | {"of_each": spec.of_each, "most": spec.most},
            "examples": self.examples_depend_on(),
            "valid": spec.valid and [spec.valid.fingerprint, parts.scoring.normalize],
        }
        runs = "parts" if spec.valid is None else "ranker_parts"  # without evaluation users, nothing is scored
        code = (f"recbole_llm.model.{runs}", *self.own_code)
        inputs, cost = parts.backbone.stages, partial(self._cost, spec)
        return Stage(spec.name, depends, lambda work: self._train(spec, work), inputs=inputs, code=code, cost=cost)

    def examples_depend_on(self) -> Any:
        """JSON-serializable values that determine what is encoded besides domains and prompts."""
        return self.parts.examples.as_dict() if self.parts.prompts.shows_candidates else None

    def examples(self, spec: AdapterSpec) -> tuple[list[TrainingExample], list[TrainingExample]]:
        """The examples to train on, and those held out to choose the weights if there are no evaluation users."""
        training = self._training(spec)
        examples = domains.training_examples(
            spec.sources,
            window=self.parts.prompts.max_history + 1 if self.parts.examples.whole_histories else None,
            samples=training.samples,
            seed=self.parts.seed,
            of_each=spec.of_each,
            positions=training.positions,
            most=spec.most,
        )
        if spec.valid is not None:
            return examples, []
        size = max(1, math.floor(len(examples) * training.held_out + 1e-9))
        return examples[size:] or examples, examples[:size]

    def encoder(self, spec: AdapterSpec, tokenizer: Any) -> Encode:
        """Encodes the examples of :meth:`examples`."""
        parts, sources = self.parts, spec.sources
        encoders = [ExampleEncoder(domain, parts.builder(tokenizer, domain), parts.examples) for domain in sources]
        longest = parts.prompts.max_history

        def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
            history = sources[example.domain].histories[example.user]
            shown = history[max(0, example.end - longest) : example.end + 1].tolist()
            return encoders[example.domain](shown, rng, known=history)

        return encode

    def _training(self, spec: AdapterSpec) -> LoRATrainingConfig:
        return spec.training or self.config

    def _train(self, spec: AdapterSpec, work: Work) -> None:
        causal = self.parts.backbone.load(work)
        examples, encode, training, score = self._given(spec, causal)
        finetune(
            causal.model,
            spec.name,
            examples,
            encode,
            training,
            validate=score,
            score_name=None if spec.valid else "loss, negative",
            work=work,
            options=self.parts.options,
        )

    def _cost(self, spec: AdapterSpec) -> Cost:
        outline = self.parts.backbone.outline
        causal = blank(outline)
        examples, encode, training, score = self._given(spec, causal)
        return lora_cost(outline, causal, examples, encode, training, validate=score, options=self.parts.options)

    def _given(
        self, spec: AdapterSpec, causal: CausalLM
    ) -> tuple[list[TrainingExample], Encode, LoRATrainingConfig, Callable[[Any], float]]:
        """The arguments of :func:`finetune`: examples, their encoding, the settings, and a validation."""
        parts, valid = self.parts, spec.valid
        examples, held_out = self.examples(spec)
        encode = self.encoder(spec, causal.tokenizer)
        likelihood = None if valid is None else parts.likelihood(causal)

        def score(model: Any) -> float:
            if valid is not None and likelihood is not None:
                return valid.score(likelihood.with_lm(model))
            encoded = [encode(example, np.random.default_rng([parts.seed, i])) for i, example in enumerate(held_out)]
            batches = micro_batches.parts(encoded, default_batch_tokens(causal))
            losses = current().compute([partial(lm_loss, model, batch) for batch, _ in batches], torch.device("cpu"))
            return -sum(share * float(loss) for loss, (_, share) in zip(losses, batches, strict=True))

        return examples, encode, self._training(spec), score
