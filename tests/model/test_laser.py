"""Laser: a frozen LM, two phases and two towers, the published loss, and what each setting changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.data import domains
from recbole_llm.model import laser
from recbole_llm.model.laser import Laser
from recbole_llm.training.loop import TrainingLoop

Made = SimpleNamespace
QUICK = {"train_samples": 16, "valid_users": 8, "phase1_epochs": 1, "phase2_epochs": 1}
BAD_PHASE2 = {"phase2_learning_rate": 3.0}  # so large that it only does harm


@pytest.fixture(scope="module")
def trained(module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``trained(**changes)``: a model with its stages, of which most are kept, and training rows; made once."""
    kept: dict[str, Made] = {}

    def trained(**changes: Any) -> Made:
        key = json.dumps(changes, sort_keys=True)
        if key not in kept:
            made = assemble("Laser", module_settings, **changes)
            made.lm_before = state(made.model.lm)
            made.model.run_stages()
            made.model.eval()
            made.batch = next(iter(made.train))[:9]
            kept[key] = made
        return kept[key]

    return trained


@pytest.fixture(scope="module")
def made(trained: Callable[..., Made]) -> Made:
    return trained()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def kept_tensors(model: Any, stage: str) -> dict[str, dict[str, Tensor]]:
    """What a stage has left, by file."""
    return {file.stem: load_file(file) for file in model.cache.folders[stage].glob("*.safetensors")}


