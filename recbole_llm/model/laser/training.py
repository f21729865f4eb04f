"""Training of Laser's towers: the warm-up of the M-Former and the two phases of :mod:`recbole_llm.model.laser`.

Legend: B users, L prefix tokens, I items, M width of the M-Former, D of the LM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.costs.parts import FP32, Training, counted, fitting_tokens, shape_of, training_of
from recbole_llm.data import domains
from recbole_llm.data.domains import TrainingExample
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.forward import loss_scale
from recbole_llm.llm.micro_batches import bounded_memory
from recbole_llm.model.laser.blank_towers import BlankTowers
from recbole_llm.model.laser.m_former import WarmUp, load_balance
from recbole_llm.model.laser.towers import TowerReader, Towers
from recbole_llm.model.parts import Parts
from recbole_llm.settings import Settings
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import save_tensors
from recbole_llm.store.processes import current
from recbole_llm.store.random_state import preserved_random_state
from recbole_llm.store.stages import Stage, Work
from recbole_llm.training.loop import Epochs, Part, TrainingLoop, validations
from recbole_llm.training.schedule import Schedule

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
PHASES = ("warmup", "phase1", "phase2")
USER, ITEM, MATRIX = "user_tower.safetensors", "item_tower.safetensors", "item_matrix.safetensors"

Loss = Callable[[list[list[int]], list[int]], Iterable[Part]]
"""B histories and the items that follow them -> parts whose sum is the loss."""


@dataclass(frozen=True)
class LaserConfig(Settings):
    """Training settings; see ``properties/model/Laser.yaml``."""

    temperature: float
    load_balance_weight: float
    null_share: float
    single_share: float
    train_samples: int | None
    laser_batch_size: int
    weight_decay: float
    schedule: Schedule
    laser_optimizer: str
    max_grad_norm: float | None
    refresh_steps: int | None
    laser_patience: int
    epochs: Mapping[str, int]
    learning_rates: Mapping[str, float]

    def __post_init__(self) -> None:
        for key in ("null_share", "single_share"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not in [0, 1)")
        if self.laser_optimizer not in OPTIMIZERS:
            raise ValueError(f"laser_optimizer: {self.laser_optimizer!r} is neither {' nor '.join(OPTIMIZERS)}")

    @classmethod
    def of(cls, config: Any, **given: Any) -> LaserConfig:
        """The settings of a configuration."""
        epochs = {phase: config[f"{phase}_epochs"] for phase in PHASES}
        rates = {phase: config[f"{phase}_learning_rate"] for phase in PHASES}
        return super().of(config, schedule=Schedule.of(config), epochs=epochs, learning_rates=rates, **given)

    def of_phase(self, phase: str) -> dict[str, Any]:
        """JSON-serializable settings of a phase; the warm-up has another loss and no early stopping."""
        apart = ["epochs", "learning_rates"]
        if phase == "warmup":
            apart += ["temperature", "null_share", "single_share", "refresh_steps", "laser_patience"]
        values = {key: value for key, value in self.as_dict().items() if key not in apart}
        return values | {"epochs": self.epochs[phase], "learning_rate": self.learning_rates[phase]}


def load_towers(reader: TowerReader, folder: Path) -> Towers:
    """The towers and the item matrix that phase 1 wrote into ``folder``."""
    with preserved_random_state():  # the initial weights are replaced
        towers = reader.towers()
    towers.user.load_state_dict(load_file(folder / USER))
    towers.item.load_state_dict(load_file(folder / ITEM))
    towers.item_matrix = load_file(folder / MATRIX)["items"].to(reader.cf.device)
    return towers


@dataclass(frozen=True)
class TowerTraining:
    """Trains the towers of one reader on the training split of a domain.

    Attributes:
        validate: (name of the phase, towers in eval mode, with their item matrix) -> score, bigger is better; None without
            validation users.
    """

    config: LaserConfig
    parts: Parts
    reader: TowerReader
    validate: Callable[[str, Towers], float] | None

    def warm_up(self, work: Work) -> None:
        """Contrastive training of the M-Former; see :class:`WarmUp`."""
        reader, towers = self.reader, self.reader.towers()
        m_former = towers.user.m_former
        assert m_former is not None
        heads = WarmUp(reader.config.former.hidden_size, reader.width).to(reader.cf.device)

        def loss(histories: Sequence[Sequence[int]]) -> Tensor:
            queried, routing = m_former.query(*reader.states(histories))  # [B, L, M]
            text = self._texts(histories).to(queried.device)  # [B, D]
            return heads(queried, text) + self.config.load_balance_weight * load_balance(routing)

        trained = nn.ModuleDict({"m_former": m_former, "heads": heads})
        self._fit("warmup", trained, towers, lambda tokens: lambda histories, _: [partial(loss, histories)], work)
        save_tensors(work.out / USER, towers.user.state_dict())

    def phase1(self, warm_up: Stage | None, work: Work) -> None:
        """Train the user tower; each epoch starts with a copy of its weights to the item tower, and a new item matrix."""
        reader, towers = self.reader, self.reader.towers()
        if warm_up is not None:
            towers.user.load_state_dict(load_file(work.folder(warm_up) / USER))
        towers.refresh()
        # the item tower is not optimized, but belongs to the pair that is selected and checkpointed
        before = ("user.m_former.",) if warm_up is not None else ()
        self._fit("phase1", towers, towers, partial(self.loss, towers), work, validate=True, refresh=True, before=before)
        matrix = reader.encode_items(towers.item)  # of the selected pair
        save_tensors(work.out / USER, towers.user.state_dict())
        save_tensors(work.out / ITEM, towers.item.state_dict())
        save_tensors(work.out / MATRIX, {"items": matrix})

    def phase2(self, phase1: Stage, work: Work) -> None:
        """Train the user tower with the item matrix of phase 1."""
        towers = load_towers(self.reader, work.folder(phase1))
        trained = nn.ModuleDict({"user": towers.user})
        before = ("user.",) if self.config.epochs["phase1"] else ()
        self._fit("phase2", trained, towers, partial(self.loss, towers), work, validate=True, before=before)
        save_tensors(work.out / USER, towers.user.state_dict())

    def loss(self, towers: Towers, tokens: int) -> Loss:
        """Cross-entropy over the cosines with all items but new ones, plus load balancing; no gradient through the item matrix.

        Users are computed in parts of ``tokens`` padded tokens. The parts add up to the loss of the batch: the item matrix is the
        same for all, and the share of each expert in the load balance is that of the batch.
        """
        config, reader, tower = self.config, self.reader, towers.user
        new = torch.tensor(sorted(self.parts.histories.scenario.new), dtype=torch.long)  # which training does not know

        def loss(histories: Sequence[Sequence[int]], targets: Sequence[int]) -> Iterator[Part]:
            if config.single_share:  # items are histories of length one
                single = torch.rand(len(histories)) < config.single_share  # [B]
                histories = [history[-1:] if cut else history for history, cut in zip(histories, single, strict=True)]
            states, known = reader.states(histories)  # [B, N, H], [B, N]
            if config.null_share:  # trains the null token
                known = known & (torch.rand(len(known), 1).to(known.device) >= config.null_share)
            batch = None
            if tower.m_former is not None and reader.config.former.experts > 1:
                with torch.no_grad():
                    batch = tower.m_former.routing(states, known)[1]
            items = reader.item_matrix(towers)[1:]  # [I - 1, D], without the padding item

            def of(part: list[int]) -> Tensor:
                users, routing = reader.embed(tower, [histories[i] for i in part], (states[part], known[part]))  # [b, D]
                logits = users @ items.to(users.device).T / config.temperature  # [b, I - 1]
                if len(new):
                    logits = logits.index_fill(1, new.to(logits.device) - 1, -torch.inf)
                own = torch.tensor([targets[i] - 1 for i in part], device=logits.device)  # [b]
                found = F.cross_entropy(logits, own, reduction="sum") / len(histories)
                if routing is not None and batch is not None:
                    found = found + config.load_balance_weight * load_balance(routing, batch)
                return found

            for part in reader.batches(histories, tokens, current().size):
                yield partial(of, part)

        return loss

    def _fit(
        self,
        phase: str,
        trained: nn.Module,
        towers: Towers,
        loss: Callable[[int], Loss],
        work: Work,
        *,
        validate: bool = False,
        refresh: bool = False,
        before: tuple[str, ...] = (),
    ) -> None:
        """Train on (history, next item) pairs of the training split and restore the best weights.

        ``loss`` makes the loss from the padded tokens of a part. With ``refresh``, the item matrix is recomputed every
        ``refresh_steps`` steps; without, the best weights may be the initial ones.
        """
        config, parts, check = self.config, self.parts, self.validate if validate else None
        score = None if check is None else lambda: check(phase, towers.eval())
        rows, order, total, every = self._schedule(phase)
        if not total:
            return

        parameters = dict(trained.named_parameters())
        moved = [parameter for parameter in parameters.values() if parameter.requires_grad]
        optimizer = OPTIMIZERS[config.laser_optimizer](moved, lr=config.learning_rates[phase], weight_decay=config.weight_decay)
        with bounded_memory(self.reader.causal.model, parts.options, work.scratch) as tokens:
            step_loss = self._steps(towers, loss(tokens), rows, order, every if refresh else 0)
            loop = TrainingLoop(
                name=phase,
                trained_before=before,
                parameters=parameters,
                optimizer=optimizer,
                scheduler=config.schedule.build(optimizer, total),
                loss=step_loss,
                total_steps=total,
                clip_grad_norm=config.max_grad_norm,
                validate=score,
                eval_every=every,
                patience=config.laser_patience,
                folder=work.scratch / "loop",
                options=parts.options,
                learning_rate_key=f"{phase}_learning_rate",
                loss_scale=loss_scale(self.reader.causal.model),
            )
            if score and not refresh:
                loop.state.best_score = score()
                loop.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            loop.run()

    def _schedule(self, phase: str) -> tuple[list[TrainingExample], Epochs, int, int]:
        """The examples, their order, the number of steps, and that between two validations."""
        config, parts = self.config, self.parts
        rows = domains.training_examples([parts.domain], samples=config.train_samples, seed=parts.seed)
        order = Epochs(len(rows), config.laser_batch_size, parts.seed)
        return rows, order, order.steps * config.epochs[phase], config.refresh_steps or order.steps

    def cost(self, phase: str, outline: Outline, parameters: int, validate: Callable[[Any], Any]) -> Cost:
        """The cost of a phase on a blank reader.

        Args:
            parameters: number of parameters that it trains.
            validate: one validation of blank towers, without their item matrix.
        """
        reader, parts, shape = self.reader, self.parts, shape_of(outline)
        rows, order, total, every = self._schedule(phase)
        if not total:
            return Cost(samples=len(rows), steps=0)
        towers = BlankTowers(reader, len(parts.domain.items.names))
        through = training_of(outline, shape, parts.options)
        tokens = fitting_tokens(outline, shape, parts.options, through)
        warm = phase == "warmup"
        loss = (lambda histories, _: [partial(self._texts, histories)]) if warm else self.loss(towers, tokens)
        of_step = self._steps(towers, loss, rows, order, 0)
        unchecked = warm or self.validate is None
        checks = 0 if unchecked else validations(total, every) + (phase == "phase2")  # phase 2 may keep the weights of phase 1
        training = Training(
            samples=len(rows),
            steps=total,
            loss=lambda step: deque((part() for part in of_step(step)), maxlen=0),
            parameters=parameters,
            validations=checks,
            validate=None if unchecked else lambda: validate(towers),
        )
        found = training.cost(shape, through, adapter=0)
        if phase == "phase1":  # the item matrix of each refresh, and that of the selected pair
            matrix = counted(lambda _: reader.encode_items(towers.item), 1, gradients=False)[1]
            again = matrix.times(-(-total // every) + 1)
            found = replace(found, read=found.read + again, read_flops=(found.read_flops or 0) + shape.flops(again))
        size = {} if warm else {"item matrix": len(parts.domain.items.names) * shape.width * FP32}
        return replace(found, memory={**found.memory, **size}, exact=found.exact and not self.config.single_share)

    @torch.no_grad()
    def _texts(self, histories: Sequence[Sequence[int]]) -> Tensor:
        return self.reader.text_vectors(histories)

    def _steps(
        self, towers: Towers, loss: Loss, rows: Sequence[TrainingExample], order: Epochs, refresh: int
    ) -> Callable[[int], Iterable[Part]]:
        """The loss by step; the towers are refreshed every ``refresh`` steps, if that is not 0."""
        known = self.parts.domain.histories

        def of_step(step: int) -> Iterable[Part]:
            if refresh and step % refresh == 0:
                towers.refresh()
            towers.train()
            pairs = [(known[row.user], row.end) for row in (rows[i] for i in order[step])]
            return loss([history[:end].tolist() for history, end in pairs], [int(history[end]) for history, end in pairs])

        return of_step
