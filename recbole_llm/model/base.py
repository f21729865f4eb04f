"""The contract of LLM rankers: a history and candidates in, scores out; trained in stages that are kept.

::

    interaction (item_id_list, item_length) --histories--> PromptBuilder --token ids--+
                                                                                      +--> Scorer --> scores [B, C]
    candidates [B, C] -------------------------------------> answers (titles) --------+

A model of the family says how its stages make adapters (:meth:`LLMRanker.plan`) and which of them answers
(:meth:`LLMRanker.answer_with`); all else is here and in ``backbone/``.

Legend: B users, L history items, C candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from recbole_llm.backbone.backbones import load_backbone
from recbole_llm.backbone.collaborative import Retriever
from recbole_llm.backbone.lora import activate, attach_lora, load_adapters
from recbole_llm.backbone.scoring import Scorer, lm_loss
from recbole_llm.data import domains
from recbole_llm.data.domains import Domain, Row
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.evaluation.asked_users import AskedUsers
from recbole_llm.training.checkpoint import fingerprint
from recbole_llm.training.finetune import LoRARecipe, finetune
from recbole_llm.training.stages import Stage, StageKeeper

LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]


class LLMRanker(SequentialRecommender):
    """Base of models that rank candidates by the likelihood of their titles.

    Class attributes tell what a model needs and can do; docs and contract tests are made from them.
    """

    input_type = InputType.POINTWISE
    uses_item_text = True
    uses_cf_model = False
    scores_unseen_items = True
    scores_full_catalogue = False  # it re-ranks what a retriever finds

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        if "valid" not in dataset.candidates:
            raise ValueError(
                f"eval_args: {type(self).__name__} is stopped on validation candidates; for a full ranking of the test items "
                "give eval_args: {'mode': {'valid': 'candidates', 'test': 'full'}}"
            )
        self.keeper = StageKeeper(Path(config["checkpoint_dir"]) / "stages", seed=config["seed"])
        self.domain = domains.of_dataset(config, dataset)
        self.histories = dataset.histories
        backbone = load_backbone(config, self.domain, self.keeper)
        self.backbone_name, self.backbone_fingerprint = backbone.name, backbone.fingerprint
        self.lm: Any = backbone.model
        self.tokenizer = backbone.tokenizer
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        self.letters = config["scorer"] == "letter"
        self.prompt_settings = _prompt_settings(config, self.letters)
        self.prompts = self._prompt_builder(self.domain)
        self.scorer = Scorer(config["scorer"], config["normalize"], self.pad_token_id, config["score_batch_tokens"])
        self.recipe = LoRARecipe.of(config)
        if self.recipe.train_mode == "sequence" and (self.prompts.shows_candidates or not self.prompts.is_continuation):
            raise ValueError(
                "lora_train_mode: sequence needs a prompt that ends in {history} and lists no candidates, unlike "
                f"{self.prompt_settings['template']!r}; give --lora_train_mode=prefix"
            )
        self.negatives = config["candidates"]["number"]
        self.valid_users = config["valid_users"]
        self.seed = config["seed"]
        self.save_every = config["save_every_seconds"]
        self.show_progress = config["show_progress"]
        self.retriever_top = config["retriever_top"]
        self._config = config  # for the retriever, which is configured as a run of its own
        self.top_k_target = config["top_k_target"] or 1
        self.asked = {phase: AskedUsers(self, phase, found) for phase, found in dataset.candidates.items()}
        self.adapters: dict[str, Path] = {}
        self.answering = type(self).__name__
        self.stages_fingerprint: str | None = None
        self._fresh_adapter()

    def __str__(self) -> str:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        return f"{type(self).__name__} on {self.backbone_name}: {trained:,} of {whole:,} parameters in an adapter"

    def _prompt_builder(self, domain: Domain) -> PromptBuilder:
        return PromptBuilder(
            self.tokenizer, domain.items.names, noun=domain.noun, verb=domain.verb, **self.prompt_settings
        )

    # -- scores --------------------------------------------------------------------------------------------------------

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        """Scores [B, C] in fp32 of candidates [B, C] for the histories of a RecBole interaction."""
        return self.score_histories(self._histories_of(interaction), candidates)

    def score_histories(self, histories: Sequence[Sequence[int]], candidates: Tensor) -> Tensor:
        """Scores [B, C] in fp32 for B histories of internal item ids, old to new; differentiable."""
        rows = candidates.tolist()
        shown = rows if self.prompts.shows_candidates else [None] * len(rows)
        prompts = [self.prompts.prompt(history, listed) for history, listed in zip(histories, shown, strict=True)]
        if self.letters:
            labels = [[token] for token in self.prompts.label_tokens[: candidates.size(1)]]
            answers = [labels] * len(rows)
        else:
            answers = [[self._title(item) for item in row] for row in rows]
        return self.scorer(self.lm, prompts, answers)  # [B, C]

    def _title(self, item: int) -> list[int]:
        """A title as the LM learned to answer it: followed by its end, or by the separator of a longer answer."""
        longer = self.top_k_target > 1 and self.prompts.shows_candidates
        return self.prompts.first_of_ranking(item) if longer else self.prompts.answers[item]

    def predict(self, interaction: Any) -> Tensor:
        """RecBole's ``predict``: the score [B] of one item a row, as the only candidate."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None]).squeeze(1)  # [B]

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue: the retriever's, its top ``retriever_top`` put in the LLM's order.

        The re-ranked items keep the retriever's highest scores among themselves, so nothing crosses the seam below them.
        """
        scores = self.retriever.scores(interaction).float()  # [B, I]
        scores[:, 0] = -torch.inf
        best, items = scores.topk(self.retriever_top, dim=1)  # [B, N]
        order = self.score_candidates(interaction, items).argsort(dim=1, descending=True, stable=True)  # [B, N]
        return scores.scatter(1, items.gather(1, order), best)  # [B, I]

    @cached_property
    def retriever(self) -> Retriever:
        """Trained when a full ranking is first asked for."""
        return Retriever(self._config, self.keeper)

    # -- training ------------------------------------------------------------------------------------------------------

    def calculate_loss(self, interaction: Any) -> Tensor:
        """LM loss of a batch of RecBole's (history, next item) rows: a scalar."""
        rng = np.random.default_rng(self.seed)
        targets = interaction[self.ITEM_ID].tolist()
        pairs = zip(self._histories_of(interaction), targets, strict=True)
        encoded = [self._encode([*history, target], self.prompts, self.domain, rng) for history, target in pairs]
        return lm_loss(self.lm, [ids for ids, _ in encoded], [mask for _, mask in encoded], self.pad_token_id)

    def _histories_of(self, interaction: Any) -> list[list[int]]:
        items, lengths = interaction[self.ITEM_SEQ].tolist(), interaction[self.ITEM_SEQ_LEN].tolist()
        return [row[:length] for row, length in zip(items, lengths, strict=True)]

    def _encode(
        self, items: Sequence[int], prompts: PromptBuilder, domain: Domain, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """A history whose last item is the target, as a training row: token ids and answer mask."""
        *history, target = items
        if self.recipe.train_mode == "sequence":
            return prompts.sequence(items)
        if not prompts.shows_candidates:
            prompt, answer = prompts.prompt(history), prompts.answers[target]
        else:
            listed = _listed(target, set(items), len(domain.items.names), self.negatives, rng)
            prompt = prompts.prompt(history, listed)
            answer = self._answer(target, listed, prompts, rng)
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def _answer(self, target: int, listed: list[int], prompts: PromptBuilder, rng: np.random.Generator) -> list[int]:
        if self.letters:
            return [prompts.label_tokens[listed.index(target)]]
        return prompts.ranking([target, *rng.permutation([i for i in listed if i != target])[: self.top_k_target - 1]])

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self) -> Stage:
        """The last stage of the model; it names the stages before it as its inputs."""
        raise NotImplementedError

    def finished(self, folder: Path) -> dict[str, Path]:
        """Adapters by name once the last stage is kept in ``folder``; the first answers, the others are controls."""
        raise NotImplementedError

    def run_stages(self) -> None:
        """Train or find every stage, then load the adapters."""
        stage = self.plan()
        self._bare()
        self.adapters = self.finished(self.keeper.run(stage))
        self.lm = load_adapters(self._bare(), self.adapters)
        self.stages_fingerprint = stage.fingerprint

    def lora_stage(
        self, name: str, sources: Sequence[Domain], *, stop_on_target: bool = True, samples: int | None = None
    ) -> Stage:
        """A stage that trains one adapter from the pre-trained LM on a mixture of domains.

        Args:
            stop_on_target: keep the weights that rank the target's validation candidates best; otherwise those with the
                least loss on rows held out of the mixture.
            samples: how many rows; None takes the recipe's number.
        """
        samples = samples or self.recipe.samples
        valid = self.asked["valid"] if stop_on_target else None
        depends = {
            "backbone": self.backbone_fingerprint,
            "domains": [domain.fingerprint for domain in sources],
            "prompts": self.prompt_settings,
            "recipe": self.recipe.as_dict() | {"samples": samples},
            "listed": [self.negatives, self.top_k_target] if self.prompts.shows_candidates else None,
            "valid": valid and [valid.fingerprint, self.valid_users, self.scorer.normalize],
        }
        return Stage(name, depends, lambda out, scratch: self._train(name, sources, valid, samples, out, scratch))

    def _train(
        self, name: str, sources: Sequence[Domain], valid: AskedUsers | None, samples: int | None, out: Path, scratch: Path
    ) -> None:
        window = self.prompts.max_history + 1 if self.recipe.train_mode == "sequence" else None
        rows = domains.training_rows(sources, window=window, samples=samples, seed=self.seed)
        builders = [self._prompt_builder(domain) for domain in sources]

        def encode(row: Row, rng: np.random.Generator) -> tuple[list[int], list[int]]:
            history = sources[row.domain].histories[row.user]
            start = max(0, row.end - self.prompts.max_history)
            return self._encode(history[start : row.end + 1].tolist(), builders[row.domain], sources[row.domain], rng)

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
            self._bare(), name, rows, encode, self.recipe, pad_token_id=self.pad_token_id, validate=score, out=out,
            scratch=scratch, save_every=self.save_every, show_progress=self.show_progress,
        )  # fmt: skip

    def _fresh_adapter(self) -> None:
        """An untrained adapter (it changes nothing), so that RecBole's own loop has something to train."""
        recipe = self.recipe
        self.lm = attach_lora(
            self.lm, name="default", r=recipe.r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
            target_modules=recipe.target_modules, use_rslora=recipe.use_rslora, seed=recipe.seed,
        )  # fmt: skip

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
        return {**named, "no adapter": lambda: self.answer_with(None)}

    @contextlib.contextmanager
    def answer_with(self, name: str | None) -> Iterator[None]:
        """Let one adapter answer, or the LM alone, within a block."""
        activate(self.lm, name)
        with self._answering(name or "no adapter"):
            try:
                yield
            finally:
                activate(self.lm, next(iter(self.adapters)))

    @contextlib.contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        before, self.answering = self.answering, name
        try:
            yield
        finally:
            self.answering = before

    @property
    def answer_fingerprint(self) -> str | None:
        """What the scores depend on besides the candidates; None before the stages have run."""
        settings = [self.scorer, self.prompt_settings, self.backbone_fingerprint]
        return self.stages_fingerprint and fingerprint([self.stages_fingerprint, self.answering, settings])


