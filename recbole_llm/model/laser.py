"""Laser: a trainable prefix and suffix around a frozen LLM, which turns users and items into vectors.

Zhang et al., "Laser: Parameter-Efficient LLM Bi-Tuning for Sequential Recommendation with Collaborative Information", 2024
(arXiv 2409.01605). Users and items go through the same tower (``model/towers.py``), an item as a history of one::

    score(u, i) = cos(h_u, h_i)                                                                               (eq. 3)

The loss is a softmax over the cosines with all items (tau .05), plus the router's load balance. No gradient goes through the
item matrix, which two phases treat differently:

1. it is encoded anew at the start of every epoch; the pair (weights, item matrix) that validates best is the result;
2. it stays as it is, and the user's tower alone is trained on.

So a model has two towers: the user's, and the item's, whose weights are those that encoded the matrix.

Legend: B users, L prefix tokens, I items, H width of the collaborative model, D of the LM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data.items import text_fields
from recbole_llm.data.prompts import PromptSettings
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.model import assembly, experts
from recbole_llm.model.encoder import LLMEncoder
from recbole_llm.model.laser_training import ITEM, MATRIX, USER, LaserConfig, TowerTraining, load_towers
from recbole_llm.model.parts import histories_of
from recbole_llm.model.towers import TowerConfig, TowerReader, Towers
from recbole_llm.store.files import fingerprint, save_tensors
from recbole_llm.store.stages import Folders, Stage, StageCache, Work

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet


class Laser(LLMEncoder):
    """A frozen LLM between a prefix that the M-Former makes of collaborative states and a trainable suffix."""

    uses_cf_model = True
    supports_init_from = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.tower_config, self.training_config = TowerConfig.of(config), LaserConfig.of(config)
        if self.training_config.epochs["warmup"] and not (self.tower_config.prefix and self.tower_config.m_former):
            raise ValueError("warmup_epochs: there is no M-Former to warm up without prefix and m_former; give warmup_epochs: 0")
        prompts = PromptSettings.of(config, history_label=config["history_label"])
        self.parts = assembly.encoder_parts(config, dataset, prompts)
        self.texts = self.parts.domain.items.described(text_fields(config))
        self.cf = CollaborativeModel.of(config, self.parts.histories, self.max_seq_length)
        # a model without vectors that could be read is refused now, not after a training
        _ = self.cf.item_table if self.tower_config.states == "items" else self.cf.state_width
        self.init_run, self.transfer_states = config.init_run, config["transfer_states"]
        if self.init_run:
            _ = self._run_folders  # refused now where they are gone, not after a training
        self.batch_tokens = config["score_batch_tokens"]
        self.group_field = config["category_field"]

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
        if tokenizer := self.parts.backbone.tokenizer:
            self.parts.builder(tokenizer, names=self.texts)  # what does not fit it is refused before anything is trained
        inputs = (self.cf.stage, *self.parts.backbone.stages)
        reads = {
            "domain": self.parts.domain.fingerprint,
            "backbone": self.parts.backbone.fingerprint,
            "prompts": self.parts.prompts.as_dict(),
            "texts": fingerprint(self.texts),
            "tower": [self.tower_config.as_dict(), self._shares_the_space(self.cf.stage)],
            "seed": self.parts.seed,
        }
        if self.init_run:
            self.matrix_stage = Stage("item-matrix", reads | {"run": self.init_run.record["stages"]}, self._transfer, inputs)
            return [self.matrix_stage]
        config, valid = self.training_config, asdict(self.parts.validation)
        self.m_former: Stage | None = None
        if config.epochs["warmup"]:
            self.m_former = Stage("m-former", reads | {"training": config.of_phase("warmup")}, self._warm_up, inputs)
            inputs = (self.m_former, *inputs)
        training = {**reads, "valid": valid}
        self.phase1 = Stage("phase-1", training | {"training": config.of_phase("phase1")}, self._phase1, inputs)
        self.phase2 = Stage("phase-2", training | {"training": config.of_phase("phase2")}, self._phase2, (self.phase1,))
        return [self.phase2 if config.epochs["phase2"] else self.phase1]

    def _reader(self, results: Folders) -> TowerReader:
        """Everything frozen, loaded."""
        self.cf.load(results.folder(self.cf.stage))
        causal, config = self.parts.backbone.load(results), self.tower_config
        enough = torch.from_numpy(self.parts.histories.train_counts >= max(1, config.cold_threshold))  # [I]
        return TowerReader(
            config,
            causal,
            self.parts.builder(causal.tokenizer, names=self.texts),
            self.cf,
            enough & (config.states != "none" and self._shares_the_space(self.cf.stage)),
            batch_tokens=self.batch_tokens,
            show_progress=self.parts.options.show_progress,
        )

    def _shares_the_space(self, stage: Stage) -> bool:
        """Whether the M-Former was trained on this very collaborative model, or is asked to read another one's states."""
        if not self.init_run or self.transfer_states:
            return True
        return f"{stage.name}-{stage.fingerprint[:12]}" in self.init_run.record["stages"].values()

    def _training(self, work: Work) -> TowerTraining:
        reader = self._reader(work)

        def validate(phase: str, towers: Towers) -> float:
            assert towers.item_matrix is not None
            self._log_experts(phase, reader, towers)
            return self.valid_score(lambda histories: reader.encode(towers.user, histories), towers.item_matrix)

        return TowerTraining(self.training_config, self.parts, reader, validate)

    def _warm_up(self, work: Work) -> None:
        self._training(work).warm_up(work.out, work.scratch)

    def _phase1(self, work: Work) -> None:
        begin = work.folder(self.m_former) if self.m_former else None
        self._training(work).phase1(begin, work.out, work.scratch)

    def _phase2(self, work: Work) -> None:
        self._training(work).phase2(work.folder(self.phase1), work.out, work.scratch)

    # -- another run's towers ------------------------------------------------------------------------------------------

    @property
    def _run_folders(self) -> tuple[Path, Path]:
        """Where another run keeps the item's and the user's tower."""
        last = "phase-2" if "phase-2" in self.init_run.record["stages"] else "phase-1"
        return self.init_run.stage("phase-1"), self.init_run.stage(last)

    def _of_run(self, reader: TowerReader) -> Towers:
        """Both towers of another run."""
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
        """Another run's item tower reads this catalogue."""
        reader = self._reader(work)
        save_tensors(work.out / MATRIX, {"items": reader.encode_items(self._of_run(reader).item)})

    # -- the trained model ---------------------------------------------------------------------------------------------

    def load(self, cache: StageCache) -> None:
        self.reader = self._reader(cache)
        if self.init_run:
            self.towers = self._of_run(self.reader).eval()
            matrix = load_file(cache.folder(self.matrix_stage) / MATRIX)["items"]
            self.item_matrix = matrix.to(self.cf.device)
            return
        self.towers = load_towers(self.reader, cache.folder(self.phase1)).eval()
        assert self.towers.item_matrix is not None
        self.item_matrix = self.towers.item_matrix
        if self.training_config.epochs["phase2"]:
            self.towers.user.load_state_dict(load_file(cache.folder(self.phase2) / USER))
        self._log_experts(type(self).__name__, self.reader, self.towers)

    def encode_histories(self, histories: Sequence[Sequence[int]]) -> Tensor:
        return self.reader.encode(self.towers.user, histories)

    def encode_items(self) -> Tensor:
        return self.reader.encode_items(self.towers.item)

    def variants(self) -> dict[str, Variant]:
        def score(interaction: Any, candidates: Tensor) -> Tensor:
            users = interaction[self.USER_ID].tolist()
            return self.cf.candidate_scores(users, histories_of(self, interaction), candidates)  # [B, C]

        return {**super().variants(), self.cf.name: Variant(score, self.cf.scores)}

    # -- experts -------------------------------------------------------------------------------------------------------

    @property
    def _routes(self) -> bool:
        config = self.tower_config
        return config.prefix and config.m_former and config.former.experts > 1

    def _log_experts(self, when: str, reader: TowerReader, towers: Towers) -> None:
        """How many of the validation users go to each expert; without any states, all of them are one to the router."""
        if self._routes and reader.knows_states():
            histories = [self.parts.histories.before(user, "valid").tolist() for user in self.valid_users()]
            chosen = reader.experts(towers.user, histories)
            experts.log_shares(when, chosen, self.tower_config.former.experts, self.training_config.load_balance_weight)

    def report(self, folder: Path) -> list[str]:
        """Which test users go to which expert, by what they mostly consume."""
        if not self._routes:
            return []
        known = self.parts.histories
        users = known.evaluated("test").tolist()
        histories = [known.before(user, "test").tolist() for user in users]
        chosen = self.reader.experts(self.towers.user, histories)
        by_token = dict(zip((known.user_ids[user] for user in users), chosen, strict=True))
        label = f"most frequent {self.group_field or 'history length'}"
        groups = [self._group(history) for history in histories]
        return [experts.report(folder, by_token, groups, self.tower_config.former.experts, label)]

    def _group(self, history: Sequence[int]) -> str:
        """What a user mostly consumes, by the category field; without one, how much."""
        if not self.group_field:
            return f"{2 ** (len(history).bit_length() - 1)} items and more" if history else "no item"
        fields = self.parts.domain.items.fields[self.group_field]
        words = Counter(word for item in history for word in fields[item].split())
        return words.most_common(1)[0][0] if words else "none"
