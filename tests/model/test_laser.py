"""Laser: a frozen LM, two phases and two towers, the published loss, and what each setting changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recbole_llm.data import domains
from recbole_llm.model import laser_training
from recbole_llm.model.laser_training import TowerTraining
from recbole_llm.model.m_former import WarmUp
from recbole_llm.model.parts import histories_of
from recbole_llm.model.towers import Towers
from recbole_llm.training.loop import TrainingLoop

Made = SimpleNamespace
QUICK = {"train_samples": 16, "valid_users": 8, "phase1_epochs": 1, "phase2_epochs": 1}
BAD_PHASE2 = {"phase2_learning_rate": 3.0}  # so large that it only does harm


@pytest.fixture(scope="module")
def trained(module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``trained(**changes)``: a model with its stages, of which most are cached, and training rows; made once."""
    cached: dict[str, Made] = {}

    def trained(**changes: Any) -> Made:
        key = json.dumps(changes, sort_keys=True)
        if key not in cached:
            made = assemble("Laser", module_settings, **changes)
            made.lm = made.model.parts.backbone.load(made.trainer.cache).model
            made.lm_before = state(made.lm)
            run_stages(made).model.eval()
            made.batch = next(iter(made.train))[:9]
            cached[key] = made
        return cached[key]

    return trained


def run_stages(made: Made) -> Made:
    """What ``fit`` does before it validates."""
    made.trainer.cache.run(*made.model.plan(made.candidates))
    made.model.load(made.trainer.cache)
    return made


@pytest.fixture(scope="module")
def made(trained: Callable[..., Made]) -> Made:
    return trained()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stage_tensors(made: Made, stage: str) -> dict[str, dict[str, Tensor]]:
    """The result of a stage, by file."""
    return {file.stem: load_file(file) for file in made.trainer.cache.folders[stage].glob("*.safetensors")}


def loss_of(
    model: Any, histories: Sequence[Sequence[int]], targets: Sequence[int], tokens: int = 10**6, **changes: Any
) -> list[Tensor]:
    """The parts of the loss of both phases, of the trained towers; no history loses its states or is cut unless asked for."""
    config = replace(model.training_config, **{"null_share": 0.0, "single_share": 0.0, **changes})
    training = TowerTraining(config, model.parts, model.reader, lambda *_: 0.0)
    return [part() for part in training.loss(model.towers, tokens)(histories, targets)]  # type: ignore[arg-type]


def batch_loss(made: Made, **changes: Any) -> Tensor:
    (loss,) = loss_of(made.model, histories_of(made.model, made.batch), made.batch["item_id"].tolist(), **changes)
    return loss


def valid_score(model: Any) -> float:
    return model.valid_score(model.encode_histories, model.item_matrix)


