"""The merge stage of rankers: all weights are frozen, and the method that ``merge`` names chooses the coefficients.

The result is one ordinary PEFT adapter, so inference costs the same as with a single adapter. For the methods see
:mod:`recbole_llm.merging.stage`.

Legend: K adapters, M adapted modules, C candidates.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm.llm.lora import AdapterView, load_adapters, lora_modules
from recbole_llm.llm.packing import token_batches
from recbole_llm.merging.coefficients import MergeProblem
from recbole_llm.merging.objectives import candidate_entropy, first_k_entropy, mean_over_batches
from recbole_llm.merging.stage import merge_adapters, resolve
from recbole_llm.model.parts import default_batch_tokens, gradient_batch_tokens
from recbole_llm.model.ranker_parts import RankerParts
from recbole_llm.settings import Settings
from recbole_llm.store.stages import Stage, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet
    from recbole_llm.llm.causal_lm import CausalLM
    from recbole_llm.model.eval_users import EvalUsers


@dataclass(frozen=True)
class MergeSettings(Settings):
    """The ``merge_*`` keys; see ``properties/``, section *Merging*."""

    KEYS = {"method": "merge"} | {
        name: f"merge_{name}" for name in ("granularity", "split", "prompts", "first_tokens", "compress_rank")
    }

    method: str
    granularity: str
    split: str
    prompts: int
    first_tokens: int
    compress_rank: int | None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any, **given: Any) -> MergeSettings:
        """The settings of a configuration.

        Raises:
            ValueError: no such method or granularity.
        """
        resolve(config["merge"])
        if config["merge_granularity"] not in ("global", "module"):
            raise ValueError(f"merge_granularity: {config['merge_granularity']} is neither global nor module")
        options = {name: config[f"merge_{name}"] for name in ("weights", "extrapolate", "points", "steps", "density", "residual")}
        options |= {"lr": config["merge_learning_rate"], "seed": config["seed"]}
        return super().of(config, options=options, **given)


@dataclass(frozen=True)
class AdapterMerging:
    """Merges the adapters of earlier stages."""

    parts: RankerParts
    settings: MergeSettings

    def stage(self, name: str, sources: Mapping[str, Stage], candidates: Mapping[str, CandidateSet]) -> Stage:
        """A stage that writes the merged adapter of ``sources``, by their names in the report, into the folder ``merged``.

        Raises:
            ValueError: ``merge_split`` names a phase without candidates.
        """
        settings, valid = self.settings, self.parts.eval_users(candidates)
        if settings.split not in candidates:
            raise ValueError(f"merge_split: {settings.split} is not one of {', '.join(candidates)}")
        unlabelled = self.parts.eval_users(candidates, settings.split)
        depends = {
            "settings": settings.as_dict(),
            # the source, since the method may be a function of the user
            "method": inspect.getsource(sys.modules[resolve(settings.method).__module__]),
            "prompts": [unlabelled.fingerprint, valid.fingerprint],
            "scores": self.parts.scores_depend_on(),
        }
        return Stage(name, depends, lambda work: self._merge(sources, unlabelled, valid, work), inputs=tuple(sources.values()))

    def _merge(self, sources: Mapping[str, Stage], unlabelled: EvalUsers, valid: EvalUsers, work: Work) -> None:
        folders = {name: work.folder(stage) for name, stage in sources.items()}
        causal, settings = self.parts.backbone.load(work), self.settings
        model = load_adapters(causal.model, folders)
        try:
            problem = self._problem(causal, model, list(folders), unlabelled, valid)
            out, rank = work.out / "merged", settings.compress_rank
            merge_adapters(folders, settings.method, problem, out, split=settings.split, compress_rank=rank)
        finally:
            model.unload()

    def _problem(self, causal: CausalLM, model: Any, names: list[str], unlabelled: EvalUsers, valid: EvalUsers) -> MergeProblem:
        """The input of the method, without the targets of the unlabelled prompts."""
        likelihood, first_tokens = self.parts.likelihood(causal), self.settings.first_tokens
        tokenizer, modules = causal.tokenizer, list(lora_modules(model))
        drawn = unlabelled.draw(self.settings.prompts)
        pairs = list(zip(drawn.histories, drawn.candidates, strict=True))
        by_name: Callable[[Tensor], Any] = MergeProblem(names, modules, self.settings.granularity).by_name

        def entropy(weights: Tensor, batch: list[tuple[list[int], Tensor]]) -> Tensor:
            """Mean entropy (nats) of a batch at weights [K] or [M, K]."""
            histories, candidates = [history for history, _ in batch], torch.stack([row for _, row in batch])  # [B, C]
            view = AdapterView(model, by_name(weights))
            if not first_tokens:
                return candidate_entropy(likelihood.with_lm(view)(histories, candidates))
            prompts = [prompt.ids for prompt in likelihood.prompts_of(histories, candidates)]
            return first_k_entropy(view, prompts, first_tokens, int(tokenizer.pad_token_id), tokenizer.eos_token_id)

        def valid_score(weights: Tensor) -> float:
            """Labelled validation score at weights [K] or [M, K], which ``merge: grid`` maximizes."""
            return valid.score(likelihood.with_lm(AdapterView(model, by_name(weights))))

        # the graphs of a batch are alive at once: of a large LM, a batch is one prompt
        tokens = likelihood.tokens(drawn.histories, drawn.candidates)
        budgets = gradient_batch_tokens(causal), self.parts.scoring.batch_tokens or default_batch_tokens(causal)
        batches, measured = ([[pairs[i] for i in rows] for rows in token_batches(*tokens, budget)] for budget in budgets)
        return MergeProblem(
            names=names,
            modules=modules,
            granularity=self.settings.granularity,
            objective=mean_over_batches(entropy, batches, measured=measured),
            valid_score=valid_score,
            settings=dict(self.settings.options),
        )
