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
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from recbole_llm.backbone.backbones import load_backbone
from recbole_llm.backbone.lora import activate, attach_lora, load_adapters
from recbole_llm.backbone.scoring import Scorer, lm_loss
from recbole_llm.data import domains
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.domains import Domain, Row
from recbole_llm.data.prompts import PromptBuilder
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
    scores_full_catalogue = False

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        if "valid" not in dataset.candidates:
            raise ValueError(
                f"eval_args: {type(self).__name__} ranks candidates and is stopped on them; leave `mode: candidates`"
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
        self.recipe = _recipe(config)
        self.negatives = config["candidates"]["number"]
        self.valid_users = config["valid_users"]
        self.seed = config["seed"]
        self.save_every = config["save_every_seconds"]
        self.show_progress = config["show_progress"]
        self.top_k_target = config["top_k_target"] or 1
        self.asked = {phase: AskedUsers(self, phase, found) for phase, found in dataset.candidates.items()}
        self.adapters: dict[str, Path] = {}
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
        shown = [rows_ if self.prompts.shows_candidates else None for rows_ in rows]
        prompts = [self.prompts.prompt(history, listed) for history, listed in zip(histories, shown, strict=True)]
        if self.letters:
            labels = [[token] for token in self.prompts.label_tokens[: candidates.size(1)]]
            answers = [labels] * len(rows)
        else:
            answers = [[self.prompts.answers[item] for item in row] for row in rows]
        return self.scorer(self.lm, prompts, answers)  # [B, C]

    def predict(self, interaction: Any) -> Tensor:
        """RecBole's ``predict``: the score [B] of one item a row, as the only candidate."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None]).squeeze(1)  # [B]

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue.

        Raises:
            ValueError: an LLM ranker reads each title for each user; a full ranking would take days and is refused.
        """
        raise ValueError(
            f"eval_args: {type(self).__name__} ranks candidates; full ranking would score all {self.n_items - 1} titles for "
            "every user. Leave `mode: candidates`, or rank the catalogue with a classical model"
        )

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
        self.lm.eval()

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
        try:
            yield
        finally:
            activate(self.lm, next(iter(self.adapters)))


class AskedUsers:
    """The users of a phase with their candidates, in an order drawn by the run's seed: for early stopping and merging."""

    def __init__(self, model: LLMRanker, phase: str, candidates: CandidateSet):
        self._model, self._phase, self._candidates = model, phase, candidates
        self._order = torch.from_numpy(np.random.default_rng(model.seed).permutation(len(candidates.users)))

    @property
    def fingerprint(self) -> str:
        """What the order and the candidates depend on."""
        return f"{self._candidates.sha256}/{len(self._order)}/{self._model.seed}"

    def prompts(self, number: int) -> tuple[list[list[int]], Tensor, Tensor]:
        """Histories, candidates [N, C] and targets [N] of at most ``number`` users."""
        chosen = self._order[:number]
        users = self._candidates.users[chosen].tolist()
        histories = [self._model.histories.before(user, self._phase).tolist() for user in users]
        return histories, self._candidates.items[chosen], self._candidates.targets[chosen]

    @torch.no_grad()
    def score(self) -> float:
        """Mean NDCG of the target over all candidates, ``1 / log2(1 + rank)``, of ``valid_users`` users."""
        histories, candidates, targets = self.prompts(self._model.valid_users)
        scores = self._model.score_histories(histories, candidates).cpu()  # [N, C]
        if not torch.isfinite(scores).all():
            return math.nan
        target = scores[candidates == targets[:, None]][:, None]  # [N, 1]
        better = (scores > target).sum(1) + 0.5 * ((scores == target).sum(1) - 1)  # [N]
        return float((1 / torch.log2(2 + better)).mean())


def _listed(target: int, known: set[int], item_count: int, number: int, rng: np.random.Generator) -> list[int]:
    """Training candidates: the target at a random place among ``number`` items outside the history."""
    others: list[int] = []
    taken = known | {target, 0}
    if item_count - len(taken) < number:
        raise ValueError(
            f"candidates.number: {number} is too large for list-wise training, a history leaves {item_count - len(taken)} of "
            f"the catalogue's {item_count - 1} items to list"
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


def _recipe(config: Any) -> LoRARecipe:
    return LoRARecipe(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["target_modules"],
        use_rslora=config["use_rslora"],
        train_mode=config["lora_train_mode"],
        samples=config["train_samples"],
        epochs=config["lora_epochs"],
        batch_size=config["lora_batch_size"],
        accumulation=config["gradient_accumulation_steps"],
        learning_rate=config["lora_learning_rate"],
        warmup_ratio=config["warmup_ratio"],
        max_grad_norm=config["max_grad_norm"],
        eval_steps=config["lora_eval_steps"],
        patience=config["lora_patience"],
        seed=config["seed"],
    )