def close(one: Tensor, other: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# -- frozen and trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"warmup_epochs": 1}])
def test_the_lm_is_byte_for_byte_the_same_after_all_phases(trained: Any, changes: dict[str, Any]) -> None:
    made = trained(**changes)
    assert equal(state(made.lm), made.lm_before)
    names = {name.split(".")[0] for name, parameter in made.model.towers.named_parameters() if parameter.requires_grad}
    assert names == {"user"} and not any(p.requires_grad for p in made.model.cf.model.parameters())
    made.model.train()
    assert not made.lm.training and not made.model.towers.item.training and not made.model.cf.model.training
    assert made.model.towers.user.training
    made.model.eval()


def test_what_a_later_phase_trains_again_is_counted_once(trained: Any) -> None:
    """The user tower, and the two heads of the warm-up; the item tower is a copy."""
    plain, warm = (trained(**changes) for changes in ({}, {"warmup_epochs": 1}))
    before = plain.trainer.cache.trained(plain.model.cf.stage)
    tower = sum(parameter.numel() for parameter in plain.model.towers.user.parameters())
    assert plain.trainer.trained_parameters == before + tower
    config = warm.model.reader.config.former.hidden_size, warm.model.reader.width
    heads = sum(parameter.numel() for parameter in WarmUp(*config).parameters())
    assert warm.trainer.trained_parameters == before + tower + heads


def test_the_warm_up_is_where_phase_1_begins(trained: Any) -> None:
    warm = trained(warmup_epochs=1)
    assert [*warm.trainer.cache.seconds] == ["cf-SASRec", "m-former", "phase-1", "phase-2"]
    begun, fresh = (trained(warmup_epochs=e, phase1_epochs=0, phase2_epochs=0).model.towers.user for e in (1, 0))
    assert equal(state(begun), stage_tensors(warm, "m-former")["user_tower"])
    changed = {name for name, tensor in state(fresh).items() if not torch.equal(tensor, state(begun)[name])}
    assert changed and not any(re.match(r"m_former\.project|suffix", name) for name in changed)


# -- loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.01, 5.0])
def test_the_loss_is_the_papers(made: Made, weight: float) -> None:
    """- log exp(cos / tau) / sum over the catalogue of exp(cos / tau), and lambda K sum f P."""
    model, targets = made.model, made.batch["item_id"].tolist()
    histories = histories_of(model, made.batch)
    found = batch_loss(made, load_balance_weight=weight)
    expected, chosen, probabilities = 0.0, [], []
    with torch.no_grad():
        items = model.encode_items()[1:]
        for history, target in zip(histories, targets, strict=True):
            user = model.encode_histories([history])[0]
            cosines = [torch.cosine_similarity(user, item, dim=0) for item in items]
            exponentials = torch.stack(cosines).div(0.05).exp()
            expected -= float((exponentials[target - 1] / exponentials.sum()).log()) / len(targets)
            states, _ = model.cf.sequence_states([history])
            for p in model.towers.user.m_former.router(states[0]).softmax(-1):
                probabilities.append(p)
                chosen.append(int(p.argmax()))
    mean = torch.stack(probabilities).mean(0)
    balance = 3 * sum(chosen.count(expert) / len(chosen) * float(mean[expert]) for expert in range(3))
    assert len(histories) == 9 and sum(map(len, histories)) == len(chosen)
    assert found.item() == pytest.approx(expected + weight * balance, abs=1e-3)


def test_no_gradient_goes_into_the_item_matrix_the_item_tower_or_the_lm(trained: Any) -> None:
    made = trained(**QUICK)
    towers, matrix = made.model.towers, made.model.item_matrix
    for cached in (True, False):  # also where the loss is what encodes it
        towers.item_matrix = matrix if cached else None
        towers.zero_grad()
        batch_loss(made).backward()
        assert not towers.item_matrix.requires_grad and towers.item_matrix.grad is None
        close(towers.item_matrix, matrix)
        reached = {name.split(".")[0] for name, parameter in towers.named_parameters() if parameter.grad is not None}
        assert reached == {"user"} and all(parameter.grad is None for parameter in made.lm.parameters())
        m_former = towers.user.m_former
        for parameter in (towers.user.suffix, m_former.router.weight, m_former.experts, m_former.project.weight):
            assert parameter.grad.any()
    towers.item_matrix = matrix


@torch.no_grad()
@pytest.mark.parametrize("key", ["null_share", "single_share"])
def test_missing_states_and_single_items_are_drawn_in_the_loss_alone(trained: Any, key: str) -> None:
    made = trained(**QUICK, m_former_dropout=0.0, **{key: 0.6})
    model, losses = made.model, []
    for share in (0.0, 0.6):
        torch.manual_seed(0)
        losses.append(batch_loss(made, **{key: share}).item())
    assert abs(losses[1] - losses[0]) > 1e-4
    histories = histories_of(model, made.batch)
    assert torch.equal(model.train().encode_histories(histories), model.eval().encode_histories(histories))
    assert torch.equal(model.encode_histories(histories), model.encode_histories(histories))


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_null_token_is_trained_on_the_share_of_the_histories_that_lose_their_states(
    trained: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    model, routed = trained(**QUICK).model, []
    balance = laser_training.load_balance
    monkeypatch.setattr(laser_training, "load_balance", lambda part, batch: (routed.append(batch), balance(part, batch))[1])
    torch.manual_seed(0)
    model.towers.zero_grad(set_to_none=True)
    loss_of(model, [[3, 1, 4]] * 40, [15] * 40, null_share=share)
    loss_of(model, [[3, 1, 4]] * 40, [15] * 40, null_share=share)[0].backward()
    reached = bool(model.towers.user.m_former.null.grad.abs().max() > 0)
    model.towers.zero_grad(set_to_none=True)
    first, second = (routing.seen.sum(1) for routing in routed)  # 3 states, or the null token alone
    assert {*first.tolist(), *second.tolist()} == ({1, 3} if share else {3})
    assert (10 < int((second == 1).sum()) < 30 and not torch.equal(first, second)) == reached == bool(share)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_parts_add_up_to_the_loss_of_the_batch_and_its_gradient(made: Made, weight: float) -> None:
    """With the load balance, which is no sum over users: the experts' shares are those of the batch in every part."""
    histories, targets = [[3], [3, 1, 4], [7, 2], [5, 6, 8, 9, 2], [1, 2]], [15, 3, 8, 12, 9]
    parameters = [parameter for parameter in made.model.towers.user.parameters() if parameter.requires_grad]

    def gradient(tokens: int) -> tuple[int, Tensor, list[Tensor]]:
        parts = loss_of(made.model.eval(), histories, targets, tokens, load_balance_weight=weight)
        total = torch.stack(parts).sum()
        return len(parts), total, [*torch.autograd.grad(total, parameters, materialize_grads=True)]

    (one, whole, expected), (many, summed, found) = gradient(10**6), gradient(1)
    assert one == 1 and many == 5
    close(summed, whole, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert any(part.abs().max() > 1e-3 for part in expected)


def test_a_single_item_is_the_last_of_its_history(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = trained(**QUICK).model, []
    embed = model.reader.embed
    monkeypatch.setattr(model.reader, "embed", lambda tower, rows, *rest: (read.extend(rows), embed(tower, rows, *rest))[1])
    torch.manual_seed(0)
    loss_of(model, [[3, 1, 4]] * 40, [15] * 40, single_share=0.5)
    assert {*map(tuple, read)} == {(3, 1, 4), (4,)} and 10 < read.count([4]) < 30


# -- two phases --------------------------------------------------------------------------------------------------------


def test_the_item_matrix_is_what_the_item_tower_encodes_and_not_the_users(made: Made) -> None:
    model, catalogue = made.model, [[item] for item in range(1, 41)]
    close(model.reader.encode(model.towers.item, catalogue), model.item_matrix[1:])
    assert (model.encode_histories(catalogue) - model.item_matrix[1:]).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"phase1_epochs": 0}, {"phase1_epochs": 0, "phase2_epochs": 0}])
def test_no_dropout_is_in_the_item_matrix(trained: Any, changes: dict[str, Any]) -> None:
    model = trained(**{**QUICK, **changes}, m_former_dropout=0.5).model
    close(model.encode_items(), model.item_matrix)


def test_after_phase_1_the_item_tower_is_the_user_tower_as_it_was_before_the_epoch(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, validate = [], TrainingLoop._validate

    def part(loop: TrainingLoop, name: str) -> dict[str, Tensor]:
        found = {key: tensor.detach().clone() for key, tensor in loop.parameters.items()}
        return {key.removeprefix(name): tensor for key, tensor in found.items() if key.startswith(name)}

    def spy(loop: TrainingLoop) -> None:
        before = len(loop.state.validations)
        validate(loop)
        if len(loop.state.validations) > before:
            seen.append([part(loop, "user."), part(loop, "item."), loop.state.best_step])

    monkeypatch.setattr(TrainingLoop, "_validate", spy)
    made = run_stages(assemble("Laser", module_settings, phase2_epochs=0, phase1_epochs=3, laser_patience=0))
    assert len(seen) == 3 and not any(equal(*towers) for *towers, _ in seen)
    for (user, _, _), (_, item, _) in zip(seen, seen[1:], strict=False):
        assert equal(user, item)  # what the epoch before left
    best = seen[seen[-1][2] // 4 - 1]
    for tower, expected in ((made.model.towers.user, best[0]), (made.model.towers.item, best[1])):
        assert equal(dict(tower.named_parameters()), expected)


def test_refresh_steps_renew_the_matrix_within_an_epoch(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, refresh = [], Towers.refresh
    monkeypatch.setattr(Towers, "refresh", lambda towers: (calls.append(1), refresh(towers)))
    for steps, expected in ((None, 2), (3, 3)):  # of eight steps in two epochs
        calls.clear()
        run_stages(assemble("Laser", module_settings, refresh_steps=steps, laser_patience=99, phase2_epochs=0))
        assert len(calls) == expected + 1  # and once before the first step


def test_both_phases_stop_when_validations_gain_nothing_and_return_to_the_best(
    module_settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen, validated = assemble("Laser", module_settings, phase1_epochs=9, phase2_epochs=9, laser_patience=2), [], []
    scores = iter([0.4, 0.5, 0.4, 0.3, 0.5, 0.4, 0.3])  # phase 2 validates what it begins with

    def score(encode: Any, matrix: Tensor) -> float:
        seen.append((state(validated[-1].user), state(validated[-1].item)))
        return next(scores)

    monkeypatch.setattr(made.model, "_log_experts", lambda when, reader, towers: validated.append(towers))
    monkeypatch.setattr(made.model, "valid_score", score)
    towers = run_stages(made).model.towers
    assert len(seen) == 7 and next(scores, None) is None
    assert equal(state(towers.user), seen[1][0]) and equal(state(towers.item), seen[1][1])


@pytest.mark.parametrize("changes", [{}, BAD_PHASE2])
def test_phase_2_leaves_the_items_alone_and_never_ends_below_phase_1(trained: Any, changes: dict[str, Any]) -> None:
    model, one = trained(**changes).model, trained(phase2_epochs=0).model
    left = stage_tensors(trained(phase2_epochs=0), "phase-1")
    assert equal(state(model.towers.item), left["item_tower"]) and equal(state(one.towers.item), left["item_tower"])
    assert torch.equal(model.item_matrix, left["item_matrix"]["items"]) and torch.equal(one.item_matrix, model.item_matrix)
    assert valid_score(model) >= valid_score(one) > 0
    assert equal(state(model.towers.user), state(one.towers.user)) == (valid_score(model) == valid_score(one))
    if changes:  # harm is undone
        assert equal(state(model.towers.user), left["user_tower"])


def test_training_learns(trained: Any) -> None:
    fresh, learned = (trained(phase1_epochs=epochs, phase2_epochs=0, train_samples=80) for epochs in (0, 2))
    with torch.no_grad():
        assert batch_loss(learned) < 0.9 * batch_loss(fresh)


def test_a_phases_optimiser_is_as_its_settings_say_and_the_warm_up_balances_too(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"weight_decay": 0.07, "max_grad_norm": 0.3, "warmup_ratio": 0.5}
    rates = {"warmup_learning_rate": 1e-3, "phase1_learning_rate": 2e-3, "phase2_learning_rate": 3e-3}
    found, balance = {}, []

    def spy(loop: TrainingLoop) -> Any:
        (group,) = loop.optimizer.param_groups
        found[loop.name] = group["weight_decay"], loop.clip_grad_norm, group["initial_lr"], loop.scheduler.get_last_lr()
        if loop.name == "warmup":
            torch.manual_seed(0)  # of the dropout
            balance.append(sum(part().item() for part in loop.loss(0)))
        return loop.state

    monkeypatch.setattr(TrainingLoop, "run", spy)
    for weight in (5.0, 0.0):
        run_stages(assemble("Laser", settings, **QUICK, **given, **rates, warmup_epochs=1, load_balance_weight=weight))
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
            loop.loss = lambda step: [lambda part=part: part() * float("nan") for part in sound(step)]
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_step", spoiled)
    with pytest.raises(ValueError, match=f"{phase}: the loss is nan at step 0; lower `{phase}_learning_rate`"):
        run_stages(assemble("Laser", module_settings, **QUICK, warmup_epochs=1, weight_decay=0.04))


# -- rows --------------------------------------------------------------------------------------------------------------


def test_validation_and_test_items_are_never_training_targets(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("Laser", settings, train_samples=None, phase1_epochs=1)
    parts = made.model.parts
    users = [items.tolist() for items in parts.histories.items[1:]]
    allowed = sorted((items[:end], items[end]) for items in users for end in range(1, len(items) - 2))
    rows = domains.training_examples([parts.domain], samples=None, seed=0)
    pairs = [
        (parts.domain.histories[row.user][: row.end].tolist(), int(parts.domain.histories[row.user][row.end])) for row in rows
    ]
    assert sorted(pairs) == allowed and len(allowed) > 200
    fed: list[tuple[list[int], int]] = []

    def spied(training: TowerTraining, towers: Towers, tokens: int) -> Any:
        def loss(histories: list[list[int]], targets: list[int]) -> list[Any]:
            fed.extend(zip(histories, targets, strict=True))
            assert towers.user.suffix is not None
            return [towers.user.suffix.sum]

        return loss

    monkeypatch.setattr(TowerTraining, "loss", spied)
    run_stages(made)
    assert len(fed) > 1.9 * len(allowed)  # an epoch of each phase, but for a batch that is not full
    assert all(row in allowed for row in fed)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["suffix", "eos", "mean"])
def test_a_vector_is_that_of_a_plain_forward_over_embeddings_put_together_by_hand(trained: Any, pooling: str) -> None:
    """Prefix, text, suffix or end-of-text: read at the last token, or averaged."""
    made = trained(**QUICK, pooling=pooling)
    model, tower = made.model, made.model.towers.user
    embed, history = made.lm.get_input_embeddings(), [3, 1, 4, 15, 9, 2]
    text = embed.weight[model.reader.prompts.prompt(history).ids]
    prefix, _ = tower.m_former(*model.cf.sequence_states([history]))
    ends = {"suffix": tower.suffix, "eos": embed.weight[[model.reader.causal.tokenizer.eos_token_id]], "mean": text[:0]}
    inputs = torch.cat([prefix[0], text, ends[pooling]])[None]  # [1, T, D]
    hidden = made.lm.model(inputs_embeds=inputs).last_hidden_state[0]
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    close(model.encode_histories([history])[0], vector / vector.norm())


def test_the_prompt_numbers_its_lines_and_has_year_and_genre_in_brackets(assemble: Any, module_settings: dict[str, Any]) -> None:
    def lines(**changes: Any) -> list[str]:
        model = assemble("Laser", module_settings, **{"prompt": "laser", "history_label": ">> {k}. ", **changes}).model
        ids, tokenizer = model.parts.histories.item_ids, model.parts.backbone.tokenizer
        builder = model.parts.builder(tokenizer, names=model.texts)
        text = tokenizer.decode(builder.prompt([ids.index("i3"), ids.index("i10")]).ids)
        return text.removesuffix("\n").split("\n")[1:]

    titles, told = ["The old river", "The red wolf"], ["year: 1983, genre: drama film", "year: 1990, genre: comedy film"]
    assert lines() == [f">> {i + 1}. {titles[i]} ({told[i]})" for i in range(2)]  # year_field and category_field are set
    assert lines(text_fields=["genre"])[1] == ">> 2. The red wolf (genre: comedy film)"
    assert lines(text_fields=[], history_label="") == titles


# -- without states ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_training_never_saw_has_no_state_and_yet_a_vector(trained: Any) -> None:
    model = trained(**QUICK, new_items=0.2).model
    new = [item for item in range(1, 41) if not model.parts.histories.train_counts[item]]
    old = [item for item in range(1, 41) if item not in new]
    assert len(new) >= 8 and not model.reader._has_state[new].any() and model.reader._has_state[old].all()
    vectors = model.encode_histories([new[:1], new[:3], []])  # of items, users and nobody
    assert vectors.isfinite().all() and model.item_matrix[new].isfinite().all()
    close(vectors.norm(dim=1), torch.ones(3))
    assert len(model.item_matrix[new].unique(dim=0)) == len(new)  # their texts tell them apart
    states, known = model.reader.states([new[:3], [old[0], new[0], old[1]]])
    assert known.sum(1).tolist() == [0, 2]
    close(states[1], model.cf.sequence_states([old[:2]])[0][0])
    prefixes = model.towers.user(*model.reader.states([new[:1], new[1:4], []]))[0]
    assert torch.equal(prefixes[0], prefixes[1]) and torch.equal(prefixes[0], prefixes[2])  # the null token's


@pytest.mark.parametrize("threshold", [0, 1, 9])
def test_an_item_has_a_state_from_so_many_training_interactions_on(
    assemble: Any, module_settings: dict[str, Any], threshold: int
) -> None:
    """But an item that training never saw has none, and neither has the padding item."""
    made = assemble("Laser", module_settings, cold_threshold=threshold)
    model = made.model
    made.trainer.cache.run(model.cf.stage)
    met = [0] * 41
    for items in model.parts.histories.items[1:]:
        for item in items[:-2].tolist():  # neither the validation nor the test item counts
            met[item] += 1
    known = model._reader(made.trainer.cache)._has_state.tolist()
    assert known == [count >= max(1, threshold) for count in met] and sum(known) == {0: 40, 1: 40}.get(threshold, sum(known))
    assert threshold < 9 or 5 < sum(known) < 35


@torch.no_grad()
def test_the_states_that_are_read_are_those_that_cf_states_names(trained: Any, made: Made) -> None:
    history = [3, 1, 4]
    items, none = trained(**QUICK, cf_states="items").model, trained(**QUICK, cf_states="none").model
    close(items.reader.states([history])[0][0], items.cf.model.item_embedding.weight[history])
    assert not none.reader.states([history])[1].any() and none.encode_histories([history]).isfinite().all()
    close(made.model.reader.states([history])[0][0], made.model.cf.sequence_states([history])[0][0])
