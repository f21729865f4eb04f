"""A classical RecBole model as a frozen, kept part of a run: the retriever whose top N an LLM re-ranks.

Any RecBole model with a full ranking will do (``retriever: SASRec``); it is trained once, as a stage, by the same trainer that
would train it as a baseline, on the same training split, and stopped by RecBole's own full ranking of the validation items.
"""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_llm.data.dataset import create_dataset, data_preparation
from recbole_llm.training.stages import Stage, StageKeeper

logger = getLogger()


class Retriever:
    """A trained RecBole model that ranks the whole catalogue.

    Args:
        config: of the run it serves; ``retriever`` names the model, ``retriever_config`` holds keys for it.
        keeper: where its stage is kept.
    """

    def __init__(self, config: Any, keeper: StageKeeper):
        self.config = config.for_model(config["retriever"], {**config["retriever_config"], "eval_args": {"mode": "full"}})
        data = create_dataset(self.config)
        self.histories = data.histories
        self.loaders = data_preparation(self.config, data)
        self.model = self.config.model_class(self.config, self.loaders[0]._dataset).to(self.config["device"])
        stage = self._stage()
        self.identity = stage.fingerprint
        self.model.load_state_dict(load_file(keeper.run(stage) / "model.safetensors"))
        self.model.requires_grad_(False).eval()

    def _stage(self) -> Stage:
        depends = {"config": self.config.fingerprint, "histories": self.histories.fingerprint}
        return Stage(f"retriever-{self.config['model']}", depends, self._train)

    def _train(self, out: Path, scratch: Path) -> None:
        from recbole_llm.registry import get_trainer

        self.config["checkpoint_dir"] = str(scratch)
        trainer = get_trainer(self.config)(self.config, self.model)
        train, valid, _ = self.loaders
        score, _ = trainer.fit(train, valid, show_progress=self.config["show_progress"])
        trainer.load_best()
        logger.info(f"retriever {self.config['model']}: best validation {self.config['valid_metric']} {score:.4f}")
        save_file({name: t.contiguous().clone() for name, t in self.model.state_dict().items()}, out / "model.safetensors")

    @torch.no_grad()
    def scores(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue for a RecBole interaction."""
        return self.model.full_sort_predict(interaction.to(self.config["device"])).view(len(interaction), -1).clone()

    @torch.no_grad()
    def top(self, phase: str, number: int) -> dict[int, list[int]]:
        """Internal user id -> its ``number`` best items that are not in its history, best first."""
        loader = self.loaders[1 if phase == "valid" else 2]
        found: dict[int, list[int]] = {}
        for interaction, *_ in loader:
            users = interaction[self.config["USER_ID_FIELD"]].tolist()
            scores = self.scores(interaction)  # [B, I]
            scores[:, 0] = -torch.inf
            for row, user in zip(scores, users, strict=True):
                row[torch.from_numpy(self.histories.before(user, phase)).to(row.device)] = -torch.inf
            found.update(zip(users, scores.topk(number).indices.tolist(), strict=True))
        return found
