"""The gradients of a step are those of one process, whatever the number of processes that share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from several import Pretended
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.classical.shared import SharedTraining
from recbole_llm.classical.train_modes import trainer_class
from recbole_llm.llm.packing import shared_batches, token_batches
from recbole_llm.store import processes
from recbole_llm.store.contexts import holding
from recbole_llm.training.loop import LoopOptions, TrainingLoop

SMALL_LM = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 400, "batch_tokens": 256, "vocab_size": 300}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}


def gradients(loop: TrainingLoop, size: int) -> tuple[dict[str, Tensor], list[int]]:
    """The gradients of a step, added over so many processes, and the number of parts that each of them has computed."""
    total, parts = {name: torch.zeros_like(parameter) for name, parameter in loop.parameters.items()}, []
    for rank in range(size):
        loop.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # what a loss itself draws, all draw alike
        with holding(processes._current, Pretended(rank, size)):
            own = [part for number, part in enumerate(loop.loss(0)) if processes.current().owns(number)]
            for part in own:
                part().backward()
        parts.append(len(own))
        for name, parameter in loop.parameters.items():
            total[name] += 0 if parameter.grad is None else parameter.grad
    loop.optimizer.zero_grad(set_to_none=True)
    return total, parts


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients are equal within 1e-5 of the largest: some are zero but for rounding, such as those of the biases of keys."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * largest, name


def assert_shared(loop: TrainingLoop, *, divided: bool = True) -> None:
    """Two and three processes have the gradients of one, and each has a part."""
    expected, _ = gradients(loop, 1)
    for size in (2, 3):
        found, parts = gradients(loop, size)
        assert all(parts) == divided
        assert_close(found, expected)


LOOPS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "TALLRec": ({"llm_path": "builtin", "builtin_lm": SMALL_LM, "lora_dropout": 0.0}, {"builtin-lm": True, "ingredient": True}),
    "ALLMRec": ({"tune_text_encoder": True}, {"alignment": True, "projection": True}),
    "Laser": (
        {"warmup_epochs": 1, "m_former_dropout": 0.0, "single_share": 0.3},
        {"warmup": False, "phase1": True, "phase2": True},  # the loss of the warm-up compares all rows of a batch
    ),
}


@pytest.mark.parametrize("model", [pytest.param(name, marks=pytest.mark.slow) if name != "TALLRec" else name for name in LOOPS])
def test_the_gradients_of_every_kind_of_stage_are_those_of_one_process(
    model: str, settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, expected = LOOPS[model]
    made, run, seen = assemble(model, settings, **changes), TrainingLoop.run, {}

    def checked(loop: TrainingLoop) -> Any:
        seen[loop.name] = expected[loop.name]
        assert_shared(loop, divided=expected[loop.name])
        loop.total_steps = 1
        return run(loop)

    monkeypatch.setattr(TrainingLoop, "run", checked)
    made.trainer.cache.run(*made.stages)
    assert seen == expected


@pytest.mark.parametrize(
    ("model", "changes"),
    [("SASRec", NO_DROPOUT), ("GRU4Rec", {"loss_type": "BPR", "dropout_prob": 0.0}), ("BERT4Rec", NO_DROPOUT)],
    ids=["SASRec", "GRU4Rec-BPR", "BERT4Rec"],
)
def test_the_gradients_of_whole_sequences_are_those_of_one_process(
    model: str, changes: dict[str, Any], settings: dict[str, Any], assemble: Any
) -> None:
    given = {key: settings[key] for key in ("data_path", "checkpoint_dir", "train_batch_size")}
    made = assemble(model, given, train_mode="sequence", **changes)
    loader, loss = trainer_class(made.config).batches(made.config, made.model, made.train)
    batch = next(iter(loader))
    made.model.train()
    assert isinstance(made.trainer, SharedTraining)

    def step(size: int) -> tuple[dict[str, Tensor], float]:
        made.model.zero_grad(set_to_none=True)
        total = 0.0
        for rank in range(size):
            if size == 1:
                value = loss(batch)
                value.backward()
            else:
                value = made.trainer._shared(Pretended(rank, size), loss, batch)
                value.backward()  # as RecBole's trainer does: it changes nothing
            total += value.item()
        return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}, total

    expected, total = step(1)
    for size in (2, 3, len(batch) + 1):
        found, value = step(size)
        assert value == pytest.approx(total, rel=1e-5)
        assert_close(found, expected)


def test_dropout_is_drawn_by_part_and_not_by_process(tmp_path: Any) -> None:
    """So a step is the same however its parts are dealt out, and whoever resumes it."""
    torch.manual_seed(0)
    layer, data = nn.Linear(3, 1), torch.rand(4, 2, 3)
    found = []
    for size in (2, 4):
        layer.zero_grad()
        for rank in range(size):
            pretended = Pretended(rank, size)
            for number in filter(pretended.owns, range(4)):
                with pretended.randomness("linear", 0, number):
                    F.dropout(layer(data[number]), 0.5).sum().backward()
        found.append(layer.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_only_the_first_process_writes_checkpoints(tmp_path: Any) -> None:
    def loop(folder: Any) -> TrainingLoop:
        parameter = nn.Parameter(torch.ones(1))
        return TrainingLoop(
            name="one",
            parameters={"p": parameter},
            optimizer=torch.optim.SGD([parameter], lr=0.1),
            loss=lambda _: [lambda: parameter.square().sum()],
            total_steps=2,
            folder=folder,
            options=LoopOptions(save_every=0, show_progress=False),
        )

    for rank in range(2):
        with holding(processes._current, Pretended(rank, 2)), pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes.dist, "broadcast", lambda tensor, owner: None)
            loop(tmp_path / str(rank)).run()
    assert (tmp_path / "0" / "step-2").is_dir() and not (tmp_path / "1").exists()


@pytest.mark.parametrize("number", [1, 2, 3, 20])
def test_each_process_gets_about_as_many_rows_and_every_row_once(number: int) -> None:
    lengths = [7, 30, 12, 12, 5, 9, 44, 3, 8, 21, 16]
    batches = shared_batches(lengths, 50, number)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 50 for batch in batches)
    if number == 1:
        assert batches == token_batches(lengths, [0] * len(lengths), 50, padding=0.1, least=6)
    if number <= 3:
        rows = [sum(map(len, batches[rank::number])) for rank in range(number)]
        assert max(rows) - min(rows) <= 2
