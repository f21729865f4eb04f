"""Rankers that train adapters: the LM stays frozen, LoRA adapters are trained or merged in stages, one of them answers.

A model of the family says how its stages make adapters (:meth:`LoRARanker.plan`, :meth:`LoRARanker.lora_stage`) and which
of them answers (:meth:`LoRARanker.finished`); all else is here and in ``llm/lora.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data import domains
from recbole_llm.data.domains import Domain, Row
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.llm.finetune import LoRATrainingConfig, finetune
from recbole_llm.llm.lora import activate, attach_lora, load_adapters
from recbole_llm.llm.scoring import lm_loss
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.store.stages import Stage

SHUFFLED = "shuffled titles"


class LoRARanker(LLMRanker):
    """Base of models whose answer is an adapter's."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.recipe = LoRATrainingConfig.of(config)
        if self.recipe.train_mode not in ("prefix", "sequence"):
            raise ValueError(f"lora_train_mode: {self.recipe.train_mode} is neither prefix nor sequence")
        if self.recipe.train_mode == "sequence" and (self.prompts.shows_candidates or not self.prompts.is_continuation):
            raise ValueError(
                "lora_train_mode: sequence needs a prompt that ends in {history} and lists no candidates, unlike "
                f"{self.prompt_settings['template']!r}; give --lora_train_mode=prefix"
            )
        self.adapters: dict[str, Path] = {}
        self.shuffled_title_control = config["shuffled_title_control"]
        self._aliases: Tensor | None = None  # whose title each item bears, [I], while the probe asks
        self._fresh_adapter()

    # -- training ------------------------------------------------------------------------------------------------------

    def calculate_loss(self, interaction: Any) -> Tensor:
        """LM loss of a batch of RecBole's (history, next item) rows: a scalar."""
        rng = np.random.default_rng(self.seed)
        targets = interaction[self.ITEM_ID].tolist()
        pairs = zip(self._histories_of(interaction), targets, strict=True)
        encoded = [self._row([*history, target], self.prompts, self.domain, rng) for history, target in pairs]
        return lm_loss(self.lm, [ids for ids, _ in encoded], [mask for _, mask in encoded], self.pad_token_id)

    def _row(
        self, items: Sequence[int], prompts: PromptBuilder, domain: Domain, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        if self.recipe.train_mode == "sequence":
            return prompts.sequence(items)
        return self._encode(items, prompts, domain, rng)

    # -- stages --------------------------------------------------------------------------------------------------------

    def finished(self, folder: Path) -> dict[str, Path]:
        """Adapters by name once the last stage is kept in ``folder``; the first answers, the others are controls."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        self.adapters = self.finished(folder)
        self.lm = load_adapters(self._bare(), self.adapters)

    def run_stages(self) -> None:
        self._bare()
        super().run_stages()

    def lora_stage(
        self,
        name: str,
        sources: Sequence[Domain],
        *,
        stop_on_target: bool = True,
        samples: int | None = None,
        of_each: bool = False,
    ) -> Stage:
        """A stage that trains one adapter from the pre-trained LM on a mixture of domains.

        Args:
            stop_on_target: keep the weights that rank the target's validation candidates best; otherwise those with the
                least loss on rows held out of the mixture.
            samples: how many rows; None takes the recipe's number.
            of_each: so many rows of each domain.
        """
        samples = samples or self.recipe.samples
        valid = self.asked["valid"] if stop_on_target else None
        depends = {
            "backbone": self.backbone_fingerprint,
            "domains": [domain.fingerprint for domain in sources],
            "prompts": self.prompt_settings,
            "recipe": self.recipe.as_dict() | {"samples": [samples, "of each"] if of_each else samples},
            "listed": [self.negatives, self.top_k_target, "trained items"] if self.prompts.shows_candidates else None,
            "valid": valid and [valid.fingerprint, self.valid_users, self.normalize],
        }
        window = self.prompts.max_history + 1 if self.recipe.train_mode == "sequence" else None
        drawn = partial(domains.training_examples, sources, window=window, samples=samples, seed=self.seed, of_each=of_each)
        return Stage(name, depends, lambda out, scratch: self._train(name, sources, drawn(), valid, out, scratch))

    def _train(
        self, name: str, sources: Sequence[Domain], rows: list[Row], valid: EvalUsers | None, out: Path, scratch: Path
    ) -> None:
        builders = [self._prompt_builder(domain) for domain in sources]

        def encode(row: Row, rng: np.random.Generator) -> tuple[list[int], list[int]]:
            history = sources[row.domain].histories[row.user]
            start = max(0, row.end - self.prompts.max_history)
            return self._row(history[start : row.end + 1].tolist(), builders[row.domain], sources[row.domain], rng)

        held_out: list[Row] = []
        if valid is None:  # the recipe's own split: 2 % of the mixture, at most 500 rows
            size = min(500, max(1, len(rows) // 50))
            rows, held_out = rows[size:] or rows, rows[:size]

        def score(model: Any) -> float:
            self.lm = model
            if valid is not None:
                return valid.score()
            encoded = [encode(row, np.random.default_rng([self.seed, i])) for i, row in enumerate(held_out)]
            parts = [encoded[i : i + 32] for i in range(0, len(encoded), 32)]
            losses = [lm_loss(model, [r for r, _ in part], [m for _, m in part], self.pad_token_id) for part in parts]
            return -float(torch.stack(losses).mean())

        finetune(
            self._bare(),
            name,
            rows,
            encode,
            self.recipe,
            pad_token_id=self.pad_token_id,
            validate=score,
            out=out,
            scratch=scratch,
            save_every=self.save_every,
            show_progress=self.show_progress,
        )

    def _fresh_adapter(self) -> None:
        """An untrained adapter (it changes nothing), so that RecBole's own loop has something to train."""
        recipe = self.recipe
        self.lm = attach_lora(
            self.lm,
            name="default",
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=recipe.target_modules,
            use_rslora=recipe.use_rslora,
            seed=recipe.seed,
        )

    def _bare(self) -> Any:
        """The frozen LM without any adapter."""
        if hasattr(self.lm, "peft_config"):
            self.lm = self.lm.unload()
        return self.lm

    # -- controls ------------------------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        """What is always reported beside the model, by name: a context in which the model answers as that control."""
        others = list(self.adapters)[1:]
        named: dict[str, Any] = {name: lambda name=name: self.answer_with(name) for name in others}
        named["no adapter"] = lambda: self.answer_with(None)
        if self.shuffled_title_control:
            named |= {SHUFFLED: self.answer_with_shuffled_titles, f"no adapter, {SHUFFLED}": self._alone_with_shuffled_titles}
        return named

    @contextlib.contextmanager
    def answer_with(self, name: str | None) -> Iterator[None]:
        """Let one adapter answer, or the LM alone, within a block."""
        activate(self.lm, name)
        with self._answering(self._identity([name] if name else [])):
            try:
                yield
            finally:
                activate(self.lm, next(iter(self.adapters)))

    @contextlib.contextmanager
    def answer_with_shuffled_titles(self) -> Iterator[None]:
        """Let every item bear another's title within a block, in histories and candidates alike.

        Who likes what is as before, and so are the titles; that they belong together is gone. What is left of the score does not
        come from what the LM knows of these titles, be it their meaning or that it has read this data set.
        """
        places = np.random.default_rng(self.seed).permutation(np.arange(1, self.n_items))
        aliases = np.zeros(self.n_items, dtype=np.int64)
        aliases[places] = np.roll(places, 1)  # one ring: nobody keeps his own
        self._aliases = torch.from_numpy(aliases)  # [I]
        with self._answering(f"{self.answering}, {SHUFFLED} {self.seed}"):
            try:
                yield
            finally:
                self._aliases = None

    @contextlib.contextmanager
    def _alone_with_shuffled_titles(self) -> Iterator[None]:
        with self.answer_with(None), self.answer_with_shuffled_titles():
            yield

    def score_histories(
        self, histories: Sequence[Sequence[int]], candidates: Tensor, users: Sequence[int] | None = None
    ) -> Tensor:
        if self._aliases is not None:  # to bear another's title is to stand in its place: nothing else of an item is read
            histories = [self._aliases[torch.as_tensor(history, dtype=torch.long)].tolist() for history in histories]
            candidates = self._aliases.to(candidates.device)[candidates]  # [B, C]
        return super().score_histories(histories, candidates, users)

    def _identity(self, adapters: Iterable[str]) -> str:
        """What answers, by the folders of the adapters that are mixed evenly: kept scores are found again by it."""
        folders = [self.adapters[adapter] for adapter in adapters]
        return " + ".join(f"{folder.parent.name}/{folder.name}" for folder in folders) or "no adapter"
