"""Laser: a trainable prefix and suffix around a frozen LLM, which maps users and items to vectors.

Zhang et al., "Laser: Parameter-Efficient LLM Bi-Tuning for Sequential Recommendation with Collaborative Information", 2024
(arXiv 2409.01605). One tower (``model/laser/towers.py``) encodes users and items; an item is a history of length one::

    score(u, i) = cos(h_u, h_i)                                                                               (eq. 3)

The loss is the cross-entropy over the cosines with all items (temperature 0.05), plus the router's load-balancing loss. The item
matrix has no gradient. Training has two phases:

1. the item matrix is recomputed at the start of each epoch; the result is the best pair (weights, item matrix) in validation;
2. the item matrix is fixed, and only the user tower is trained.

So a model has a user tower, and an item tower with the weights that encoded the matrix.

Legend: B users, L prefix tokens, I items, H width of the collaborative model, D of the LM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.costs.parts import FP32, blank, scoring_cost
from recbole_llm.data.items import text_fields
from recbole_llm.data.templates import PromptSettings
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.model import assembly, experts
from recbole_llm.model.encoder import LLMEncoder
from recbole_llm.model.laser.blank_towers import BlankReader, BlankTowers
from recbole_llm.model.laser.m_former import WarmUp
from recbole_llm.model.laser.towers import TowerConfig, TowerReader, Towers, warn_if_untrained
from recbole_llm.model.laser.training import ITEM, MATRIX, PHASES, USER, LaserConfig, TowerTraining, load_towers
from recbole_llm.model.parts import histories_of
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import fingerprint, save_tensors
from recbole_llm.store.stages import Folders, Stage, StageCache, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

_CODE = ("recbole_llm.model.laser.training", "recbole_llm.model.encoder")  # what the stages run besides this file


class Laser(LLMEncoder):
    """A frozen LLM with a trainable suffix and a prefix that the M-Former computes from collaborative states."""

    uses_cf_model = True
    supports_init_from = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.tower_config, self.training_config = TowerConfig.of(config), LaserConfig.of(config)
        if self.training_config.epochs["warmup"] and not (self.tower_config.prefix and self.tower_config.m_former):
            raise ValueError("warmup_epochs: there is no M-Former to warm up without prefix and m_former; give warmup_epochs: 0")
        prompts = PromptSettings.of(config)
        if prompts.shows_candidates or "{user}" in prompts.template:
            raise ValueError(
                f"prompt: {config['prompt']} has a slot for candidates or for a user's soft token, but Laser encodes a history "
                f"alone: {prompts.template!r}; choose laser or history"
            )
        self.parts = assembly.encoder_parts(config, dataset, prompts)
        items = self.parts.domain.items
        self.texts = items.described(text_fields(config, items))
        self.cf = CollaborativeModel.of(config, self.parts.histories, self.max_seq_length)
        # these raise before training if there are no such vectors or folders
        _ = self.cf.item_table if self.tower_config.states == "items" else self.cf.state_width
        self.init_run, self.transfer_states = config.init_run, config["transfer_states"]
        if self.init_run:
            _ = self._run_folders
        self.batch_tokens = config["score_batch_tokens"]
        self.group_field = items.columns.get("category_field")
        self.group_values = items.values(self.group_field) if self.group_field else []

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        if tokenizer := self.parts.backbone.tokenizer:
            self.parts.builder(tokenizer, names=self.texts)  # raises before training if the prompts do not suit the tokenizer
        inputs = (self.cf.stage, *self.parts.backbone.stages)
        reads = {
            "domain": self.parts.domain.fingerprint,
            "backbone": self.parts.backbone.fingerprint,
            "prompts": self.parts.prompts.as_dict(),
            "texts": fingerprint(self.texts),
            "tower": [self.tower_config.as_dict(), self._shares_the_space(self.cf.stage), self.max_seq_length],
            "seed": self.parts.seed,
        }
        stage = partial(Stage, code=_CODE, with_imports=False)
        costs = {phase: partial(self._cost, phase) for phase in PHASES} | {"matrix": self._matrix_cost}
        if self.init_run:
            self.matrix_stage = stage(
                "item-matrix", reads | {"run": self.init_run.record["stages"]}, self._transfer, inputs, cost=self._matrix_cost
            )
            return [self.matrix_stage]
        config, valid = self.training_config, asdict(self.parts.validation)
        self.m_former: Stage | None = None
        if config.epochs["warmup"]:
            warm_up = {**reads, "training": config.of_phase("warmup")}
            self.m_former = stage(
                "m-former", warm_up, lambda work: self._training(work).warm_up(work), inputs, cost=costs["warmup"]
            )
            inputs = (self.m_former, *inputs)
        first, second = ({**reads, "valid": valid, "training": config.of_phase(phase)} for phase in ("phase1", "phase2"))
        self.phase1 = stage(
            "phase-1", first, lambda work: self._training(work).phase1(self.m_former, work), inputs, cost=costs["phase1"]
        )
        self.phase2 = stage(
            "phase-2", second, lambda work: self._training(work).phase2(self.phase1, work), (self.phase1,), cost=costs["phase2"]
        )
        return [self.phase2 if config.epochs["phase2"] else self.phase1]

    def check(self) -> None:
        self.parts.check(names=self.texts, soft=self.tower_config.former.length + 1)

    def cost(self, batches: Sequence[tuple[Any, Tensor | None]], results: Folders, *, all_rows: bool) -> Cost:
        reader, outline = self._blank_reader(), self.backbone.outline
        towers = BlankTowers(reader, self.n_items)
        scored = [(lambda batch: reader.encode(towers.user, histories_of(self, batch)), 1)]
        found = scoring_cost(outline, scored, [batch for batch, _ in batches], users=sum(len(batch) for batch, _ in batches))
        return replace(found, memory={**found.memory, "item matrix": self.n_items * reader.width * FP32})

    def _cost(self, phase: str) -> Cost:
        reader = self._blank_reader()
        with torch.device("meta"):
            towers = Towers(self.tower_config, self._cf_width, reader.width)
        former = towers.user.m_former if phase == "warmup" else None
        trained = former if former is not None else towers.user
        heads = WarmUp(self.tower_config.former.hidden_size, reader.width) if former is not None else nn.Identity()
        parameters = sum(p.numel() for module in (trained, heads) for p in module.parameters() if p.requires_grad)
        histories = [self.parts.histories.before(user, "valid").tolist() for user in self.valid_users()]

        def validate(towers: BlankTowers) -> Tensor:
            return reader.encode(towers.user, histories)

        training = TowerTraining(self.training_config, self.parts, reader, (lambda *_: 0.0) if self.parts.validates else None)
        return training.cost(phase, self.backbone.outline, parameters, validate)

    def _matrix_cost(self) -> Cost:
        reader = self._blank_reader()
        towers = BlankTowers(reader, self.n_items)
        return scoring_cost(self.backbone.outline, [(lambda _: reader.encode_items(towers.item), 1)], [None], users=self.n_items)

    @property
    def _cf_width(self) -> int:
        return self.cf.item_table.size(1) if self.tower_config.states == "items" else self.cf.state_width

    def _blank_reader(self) -> BlankReader:
        causal = blank(self.backbone.outline)
        prompts = self.parts.builder(causal.tokenizer, names=self.texts)
        known = torch.zeros(self.n_items, dtype=torch.bool)
        return BlankReader(
            self.tower_config,
            causal,
            prompts,
            self.cf,
            known,
            longest=self.max_seq_length,
            batch_tokens=self.batch_tokens,
            show_progress=False,
        )

    def _reader(self, results: Folders) -> TowerReader:
        """Loads the frozen models."""
        self.cf.load(results.folder(self.cf.stage))
        causal, config = self.parts.backbone.load(results), self.tower_config
        enough = torch.from_numpy(self.parts.histories.train_counts >= max(1, config.cold_threshold))  # [I]
        return TowerReader(
            config,
            causal,
            self.parts.builder(causal.tokenizer, names=self.texts),
            self.cf,
            enough & (config.states != "none" and self._shares_the_space(self.cf.stage)),
            longest=self.max_seq_length,
            batch_tokens=self.batch_tokens,
            show_progress=self.parts.options.show_progress,
        )

    def _shares_the_space(self, stage: Stage) -> bool:
        """Whether the M-Former was trained on this collaborative model, or ``transfer_states`` allows another one."""
        if not self.init_run or self.transfer_states:
            return True
        return f"{stage.name}-{stage.fingerprint[:12]}" in self.init_run.record["stages"].values()

    def _training(self, work: Work) -> TowerTraining:
        reader = self._reader(work)

        def validate(phase: str, towers: Towers) -> float:
            self._log_experts(phase, reader, towers)
            return self.valid_score(lambda histories: reader.encode(towers.user, histories), reader.item_matrix(towers))

        return TowerTraining(self.training_config, self.parts, reader, validate if self.parts.validates else None)

    @property
    def _run_folders(self) -> tuple[Path, Path]:
        """The folders of another run's item tower and user tower."""
        last = "phase-2" if "phase-2" in self.init_run.record["stages"] else "phase-1"
        return self.init_run.stage("phase-1"), self.init_run.stage(last)

    def _of_run(self, reader: TowerReader) -> Towers:
        """The towers of another run."""
        (items, users), towers = self._run_folders, reader.towers()
        try:
            towers.item.load_state_dict(load_file(items / ITEM))
            towers.user.load_state_dict(load_file(users / USER))
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ValueError(
                f"init_from: the towers of {self.init_run.path} do not fit this run ({reason}); leave out what changes the "
                "M-Former, the backbone, or the width of the collaborative model (cf_config)"
            ) from error
        return towers

    def _transfer(self, work: Work) -> None:
        """Encode this catalogue with another run's item tower."""
        reader = self._reader(work)
        save_tensors(work.out / MATRIX, {"items": reader.encode_items(self._of_run(reader).item)})

    def load(self, cache: StageCache) -> None:
        self.reader = self._reader(cache)
        if self.init_run:
            self.towers = self._of_run(self.reader).eval()
            self.item_matrix = load_file(cache.folder(self.matrix_stage) / MATRIX)["items"].to(self.cf.device)
            return
        self.towers = load_towers(self.reader, cache.folder(self.phase1)).eval()
        self.item_matrix = self.reader.item_matrix(self.towers)
        name, last = "phase1", cache.folder(self.phase1)
        if self.training_config.epochs["phase2"]:
            name, last = "phase2", cache.folder(self.phase2)
            self.towers.user.load_state_dict(load_file(last / USER))
        items = self.n_items - 1 - len(self.parts.histories.scenario.new)
        warn_if_untrained(name, last, items, self.training_config.load_balance_weight * self._routes)
        self._log_experts(type(self).__name__, self.reader, self.towers)

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> Tensor:
        return self.reader.encode(self.towers.user, histories)

    def encode_items(self) -> Tensor:
        return self.reader.encode_items(self.towers.item)

    def encode_titles(self, titles: Sequence[str]) -> Tensor:
        """Vectors [N, D] of unit length of items that are not in the catalogue; their histories of length one have no state."""
        prompts = self.parts.builder(self.reader.causal.tokenizer, names=[*self.texts, *titles])
        reader = self.reader.with_new_items(prompts, len(titles))
        return reader.encode(self.towers.item, [[self.n_items + place] for place in range(len(titles))])

    def variants(self) -> dict[str, Variant]:
        def score(interaction: Any, candidates: Tensor) -> Tensor:
            users = interaction[self.USER_ID].tolist()
            return self.cf.candidate_scores(users, histories_of(self, interaction), candidates)  # [B, C]

        return {**super().variants(), self.cf.name: Variant(score, self.cf.scores)}

    @property
    def _routes(self) -> bool:
        config = self.tower_config
        return config.prefix and config.m_former and config.former.experts > 1

    def _log_experts(self, when: str, reader: TowerReader, towers: Towers) -> None:
        """Log the shares of validation users by expert; without states, the router cannot distinguish users."""
        if self._routes and reader.knows_states() and self.parts.validates:
            histories = [self.parts.histories.before(user, "valid").tolist() for user in self.valid_users()]
            chosen = reader.experts(towers.user, histories)
            experts.log_shares(when, chosen, self.tower_config.former.experts, self.training_config.load_balance_weight)

    def report(self, folder: Path) -> list[str]:
        """Write the experts of the test users, grouped by :meth:`_group`."""
        if not self._routes:
            return []
        known = self.parts.histories
        users = known.evaluated("test").tolist()
        histories = [known.before(user, "test").tolist() for user in users]
        chosen = self.reader.experts(self.towers.user, histories)
        by_token = dict(zip((known.user_ids[user] for user in users), chosen, strict=True))
        label = f"most frequent {self.group_field}" if self.group_field else "history length"
        groups = [self._group(history) for history in histories]
        return [experts.report(folder, by_token, groups, self.tower_config.former.experts, label)]

    def _group(self, history: Sequence[int]) -> str:
        """The most frequent category of a history; without a category field, its length rounded down to a power of two."""
        if not self.group_field:
            return f"{2 ** (len(history).bit_length() - 1)} or more items" if history else "no item"
        words = Counter(word for item in history for word in self.group_values[item])
        return words.most_common(1)[0][0] if words else "none"
