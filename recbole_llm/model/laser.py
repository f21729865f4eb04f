"""Laser: a trainable prefix and suffix around a frozen LLM, which turns users and items into vectors.

Zhang et al., "Laser: Parameter-Efficient LLM Bi-Tuning for Sequential Recommendation with Collaborative Information", 2024
(arXiv 2409.01605). Users and items go through the same tower::

    states C [N, H] of a frozen SASRec --> M-Former (model/m_former.py) --> prefix P [L, D] --+
    history as text, one line an item ------------------------------------> tokens [T, D] ----+--> LLM --> h [D] at s
    one trainable vector -------------------------------------------------> suffix s [1, D] --+

    score(u, i) = cos(h_u, h_i)                                                                               (eq. 3)

An item is a history of one. The loss is a softmax over the cosines with all items (tau .05), plus the router's load balance.
No gradient goes through the item matrix, which two phases treat differently:

1. it is encoded anew at the start of every epoch; the pair (weights, item matrix) that validates best is kept;
2. it stays as it is, and the user's side alone is trained on.

So two towers are kept: the user's, and the item's, whose weights are those that encoded the matrix.

Legend: B users, N collaborative states, L prefix tokens, T text tokens, I items, H width of the collaborative model, D of the LM.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.data import domains
from recbole_llm.data.domains import Domain, Row
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.llm.encoding import encode
from recbole_llm.llm.packing import token_batches
from recbole_llm.model import experts
from recbole_llm.model.base import text_fields
from recbole_llm.model.encoder import LLMEncoder
from recbole_llm.model.m_former import MFormer, MFormerConfig, Routing, WarmUp, load_balance
from recbole_llm.store.files import fingerprint, save_tensors
from recbole_llm.store.progress import progress_bar
from recbole_llm.store.stages import Stage
from recbole_llm.training.loop import Epochs, TrainingLoop, cosine_with_warmup

POOLINGS = ("suffix", "eos", "mean")
STATES = ("states", "items", "none")


class Tower(nn.Module):
    """What is trained around the LM: where the prefix comes from, and the suffix.

    Without ``m_former`` the prefix is L trainable vectors, the same for everybody.
    """

    def __init__(self, recipe: MFormerConfig, cf_width: int, lm_width: int, *, m_former: bool, prefix: bool, suffix: bool):
        super().__init__()
        self.m_former = MFormer(recipe, cf_width, lm_width) if prefix and m_former else None
        self.prefix = nn.Parameter(torch.randn(recipe.length, lm_width) * 0.02) if prefix and not m_former else None  # [L, D]
        self.suffix = nn.Parameter(torch.randn(1, lm_width) * 0.02) if suffix else None  # [1, D]

    def forward(self, states: Tensor, known: Tensor) -> tuple[Tensor, Routing | None]:
        """Soft tokens [B, L + 1, D], prefix and suffix as far as there are, for states [B, N, H] of which some are known."""
        routing, parts = None, []
        if self.m_former is not None:
            prefix, routing = self.m_former(states, known)  # [B, L, D]
            parts.append(prefix)
        parts += [part.expand(len(states), -1, -1) for part in (self.prefix, self.suffix) if part is not None]
        return torch.cat(parts, 1), routing


class Laser(LLMEncoder):
    """A frozen LLM between a prefix that the M-Former makes of collaborative states and a trainable suffix."""

    uses_cf_model = True
    supports_init_from = True  # --init_from

    def __init__(self, config: Any, dataset: Any):
        _check(config)
        super().__init__(config, dataset)
        self.texts = self.domain.items.described(text_fields(config))
        self.prompts = self._prompt_builder(self.domain)
        self.cf = self._collaborative(config)
        self.init_run = config.init_run
        if self.init_run:
            _ = self._run_folders  # refused now where they are gone, not after a training
        self.states, self.transfer_states = config["cf_states"] or "none", config["transfer_states"]
        self.cold_threshold = config["cold_threshold"]
        self.null_share, self.single_share = config["null_share"], config["single_share"]
        self.pooling = config["pooling"]
        self.tau, self.balance_weight = config["temperature"], config["load_balance_weight"]
        self.recipe = MFormerConfig.of(config)
        self.train_samples, self.refresh_steps = config["train_samples"], config["refresh_steps"]
        self.batch_size, self.weight_decay = config["laser_batch_size"], config["weight_decay"]
        self.warmup_ratio, self.max_grad_norm = config["warmup_ratio"], config["max_grad_norm"]
        self.patience = config["laser_patience"]
        self.phases = {
            name: {key: config[f"{name}_{key}"] for key in ("epochs", "learning_rate")} for name in ("phase1", "phase2", "warmup")
        }
        self.batch_tokens = config["score_batch_tokens"] or (2048 if self._on_cpu else 16384)
        self.cf_width = self.cf.item_table.size(1) if self.states == "items" else self.cf.state_width
        self.group_field = config["category_field"]
        self.shape = {"m_former": config["m_former"], "prefix": config["prefix"], "suffix": self.pooling == "suffix"}
        self._fresh_towers()

    def __str__(self) -> str:
        sizes: Counter[str] = Counter()
        for name, parameter in self.tower.named_parameters():
            sizes[name.split(".")[0]] += parameter.numel() * parameter.requires_grad
        return f"{super().__str__()}: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}"

    def _prompt_settings(self, config: Any) -> dict[str, Any]:
        return {**super()._prompt_settings(config), "history_label": config["history_label"]}

    def _prompt_builder(self, domain: Domain, settings: dict[str, Any] | None = None) -> PromptBuilder:
        return PromptBuilder(self.tokenizer, self.texts, noun=domain.noun, verb=domain.verb, **self.prompt_settings)

    def train(self, mode: bool = True) -> Laser:
        super().train(mode)
        self.lm.eval()  # frozen also means without dropout
        self.item_tower.eval()
        return self

    # -- from a history to a vector ------------------------------------------------------------------------------------

    def _embed(self, tower: Tower, histories: Sequence[Sequence[int]], null_share: float = 0.0) -> tuple[Tensor, Routing | None]:
        """Vectors [B, D] of unit length, and where the router sent each history.

        null_share: of the histories, drawn anew, whose states are taken away, so that the null token learns to stand for them.
        """
        states, known = self._cf_states(histories)  # [B, N, H], [B, N]
        if null_share:
            known = known & (torch.rand(len(known), 1).to(known.device) >= null_share)
        soft, routing = tower(states, known)  # [B, S, D]
        first = -1 - soft.size(1) * torch.arange(len(histories))  # the id of each row's first soft token
        rows = [self._row(history, int(start), soft.size(1)) for history, start in zip(histories, first, strict=True)]
        hidden = encode(self.lm, rows, self.pad_token_id, soft=soft.flatten(0, 1), mean=self.pooling == "mean")  # [B, D]
        return F.normalize(hidden, dim=-1), routing

    def _row(self, history: Sequence[int], first: int, number: int) -> list[int]:
        """A row as the LM reads it: prefix, text, suffix; soft tokens are ids below zero from ``first`` down."""
        soft = [first - place for place in range(number)]
        cut = number - (self.pooling == "suffix")
        end = [self.tokenizer.eos_token_id] if self.pooling == "eos" else []
        return soft[:cut] + self.prompts.prompt(history) + end + soft[cut:]

    def _cf_states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """States [B, N, H] of the items that have one, and where they are, [B, N]."""
        known = [[item for item in history if self.has_state[item]] for history in histories]
        if self.states == "states":
            return self.cf.sequence_states(known)
        return self.cf.item_states(known)

    @cached_property
    def has_state(self) -> Tensor:
        """Which items the collaborative model knows anything of, BoolTensor [I]."""
        enough = torch.from_numpy(self.histories.train_counts >= max(1, self.cold_threshold))
        return enough & (self.states != "none" and self._shares_the_space)

    @property
    def _shares_the_space(self) -> bool:
        """Whether the M-Former was trained on this very collaborative model, or is asked to read another one's states."""
        own = self.cache.folder(self.cf.stage).name
        return not self.init_run or self.transfer_states or own in self.init_run.record["stages"].values()

    @torch.no_grad()
    def _encode(self, tower: Tower, histories: Sequence[Sequence[int]], name: str = "") -> Tensor:
        """Vectors [N, D], in batches of like length under ``score_batch_tokens``; memory does not grow with N but for them."""
        lengths = [len(self.prompts.prompt(history)) + self.recipe.length + 1 for history in histories]
        found = torch.empty(len(histories), self.lm.get_input_embeddings().weight.shape[1], device=self.cf.device)
        with progress_bar(name, len(histories), show=self.show_progress and bool(name)) as bar:
            for batch in token_batches(lengths, [0] * len(lengths), self.batch_tokens):
                found[batch] = self._embed(tower, [histories[i] for i in batch])[0].to(found.device)
                bar.advance(len(batch))
        return found

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> Tensor:
        return self._encode(self.tower, histories)

    def encode_items(self) -> Tensor:
        matrix = self._encode(self.item_tower, [[item] for item in range(self.n_items)], "item matrix")  # [I, D]
        matrix[0] = 0
        return matrix

    # -- its control ---------------------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        return {self.cf.name: lambda: self._answering(self.cf.name)}

    def full_sort_predict(self, interaction: Any) -> Tensor:
        if self.answering == self.cf.name:
            return self.cf.scores(interaction)  # [B, I]
        return super().full_sort_predict(interaction)

    def score_candidates(self, interaction: Any, candidates: Tensor) -> Tensor:
        if self.answering == self.cf.name:
            users = interaction[self.USER_ID].tolist()
            return self.cf.candidate_scores(users, self._histories_of(interaction), candidates)  # [B, C]
        return super().score_candidates(interaction, candidates)

    # -- loss ----------------------------------------------------------------------------------------------------------

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Loss of a batch of RecBole's (history, next item) rows: a scalar."""
        return self._loss(self._histories_of(interaction), interaction[self.ITEM_ID].tolist())

    def _loss(self, histories: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
        if self.training and self.single_share:  # an item is a history of one: the tower shall know such histories
            single = torch.rand(len(histories)) < self.single_share  # [B]
            histories = [history[-1:] if cut else history for history, cut in zip(histories, single, strict=True)]
        users, routing = self._embed(self.tower, histories, self.null_share if self.training else 0.0)  # [B, D]
        items = self.item_matrix[1:].to(users.device)  # [I - 1, D], without the padding item
        logits = users @ items.T / self.tau  # [B, I - 1]
        loss = F.cross_entropy(logits, torch.tensor(targets, device=logits.device) - 1)
        if routing is None or self.recipe.experts == 1:
            return loss
        return loss + self.balance_weight * load_balance(routing)

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self) -> Stage:
        if self.init_run:
            depends = {"run": self.init_run.record["stages"], **self._reads()}
            return Stage("item-matrix", depends, self._transfer, inputs=(self.cf.stage,))
        inputs = (self.cf.stage,)
        training = {
            **self._reads(),
            "tower": [self.recipe.as_dict(), self.shape],
            "batches": [self.train_samples, self.batch_size, self.null_share, self.single_share, self.seed],
            "optimizer": [self.weight_decay, self.warmup_ratio, self.max_grad_norm],
        }
        if self.phases["warmup"]["epochs"]:
            warmup = training | {"phase": self.phases["warmup"], "loss": self.balance_weight}
            inputs = (Stage("m-former", warmup, self._warm_up, inputs=inputs),)
        training |= {
            "loss": [self.tau, self.balance_weight],
            "valid": [self.valid_metric, self.valid_users, self.patience, self.refresh_steps],
        }
        self.phase1 = Stage("phase-1", training | {"phase": self.phases["phase1"]}, self._phase1, inputs=inputs)
        if not self.phases["phase2"]["epochs"]:
            return self.phase1
        return Stage("phase-2", training | {"phase": self.phases["phase2"]}, self._phase2, inputs=(self.phase1,))

    def _reads(self) -> dict[str, Any]:
        """What a vector depends on besides the weights."""
        return {
            "domain": self.domain.fingerprint,
            "backbone": self.backbone_fingerprint,
            "prompts": [self.prompt_settings, self.pooling],
            "texts": fingerprint(self.texts),
            "states": [self.states, self.cold_threshold, self._shares_the_space],
        }

    def load(self, folder: Path) -> None:
        self.cf.load(self.cache.folder(self.cf.stage))
        if self.init_run:
            self._load_run()
            self.item_matrix = load_file(folder / "item_matrix.safetensors")["items"].to(self.cf.device)
            return
        self._load_pair()
        self.tower.load_state_dict(load_file(folder / "user_tower.safetensors"))
        self._log_experts(type(self).__name__)

    def _load_pair(self) -> None:
        """Take up both towers and the item matrix of phase 1."""
        folder = self.cache.folder(self.phase1)
        self.tower.load_state_dict(load_file(folder / "user_tower.safetensors"))
        self.item_tower.load_state_dict(load_file(folder / "item_tower.safetensors"))
        self.item_matrix = load_file(folder / "item_matrix.safetensors")["items"].to(self.cf.device)

    def _load_run(self) -> None:
        """Take up both towers of another run."""
        items, users = self._run_folders
        try:
            self.item_tower.load_state_dict(load_file(items / "item_tower.safetensors"))
            self.tower.load_state_dict(load_file(users / "user_tower.safetensors"))
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ValueError(
                f"init_from: the towers of {self.init_run.path} do not fit this run ({reason}); leave out what changes the "
                "M-Former, the backbone, or the width of the collaborative model (cf_config)"
            ) from error

    @cached_property
    def _run_folders(self) -> tuple[Path, Path]:
        """Where another run keeps the item's and the user's tower."""
        last = "phase-2" if "phase-2" in self.init_run.record["stages"] else "phase-1"
        return self.init_run.stage("phase-1"), self.init_run.stage(last)

    def _transfer(self, out: Path, scratch: Path) -> None:
        """Another run's item tower reads this catalogue."""
        self.cf.load(self.cache.folder(self.cf.stage))
        self._load_run()
        save_tensors(out / "item_matrix.safetensors", {"items": self.encode_items()})

    def _fresh_towers(self) -> None:
        """Untrained, from the seed of the stage that begins."""
        width = self.lm.get_input_embeddings().weight.shape[1]
        self.tower = Tower(self.recipe, self.cf_width, width, **self.shape).to(self.cf.device)
        self.item_tower = deepcopy(self.tower).requires_grad_(False).eval()

    def _warm_up(self, out: Path, scratch: Path) -> None:
        """The M-Former alone, by contrast of behaviour and text."""
        self.cf.load(self.cache.folder(self.cf.stage))
        self._fresh_towers()
        m_former, width = self.tower.m_former, self.lm.get_input_embeddings().weight.shape[1]
        assert m_former is not None
        heads = WarmUp(self.recipe.hidden_size, width).to(self.cf.device)

        def loss(histories: list[list[int]], _: list[int]) -> Tensor:
            queried, routing = m_former.query(*self._cf_states(histories))  # [B, L, M]
            with torch.no_grad():
                rows = [self.prompts.prompt(history) for history in histories]
                text = encode(self.lm, rows, self.pad_token_id, mean=True).to(queried.device)  # [B, D]
            return heads(queried, text) + self.balance_weight * load_balance(routing)

        self._fit("warmup", {**_named("m_former", m_former), **_named("heads", heads)}, loss, scratch)
        save_tensors(out / "user_tower.safetensors", self.tower.state_dict())

    def _phase1(self, out: Path, scratch: Path) -> None:
        """The item tower takes up the user tower's weights, and encodes the matrix anew, wherever an epoch begins."""
        self.cf.load(self.cache.folder(self.cf.stage))
        self._fresh_towers()
        before = self.phase1.inputs[0]
        if before is not self.cf.stage:
            self.tower.load_state_dict(load_file(self.cache.folder(before) / "user_tower.safetensors"))
        self._refresh()
        # the item tower is nothing that the optimiser moves, but it is half of the pair that is saved and kept
        pair = {**_named("user", self.tower), **_named("item", self.item_tower)}
        self._fit("phase1", pair, self._loss, scratch, refresh=True, validate=True)
        self.item_matrix = None  # that of the pair which was kept
        save_tensors(out / "user_tower.safetensors", self.tower.state_dict())
        save_tensors(out / "item_tower.safetensors", self.item_tower.state_dict())
        save_tensors(out / "item_matrix.safetensors", {"items": self.item_matrix})

    def _refresh(self) -> None:
        self.item_tower.load_state_dict(self.tower.state_dict())
        self.item_matrix = None

    def _phase2(self, out: Path, scratch: Path) -> None:
        """The user's side against the item matrix of phase 1."""
        self.cf.load(self.cache.folder(self.cf.stage))
        self._load_pair()
        self._fit("phase2", _named("user", self.tower), self._loss, scratch, validate=True)
        save_tensors(out / "user_tower.safetensors", self.tower.state_dict())

    def _fit(
        self,
        phase: str,
        parameters: dict[str, nn.Parameter],
        loss: Callable[[list[list[int]], list[int]], Tensor],
        scratch: Path,
        *,
        refresh: bool = False,
        validate: bool = False,
    ) -> None:
        """Train on (history, next item) pairs of the training split for the epochs of a phase; the best weights are kept.

        With ``refresh`` the item matrix is renewed every ``refresh_steps`` steps; without, what there was before the first
        step is a candidate for the best weights, too.
        """
        settings = self.phases[phase]
        rows = domains.training_examples([self.domain], window=None, samples=self.train_samples, seed=self.seed)
        order = Epochs(len(rows), self.batch_size, self.seed)
        total, every = order.steps * settings["epochs"], self.refresh_steps or order.steps
        if not total:
            return

        def step_loss(step: int) -> Tensor:
            if refresh and step % every == 0:
                self._refresh()
            self.train()
            chosen = [rows[i] for i in order[step]]
            return loss(*map(list, zip(*map(self._pair, chosen), strict=True)))

        def score() -> float:
            self.eval()
            self._log_experts(phase)
            return self.valid_score()

        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=self.weight_decay)
        loop = TrainingLoop(
            name=phase,
            parameters=parameters,
            optimizer=optimizer,
            scheduler=cosine_with_warmup(optimizer, total, self.warmup_ratio),
            loss=step_loss,
            total_steps=total,
            clip_grad_norm=self.max_grad_norm,
            validate=score if validate else None,
            eval_every=every,
            patience=self.patience,
            folder=scratch / "loop",
            save_every=self.save_every,
            learning_rate_key=f"{phase}_learning_rate",
            show_progress=self.show_progress,
        )
        if validate and not refresh:
            loop.state.best_score = score()
            loop.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        loop.run()

    def _pair(self, row: Row) -> tuple[list[int], int]:
        history = self.domain.histories[row.user]
        return history[: row.end].tolist(), int(history[row.end])

    # -- experts -------------------------------------------------------------------------------------------------------

    @property
    def _routes(self) -> bool:
        return self.tower.m_former is not None and self.recipe.experts > 1

    @torch.no_grad()
    def experts_of(self, histories: Sequence[Sequence[int]]) -> list[int]:
        """The expert that the router sends each history to."""
        assert self.tower.m_former is not None
        parts = (histories[i : i + 512] for i in range(0, len(histories), 512))  # memory does not grow with the users
        routed = (self.tower.m_former.routing(*self._cf_states(part))[1] for part in parts)
        return [expert for routing in routed for expert in routing.experts.tolist()]

    def _log_experts(self, when: str) -> None:
        """How many of the validation users go to each expert; without any states, all of them are one to the router."""
        if self._routes and self.has_state.any():
            chosen = self.experts_of([self.histories.before(user, "valid").tolist() for user in self._asked_users()])
            experts.log_shares(when, chosen, self.recipe.experts, self.balance_weight)

    def report(self, folder: Path) -> list[str]:
        """Which test users go to which expert, by what they mostly consume."""
        if not self._routes:
            return []
        users = self.histories.evaluated("test").tolist()
        histories = [self.histories.before(user, "test").tolist() for user in users]
        chosen = dict(zip((self.histories.user_ids[user] for user in users), self.experts_of(histories), strict=True))
        label = f"most frequent {self.group_field or 'history length'}"
        return [experts.report(folder, chosen, [self._group(history) for history in histories], self.recipe.experts, label)]

    def _group(self, history: Sequence[int]) -> str:
        """What a user mostly consumes, by the category field; without one, how much."""
        if not self.group_field:
            return f"{2 ** (len(history).bit_length() - 1)} items and more" if history else "no item"
        words = Counter(word for item in history for word in self.domain.items.fields[self.group_field][item].split())
        return words.most_common(1)[0][0] if words else "none"


def _named(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _check(config: Any) -> None:
    """Refuse what does not fit together before anything is trained."""
    states = config["cf_states"] or "none"  # a configuration reads the word as None
    for key, value, known in (("pooling", config["pooling"], POOLINGS), ("cf_states", states, STATES)):
        if value not in known:
            raise ValueError(f"{key}: {value!r} is unknown; choose {', '.join(known)}")
    if not config["prefix"] and config["pooling"] != "suffix":
        raise ValueError(f"prefix: False leaves nothing to train with pooling: {config['pooling']}; choose pooling: suffix")
    for key in ("null_share", "single_share"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}: {config[key]} is not a share from 0 to below 1")
    if config["warmup_epochs"] and not (config["prefix"] and config["m_former"]):
        raise ValueError("warmup_epochs: there is no M-Former to warm up without prefix and m_former; give warmup_epochs: 0")