def close(one: Tensor, other: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# -- frozen and trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"warmup_epochs": 1}])
def test_the_lm_is_byte_for_byte_the_same_after_all_phases(trained: Any, changes: dict[str, Any]) -> None:
    made = trained(**changes)
    assert equal(state(made.model.lm), made.lm_before)
    names = {name.split(".")[0] for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert names == {"tower"} and not any(p.requires_grad for p in made.model.cf.model.parameters())
    assert not made.model.train().lm.training and not made.model.item_tower.training
    made.model.eval()


def test_the_warm_up_is_where_phase_1_begins(trained: Any) -> None:
    warm = trained(warmup_epochs=1).model
    assert [*warm.cache.seconds] == ["cf-SASRec", "m-former", "phase-1", "phase-2"]
    begun, fresh = (trained(warmup_epochs=e, phase1_epochs=0, phase2_epochs=0).model for e in (1, 0))
    assert equal(state(begun.tower), kept_tensors(warm, "m-former")["user_tower"])
    changed = {name for name, tensor in state(fresh.tower).items() if not torch.equal(tensor, state(begun.tower)[name])}
    assert changed and not any(re.match(r"m_former\.project|suffix", name) for name in changed)


# -- loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.01, 5.0])
def test_the_loss_is_the_papers(made: Made, monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    """- log exp(cos / tau) / sum over the catalogue of exp(cos / tau), and lambda K sum f P."""
    model, targets = made.model, made.batch["item_id"].tolist()
    monkeypatch.setattr(model, "balance_weight", weight)
    histories = model._histories_of(made.batch)
    found = model.calculate_loss(made.batch)
    expected, chosen, probabilities = 0.0, [], []
    with torch.no_grad():
        items = model.encode_items()[1:]
        for history, target in zip(histories, targets, strict=True):
            user = model.encode_histories([history])[0]
            cosines = [torch.cosine_similarity(user, item, dim=0) for item in items]
            exponentials = torch.stack(cosines).div(0.05).exp()
            expected -= float((exponentials[target - 1] / exponentials.sum()).log()) / len(targets)
            states, _ = model.cf.sequence_states([history])
            for p in model.tower.m_former.router(states[0]).softmax(-1):
                probabilities.append(p)
                chosen.append(int(p.argmax()))
    mean = torch.stack(probabilities).mean(0)
    balance = 3 * sum(chosen.count(expert) / len(chosen) * float(mean[expert]) for expert in range(3))
    assert len(histories) == 9 and sum(map(len, histories)) == len(chosen)
    assert found.item() == pytest.approx(expected + weight * balance, abs=1e-3)


def test_no_gradient_goes_into_the_item_matrix_the_item_tower_or_the_lm(trained: Any) -> None:
    model, batch = trained(**QUICK).model, trained(**QUICK).batch
    for kept in (True, False):  # also where the loss is what encodes it
        if not kept:
            model.item_matrix = None
        model.zero_grad()
        model.calculate_loss(batch).backward()
        assert not model.item_matrix.requires_grad and model.item_matrix.grad is None
        reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == {"tower"}
        m_former = model.tower.m_former
        for parameter in (model.tower.suffix, m_former.router.weight, m_former.experts, m_former.project.weight):
            assert parameter.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("key", ["null_share", "single_share"])
def test_missing_states_and_single_items_are_drawn_in_training_alone(
    trained: Any, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    made = trained(**QUICK, m_former_dropout=0.0)
    model, losses = made.model, {}
    for share in (0.0, 0.6):
        monkeypatch.setattr(model, "null_share", 0.0)
        monkeypatch.setattr(model, "single_share", 0.0)
        monkeypatch.setattr(model, key, share)
        torch.manual_seed(0)
        losses[share] = [model.train(mode).calculate_loss(made.batch).item() for mode in (False, True)]
    model.eval()
    assert losses[0.0][0] == losses[0.0][1] == losses[0.6][0]
    assert abs(losses[0.6][1] - losses[0.6][0]) > 1e-4


@pytest.mark.parametrize(("share", "training"), [(0.5, True), (0.0, True), (0.5, False)])
def test_the_null_token_is_trained_on_the_share_of_the_histories_that_lose_their_states(
    trained: Any, monkeypatch: pytest.MonkeyPatch, share: float, training: bool
) -> None:
    model, routed = trained(**QUICK).model, []
    balance = laser.load_balance
    monkeypatch.setattr(model, "null_share", share)
    monkeypatch.setattr(laser, "load_balance", lambda routing: (routed.append(routing), balance(routing))[1])
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    model.train(training)._loss([[3, 1, 4]] * 40, [15] * 40)
    model._loss([[3, 1, 4]] * 40, [15] * 40).backward()
    reached = model.tower.m_former.null.grad.abs().max() > 0
    model.eval().zero_grad(set_to_none=True)
    first, second = (routing.seen.sum(1) for routing in routed)  # 3 states, or the null token alone
    assert {*first.tolist(), *second.tolist()} == ({1, 3} if training and share else {3})
    assert (10 < int((second == 1).sum()) < 30 and not torch.equal(first, second)) == reached == bool(training and share)


def test_a_single_item_is_the_last_of_its_history(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = trained(**QUICK).model, []
    embed = model._embed
    monkeypatch.setattr(model, "single_share", 0.5)
    monkeypatch.setattr(model, "_embed", lambda tower, rows, *rest: (read.extend(rows), embed(tower, rows, *rest))[1])
    torch.manual_seed(0)
    model.train()._loss([[3, 1, 4]] * 40, [15] * 40)
    model.eval()
    assert {*map(tuple, read)} == {(3, 1, 4), (4,)} and 10 < read.count([4]) < 30


# -- two phases --------------------------------------------------------------------------------------------------------


def test_the_item_matrix_is_what_the_item_tower_encodes_and_not_the_users(made: Made) -> None:
    model, catalogue = made.model, [[item] for item in range(1, 41)]
    close(model._encode(model.item_tower, catalogue), model.item_matrix[1:])
    assert (model.encode_histories(catalogue) - model.item_matrix[1:]).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"phase1_epochs": 0}, {"phase1_epochs": 0, "phase2_epochs": 0}])
def test_no_dropout_is_in_the_kept_item_matrix(trained: Any, changes: dict[str, Any]) -> None:
    model = trained(**{**QUICK, **changes}, m_former_dropout=0.5).model
    close(model.encode_items(), model.item_matrix)


def test_after_phase_1_the_item_tower_is_the_user_tower_as_it_was_before_the_epoch(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, validate = [], TrainingLoop._validate

    def spy(loop: TrainingLoop) -> None:
        validate(loop)
        seen.append([state(model.tower), state(model.item_tower), loop.state.best_step])

    monkeypatch.setattr(TrainingLoop, "_validate", spy)
    model = assemble("Laser", module_settings, phase2_epochs=0, phase1_epochs=3, laser_patience=0).model
    model.run_stages()
    assert len(seen) == 3 and not any(equal(*towers) for *towers, _ in seen)
    for (user, _, _), (_, item, _) in zip(seen, seen[1:], strict=False):
        assert equal(user, item)  # what the epoch before left
    best = seen[seen[-1][2] // 4 - 1]
    assert equal(state(model.tower), best[0]) and equal(state(model.item_tower), best[1])


def test_refresh_steps_renew_the_matrix_within_an_epoch(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, refresh = [], Laser._refresh
    monkeypatch.setattr(Laser, "_refresh", lambda model: (calls.append(1), refresh(model)))
    for steps, expected in ((None, 2), (3, 3)):  # of eight steps in two epochs
        calls.clear()
        assemble("Laser", module_settings, refresh_steps=steps, laser_patience=0, phase2_epochs=0).model.run_stages()
        assert len(calls) == expected + 1  # and once before the first step


def test_both_phases_stop_when_validations_gain_nothing_and_keep_the_best(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = assemble("Laser", module_settings, phase1_epochs=9, phase2_epochs=9, laser_patience=2).model, []
    told = iter([0.4, 0.5, 0.4, 0.3, 0.5, 0.4, 0.3])  # phase 2 validates what it begins with

    def score() -> float:
        seen.append((state(model.tower), state(model.item_tower)))
        return next(told)

    monkeypatch.setattr(model, "valid_score", score)
    model.run_stages()
    assert len(seen) == 7 and next(told, None) is None
    assert (equal(state(model.tower), seen[1][0]), equal(state(model.item_tower), seen[1][1])) == (True, True)


@pytest.mark.parametrize("changes", [{}, BAD_PHASE2])
def test_phase_2_leaves_the_items_alone_and_never_ends_below_phase_1(trained: Any, changes: dict[str, Any]) -> None:
    model, one = trained(**changes).model, trained(phase2_epochs=0).model
    left = kept_tensors(one, "phase-1")
    assert equal(state(model.item_tower), left["item_tower"]) and equal(state(one.item_tower), left["item_tower"])
    assert torch.equal(model.item_matrix, left["item_matrix"]["items"]) and torch.equal(one.item_matrix, model.item_matrix)
    assert model.valid_score() >= one.valid_score() > 0
    assert equal(state(model.tower), state(one.tower)) == (model.valid_score() == one.valid_score())
    if changes:  # harm is undone
        assert equal(state(model.tower), left["user_tower"])


def test_training_learns(trained: Any) -> None:
    fresh, learned = (trained(phase1_epochs=epochs, phase2_epochs=0, train_samples=80) for epochs in (0, 2))
    with torch.no_grad():
        assert learned.model.calculate_loss(learned.batch) < 0.9 * fresh.model.calculate_loss(learned.batch)


def test_a_phases_optimiser_is_as_its_settings_say_and_the_warm_up_balances_too(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"weight_decay": 0.07, "max_grad_norm": 0.3, "warmup_ratio": 0.5, "load_balance_weight": 5.0}
    rates = {"warmup_learning_rate": 1e-3, "phase1_learning_rate": 2e-3, "phase2_learning_rate": 3e-3}
    model, found, balance = assemble("Laser", settings, **QUICK, **asked, **rates, warmup_epochs=1).model, {}, []

    def spy(loop: TrainingLoop) -> Any:
        (group,) = loop.optimizer.param_groups
        found[loop.name] = group["weight_decay"], loop.clip_grad_norm, group["initial_lr"], loop.scheduler.get_last_lr()
        if loop.name == "warmup":
            for model.balance_weight in (5.0, 0.0):
                torch.manual_seed(0)  # of the dropout
                balance.append(loop.loss(0).item())
        return loop.state

    monkeypatch.setattr(TrainingLoop, "run", spy)
    model.run_stages()
    assert found == {  # a rate that rises from zero
        name: (0.07, 0.3, rates[f"{name}_learning_rate"], [0.0]) for name in ("warmup", "phase1", "phase2")
    }
    assert balance[0] - balance[1] > 0.9 * 5  # of experts used alike it is 1


@pytest.mark.parametrize("phase", ["warmup", "phase1", "phase2"])
def test_a_phase_that_diverges_names_its_own_learning_rate(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    step = TrainingLoop._step

    def spoiled(loop: TrainingLoop) -> Any:
        sound = loop.loss
        if loop.name == phase:
            loop.loss = lambda micro: sound(micro) * float("nan")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_step", spoiled)
    with pytest.raises(ValueError, match=f"{phase}: the loss is nan at step 0; lower `{phase}_learning_rate`"):
        assemble("Laser", module_settings, **QUICK, warmup_epochs=1, weight_decay=0.04).model.run_stages()


# -- rows --------------------------------------------------------------------------------------------------------------


def test_validation_and_test_items_are_never_training_targets(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = assemble("Laser", settings, train_samples=None, phase1_epochs=1).model
    users = [items.tolist() for items in model.histories.items[1:]]
    allowed = sorted((items[:end], items[end]) for items in users for end in range(1, len(items) - 2))
    rows = domains.training_examples([model.domain], window=None, samples=None, seed=0)
    assert sorted(map(model._pair, rows)) == allowed and len(allowed) > 200
    fed: list[tuple[list[int], int]] = []

    def spy(histories: list[list[int]], targets: list[int]) -> Tensor:
        fed.extend(zip(histories, targets, strict=True))
        return model.tower.suffix.sum()

    monkeypatch.setattr(model, "_loss", spy)
    model.run_stages()
    assert len(fed) > 1.9 * len(allowed)  # an epoch of each phase, but for a batch that is not full
    assert all(row in allowed for row in fed)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["suffix", "eos", "mean"])
def test_a_vector_is_that_of_a_plain_forward_over_embeddings_put_together_by_hand(trained: Any, pooling: str) -> None:
    """Prefix, text, suffix or end-of-text: read at the last token, or averaged."""
    model = trained(**QUICK, pooling=pooling).model
    embed, history = model.lm.get_input_embeddings(), [3, 1, 4, 15, 9, 2]
    text = embed.weight[model.prompts.prompt(history)]
    prefix, _ = model.tower.m_former(*model.cf.sequence_states([history]))
    ends = {"suffix": model.tower.suffix, "eos": embed.weight[[model.tokenizer.eos_token_id]], "mean": text[:0]}
    inputs = torch.cat([prefix[0], text, ends[pooling]])[None]  # [1, T, D]
    hidden = model.lm.model(inputs_embeds=inputs).last_hidden_state[0]
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    close(model.encode_histories([history])[0], vector / vector.norm())


def test_the_prompt_numbers_its_lines_and_has_year_and_genre_in_brackets(assemble: Any, module_settings: dict[str, Any]) -> None:
    def lines(**changes: Any) -> list[str]:
        made = assemble("Laser", module_settings, **{"prompt": "laser", "history_label": ">> {k}. ", **changes})
        ids = made.model.histories.item_ids
        text = made.model.tokenizer.decode(made.model.prompts.prompt([ids.index("i3"), ids.index("i10")]))
        return text.removesuffix("\n").split("\n")[1:]

    titles, told = ["The old river", "The red wolf"], ["year: 1983, genre: drama film", "year: 1990, genre: comedy film"]
    assert lines() == [f">> {i + 1}. {titles[i]} ({told[i]})" for i in range(2)]  # year_field and category_field are set
    assert lines(text_fields=["genre"])[1] == ">> 2. The red wolf (genre: comedy film)"
    assert lines(text_fields=[], history_label="") == titles


# -- without states ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_training_never_saw_has_no_state_and_yet_a_vector(trained: Any) -> None:
    model = trained(**QUICK, new_items=0.2).model
    new = [item for item in range(1, 41) if not model.histories.train_counts[item]]
    old = [item for item in range(1, 41) if item not in new]
    assert len(new) >= 8 and not model.has_state[new].any() and model.has_state[old].all()
    vectors = model.encode_histories([new[:1], new[:3], []])  # of items, users and nobody
    assert vectors.isfinite().all() and model.item_matrix[new].isfinite().all()
    close(vectors.norm(dim=1), torch.ones(3))
    assert len(model.item_matrix[new].unique(dim=0)) == len(new)  # their texts tell them apart
    states, known = model._cf_states([new[:3], [old[0], new[0], old[1]]])
    assert known.sum(1).tolist() == [0, 2]
    close(states[1], model.cf.sequence_states([old[:2]])[0][0])
    prefixes = model.tower(*model._cf_states([new[:1], new[1:4], []]))[0]
    assert torch.equal(prefixes[0], prefixes[1]) and torch.equal(prefixes[0], prefixes[2])  # the null token's


@pytest.mark.parametrize("threshold", [0, 1, 9])
def test_an_item_has_a_state_from_so_many_training_interactions_on(
    assemble: Any, module_settings: dict[str, Any], threshold: int
) -> None:
    """But an item that training never saw has none, and neither has the padding item."""
    model = assemble("Laser", module_settings, cold_threshold=threshold).model
    met = [0] * 41
    for items in model.histories.items[1:]:
        for item in items[:-2].tolist():  # neither the validation nor the test item counts
            met[item] += 1
    known = model.has_state.tolist()
    assert known == [count >= max(1, threshold) for count in met] and sum(known) == {0: 40, 1: 40}.get(threshold, sum(known))
    assert threshold < 9 or 5 < sum(known) < 35


@torch.no_grad()
def test_the_states_that_are_read_are_those_that_cf_states_names(trained: Any, made: Made) -> None:
    history = [3, 1, 4]
    items, none = trained(**QUICK, cf_states="items").model, trained(**QUICK, cf_states="none").model
    close(items._cf_states([history])[0][0], items.cf.model.item_embedding.weight[history])
    assert not none._cf_states([history])[1].any() and none.encode_histories([history]).isfinite().all()
    close(made.model._cf_states([history])[0][0], made.model.cf.sequence_states([history])[0][0])