def _listed(target: int, known: set[int], item_count: int, number: int, rng: np.random.Generator) -> list[int]:
    """Training candidates: the target at a random place among ``number`` items outside the history."""
    others: list[int] = []
    taken = known | {target, 0}
    left = item_count - len(taken)
    if left < number:
        raise ValueError(
            f"candidates.number: {number} is too large for list-wise training, a history leaves {left} of the catalogue's "
            f"{item_count - 1} items to list"
        )
    while len(others) < number:
        item = int(rng.integers(1, item_count))
        if item not in taken:
            taken.add(item)
            others.append(item)
    others.insert(int(rng.integers(number + 1)), target)
    return others


def _prompt_settings(config: Any, letters: bool) -> dict[str, Any]:
    name = "lettered" if letters else config["prompt"]
    if name not in config["prompts"]:
        raise ValueError(f"prompt: {name} is not a key of `prompts` ({', '.join(config['prompts'])})")
    template = config["prompts"][name]
    if config["lora_train_mode"] not in ("prefix", "sequence"):
        raise ValueError(f"lora_train_mode: {config['lora_train_mode']} is neither prefix nor sequence")
    return {
        "template": template,
        "system": config["system"],
        "history_separator": config["history_separator"],
        "candidate_separator": config["candidate_separator"],
        "labels": LETTERS[: config["candidates"]["number"] + 1] if letters else None,
        "chat": config["chat"],
        "max_history": config["max_history"],
        "max_title_tokens": config["max_title_tokens"],
        "max_prompt_tokens": config["max_prompt_tokens"],
    }
