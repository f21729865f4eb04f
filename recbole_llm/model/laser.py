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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data import domains
from recbole_llm.data.items import text_fields
from recbole_llm.data.prompts import PromptSettings
from recbole_llm.evaluation.recommender import Variant
from recbole_llm.model import assembly, experts
from recbole_llm.model.encoder import LLMEncoder
from recbole_llm.model.m_former import WarmUp, load_balance
from recbole_llm.model.parts import histories_of
from recbole_llm.model.towers import TowerConfig, TowerReader, Towers
from recbole_llm.store.files import fingerprint, preserved_random_state, save_tensors
from recbole_llm.store.stages import Folders, Stage, StageCache, Work
from recbole_llm.training.loop import Epochs, TrainingLoop, cosine_with_warmup

if TYPE_CHECKING:
    from recbole_llm.data.candidates import CandidateSet

PHASES = ("warmup", "phase1", "phase2")


@dataclass(frozen=True)
class LaserConfig:
    """How the towers are trained: see ``properties/model/Laser.yaml``."""

    temperature: float
    load_balance_weight: float
    null_share: float
    single_share: float
    train_samples: int | None
    laser_batch_size: int
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float | None
    refresh_steps: int | None
    laser_patience: int
    epochs: Mapping[str, int]
    learning_rates: Mapping[str, float]

    def __post_init__(self) -> None:
        for key in ("null_share", "single_share"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not a share from 0 to below 1")

    @classmethod
    def of(cls, config: Any) -> LaserConfig:
        """The settings of a configuration."""
        names = [name for name in cls.__dataclass_fields__ if name not in ("epochs", "learning_rates")]
        return cls(
            **{name: config[name] for name in names},
            epochs={phase: config[f"{phase}_epochs"] for phase in PHASES},
            learning_rates={phase: config[f"{phase}_learning_rate"] for phase in PHASES},
        )

    def of_phase(self, phase: str) -> dict[str, Any]:
        """JSON-able values that a phase depends on; what stops it stops no warm-up."""
        values = {key: value for key, value in asdict(self).items() if key not in ("epochs", "learning_rates")}
        return values | {"epochs": self.epochs[phase], "learning_rate": self.learning_rates[phase]}


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
        self.init_run, self.transfer_states = config.init_run, config["transfer_states"]
        if self.init_run:
            _ = self._run_folders  # refused now where they are gone, not after a training
        self.batch_tokens = config["score_batch_tokens"]
        self.group_field = config["category_field"]

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self, candidates: Mapping[str, CandidateSet]) -> Sequence[Stage]:
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
        if config.epochs["warmup"]:
            inputs = (Stage("m-former", reads | {"training": config.of_phase("warmup")}, self._warm_up, inputs), *inputs)
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

    def _warm_up(self, work: Work) -> None:
        """The M-Former alone, by contrast of behaviour and text."""
        reader = self._reader(work)
        towers, config = reader.towers(), self.training_config
        m_former = towers.user.m_former
        assert m_former is not None
        heads = WarmUp(self.tower_config.former.hidden_size, reader.width).to(self.cf.device)

        def loss(histories: list[list[int]], _: list[int]) -> Tensor:
            queried, routing = m_former.query(*reader.states(histories))  # [B, L, M]
            with torch.no_grad():
                text = reader.text_vectors(histories).to(queried.device)  # [B, D]
            return heads(queried, text) + config.load_balance_weight * load_balance(routing)

        trained = nn.ModuleDict({"m_former": m_former, "heads": heads})
        self._fit("warmup", trained, loss, work, train=towers)
        save_tensors(work.out / "user_tower.safetensors", towers.user.state_dict())

    def _phase1(self, work: Work) -> None:
        """The item's tower gets the user's weights, and encodes the matrix anew, wherever an epoch begins."""
        reader = self._reader(work)
        towers = reader.towers()
        before = self.phase1.inputs[0]
        if before.name == "m-former":
            towers.user.load_state_dict(load_file(work.folder(before) / "user_tower.safetensors"))
        towers.refresh()
        # the optimiser moves nothing of the item's tower, but it is half of the pair that is saved and chosen
        self._fit("phase1", towers, self._loss(reader, towers), work, reader=reader, train=towers, refresh=True)
        towers.item_matrix = reader.encode_items(towers.item)  # that of the pair which was chosen
        save_tensors(work.out / "user_tower.safetensors", towers.user.state_dict())
        save_tensors(work.out / "item_tower.safetensors", towers.item.state_dict())
        save_tensors(work.out / "item_matrix.safetensors", {"items": towers.item_matrix})

    def _phase2(self, work: Work) -> None:
        """The user's tower against the item matrix of phase 1."""
        reader = self._reader(work)
        towers = self._trained(reader, work.folder(self.phase1))
        trained = nn.ModuleDict({"user": towers.user})
        self._fit("phase2", trained, self._loss(reader, towers), work, reader=reader, train=towers)
        save_tensors(work.out / "user_tower.safetensors", towers.user.state_dict())

    def _trained(self, reader: TowerReader, folder: Path) -> Towers:
        """Both towers and the item matrix of phase 1."""
        with preserved_random_state():  # their weights are read, so that drawing them has to move nothing
            towers = reader.towers()
        towers.user.load_state_dict(load_file(folder / "user_tower.safetensors"))
        towers.item.load_state_dict(load_file(folder / "item_tower.safetensors"))
        towers.item_matrix = load_file(folder / "item_matrix.safetensors")["items"].to(self.cf.device)
        return towers

    def _loss(self, reader: TowerReader, towers: Towers) -> Callable[[list[list[int]], list[int]], Tensor]:
        config = self.training_config

        def loss(histories: Sequence[Sequence[int]], targets: Sequence[int]) -> Tensor:
            """Loss of B histories and the items that follow them: a scalar."""
            if config.single_share:  # an item is a history of one: the tower has to read such histories
                single = torch.rand(len(histories)) < config.single_share  # [B]
                histories = [history[-1:] if cut else history for history, cut in zip(histories, single, strict=True)]
            users, routing = reader.embed(towers.user, histories, config.null_share)  # [B, D]
            if towers.item_matrix is None:
                towers.item_matrix = reader.encode_items(towers.item)
            items = towers.item_matrix[1:].to(users.device)  # [I - 1, D], without the padding item
            logits = users @ items.T / config.temperature  # [B, I - 1]
            found = F.cross_entropy(logits, torch.tensor(targets, device=logits.device) - 1)
            if routing is None or self.tower_config.former.experts == 1:
                return found
            return found + config.load_balance_weight * load_balance(routing)

        return loss

    def _fit(
        self,
        phase: str,
        trained: nn.Module,
        loss: Callable[[list[list[int]], list[int]], Tensor],
        work: Work,
        *,
        train: Towers,
        reader: TowerReader | None = None,
        refresh: bool = False,
    ) -> None:
        """Train on (history, next item) pairs of the training split for the epochs of a phase; the best weights are the result.

        With a ``reader`` the towers are validated. With ``refresh`` the item matrix is renewed every ``refresh_steps`` steps;
        without, what there was before the first step is a candidate for the best weights, too.
        """
        config, parts = self.training_config, self.parts
        rows = domains.training_examples([parts.domain], samples=config.train_samples, seed=parts.seed)
        order = Epochs(len(rows), config.laser_batch_size, parts.seed)
        total, every = order.steps * config.epochs[phase], config.refresh_steps or order.steps
        if not total:
            return

        def step_loss(step: int) -> Tensor:
            if refresh and step % every == 0:
                train.refresh()
            train.train()
            chosen = [rows[i] for i in order[step]]
            histories = [parts.domain.histories[row.user] for row in chosen]
            pairs = list(zip(histories, chosen, strict=True))
            return loss([h[: row.end].tolist() for h, row in pairs], [int(h[row.end]) for h, row in pairs])

        def score() -> float:
            assert reader is not None
            train.eval()
            self._log_experts(phase, reader, train)
            if train.item_matrix is None:
                train.item_matrix = reader.encode_items(train.item)
            return self.valid_score(lambda histories: reader.encode(train.user, histories), train.item_matrix)

        parameters = dict(trained.named_parameters())
        moved = [parameter for parameter in parameters.values() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(moved, lr=config.learning_rates[phase], weight_decay=config.weight_decay)
        loop = TrainingLoop(
            name=phase,
            parameters=parameters,
            optimizer=optimizer,
            scheduler=cosine_with_warmup(optimizer, total, config.warmup_ratio),
            loss=step_loss,
            total_steps=total,
            clip_grad_norm=config.max_grad_norm,
            validate=score if reader else None,
            eval_every=every,
            patience=config.laser_patience,
            folder=work.scratch / "loop",
            options=parts.options,
            learning_rate_key=f"{phase}_learning_rate",
        )
        if reader and not refresh:
            loop.state.best_score = score()
            loop.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        loop.run()

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
            towers.item.load_state_dict(load_file(items / "item_tower.safetensors"))
            towers.user.load_state_dict(load_file(users / "user_tower.safetensors"))
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
        save_tensors(work.out / "item_matrix.safetensors", {"items": reader.encode_items(self._of_run(reader).item)})

    # -- the trained model ---------------------------------------------------------------------------------------------

    def load(self, cache: StageCache) -> None:
        self.reader = self._reader(cache)
        if self.init_run:
            self.towers = self._of_run(self.reader).eval()
            matrix = load_file(cache.folder(self.matrix_stage) / "item_matrix.safetensors")["items"]
            self.item_matrix = matrix.to(self.cf.device)
            return
        self.towers = self._trained(self.reader, cache.folder(self.phase1)).eval()
        assert self.towers.item_matrix is not None
        self.item_matrix = self.towers.item_matrix
        if self.training_config.epochs["phase2"]:
            self.towers.user.load_state_dict(load_file(cache.folder(self.phase2) / "user_tower.safetensors"))
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
