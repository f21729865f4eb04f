"""Laser's settings: each ablation runs and is another result, stages are trained anew where they must be, nonsense is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_llm.model.laser.towers import Tower, warn_if_untrained
from recbole_llm.store.curves import Curve
from recbole_llm.store.runs import SavedRun
from recbole_llm.store.stages import in_order

Made = SimpleNamespace
SHORT = {"train_samples": 16, "phase1_epochs": 1, "phase1_learning_rate": 3e-2, "phase2_learning_rate": 3e-2}
ABLATIONS: dict[str, dict[str, Any]] = {
    "w/o MoE": {"moe": False},
    "w/o M-Former": {"m_former": False},
    "w/o prefix": {"prefix": False},
    "w/o phase 1": {"phase1_epochs": 0},
    "w/o phase 2": {"phase2_epochs": 0},
    "w/o both": {"phase1_epochs": 0, "phase2_epochs": 0},
    "[EOS]": {"pooling": "eos"},
    "average pooling": {"pooling": "mean"},
    "hard router": {"router": "hard"},
    "K and L": {"num_experts": 2, "prefix_length": 3},
    "text alone": {"cf_states": "none"},
    "item vectors": {"cf_states": "items"},
    "of BPR": {"cf_model": "BPR"},
    "warm-up": {"warmup_epochs": 1},
}


@pytest.fixture(scope="module")
def run(module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``run(**changes)``: a short training, its stages, and its scores of three test users."""

    def run(**changes: Any) -> Made:
        made = assemble("Laser", module_settings, **{**SHORT, **changes})
        made.result = made.trainer.fit(made.train, made.valid)[1]
        made.scores = made.model.eval().full_sort_predict(next(iter(made.test))[0][:3])
        return made

    return run


@pytest.fixture(scope="module")
def standard(run: Any) -> Made:
    return run()


def stages(made: Made) -> dict[str, str]:
    """Fingerprints of all stages by name."""
    return {stage.name: stage.fingerprint for stage in in_order(made.model.plan(made.candidates))}


def sizes(model: Any) -> dict[str, int]:
    """Trained weights by part."""
    parts: dict[str, int] = {}
    for name, parameter in Tower(model.tower_config, model.cf.state_width, 32).named_parameters():
        if parameter.requires_grad:
            part = ".".join(name.split(".")[: 1 + ("m_former" in name)])
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


# -- ablations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_runs_and_is_another_result(run: Any, standard: Made, name: str) -> None:
    made = run(**ABLATIONS[name])
    assert all(0 <= value <= 1 for value in made.result.values()) and torch.isfinite(made.scores).all()
    assert (made.scores - standard.scores).abs().max() > 1e-4
    assert stages(made) != stages(standard)
    expected = {"cf-BPR" if name == "of BPR" else "cf-SASRec", "phase-1", "phase-2"}
    expected |= {"m-former"} if name == "warm-up" else set()
    expected -= {"phase-2"} if name in ("w/o phase 2", "w/o both") else set()
    assert {*made.trainer.cache.seconds} == expected == {*stages(made)}
    towers = zip(made.model.towers.user.parameters(), made.model.towers.item.parameters(), strict=True)
    apart = any((one != other).any() for one, other in towers)
    assert apart == (name != "w/o both")  # nothing was trained


def test_an_ablation_has_no_weights_of_what_it_leaves_out(module_settings: dict[str, Any], assemble: Any) -> None:
    def found(**changes: Any) -> dict[str, int]:
        return sizes(assemble("Laser", module_settings, **changes).model)

    whole = found()
    assert whole.keys() == {"suffix", *(f"m_former.{part}" for part in ("experts", "null", "router", "former", "project"))}
    assert whole["suffix"] == 32 and whole["m_former.experts"] == 3 * 2 * 16 and whole["m_former.router"] == 3 * 16
    alone = found(moe=False)  # between one expert, a router has nothing to learn
    assert alone == {part: size for part, size in whole.items() if part != "m_former.router"} | {"m_former.experts": 2 * 16}
    assert found(m_former=False) == {"suffix": 32, "prefix": 2 * 32} and found(prefix=False) == {"suffix": 32}
    for pooling in ("eos", "mean"):
        assert found(pooling=pooling) == {part: size for part, size in whole.items() if part != "suffix"}


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_setting_trains_the_stages_anew_that_depend_on_it_and_no_others(
    module_settings: dict[str, Any], assemble: Any
) -> None:
    def planned(**changes: Any) -> dict[str, str]:
        return stages(assemble("Laser", module_settings, **changes))

    def anew(before: dict[str, str], **changes: Any) -> set[str]:
        return {name for name, value in planned(**changes).items() if before.get(name) != value}

    plain, both = planned(), {"phase-1", "phase-2"}
    measured = {
        "eval_args": {"mode": "full"},
        "metrics": ["Recall", "NDCG"],
        "topk": [5, 10],
        "candidates": {"num_negatives": 5},
        "slices": {},
        "eval_users": 9,
        "eval_batch_size": 7,
        "score_batch_tokens": 99,
        "save_every_seconds": 3,
        "r": 8,
        "retriever_top": 5,
    }
    assert anew(plain, **measured) == set()
    for change in ({"phase2_epochs": 3}, {"phase2_learning_rate": 0.1}):
        assert anew(plain, **change) == {"phase-2"}, change
    for change in (
        {"temperature": 0.1},
        {"load_balance_weight": 0.1},
        {"num_experts": 2},
        {"prefix_length": 3},
        {"m_former_dropout": 0.2},
        {"phase1_epochs": 3},
        {"phase1_learning_rate": 0.1},
        {"refresh_steps": 3},
        {"laser_patience": 1},
        {"valid_users": 9},
        {"valid_metric": "NDCG@1"},
        {"null_share": 0.2},
        {"single_share": 0.2},
        {"cold_threshold": 9},
        {"max_history": 4},
        {"text_fields": []},
        {"noun": "film"},
        {"weight_decay": 0.1},
        {"dtype": "bfloat16"},
        {"warmup_ratio": 0.3},
    ):
        assert anew(plain, **change) == both, change
    assert anew(plain, cf_config={"hidden_size": 8}) == anew(plain, seed=1) == {"cf-SASRec", *both}
    assert anew(planned(pooling="eos"), pooling="mean") == both  # of the same weights
    warm = planned(warmup_epochs=1)
    assert warm.keys() - plain.keys() == {"m-former"} and anew(plain, warmup_epochs=1) == {"m-former", *both}
    for change in ({"temperature": 0.1}, {"phase1_epochs": 3}, {"valid_users": 9}):
        assert anew(warm, warmup_epochs=1, **change) == both, change
    for change in ({"load_balance_weight": 0.1}, {"warmup_learning_rate": 0.1}, {"router": "hard"}):
        assert anew(warm, warmup_epochs=1, **change) == {"m-former", *both}, change


def test_a_second_run_trains_nothing_however_it_is_measured(run: Any, standard: Made) -> None:
    again = run(eval_args={"mode": "full"}, topk=[5, 10])
    assert not any(again.trainer.cache.seconds.values()) and torch.equal(again.scores, standard.scores)
    other = run(phase2_learning_rate=0.2)
    assert [name for name, seconds in other.trainer.cache.seconds.items() if seconds] == ["phase-2"]


@pytest.mark.parametrize(("losses", "told"), [([3.8, 3.7, 3.66, 3.67], True), ([3.8, 3.7, 3.69, 3.5], False), ([], False)])
def test_a_phase_that_has_learnt_nothing_is_told(
    losses: list[float], told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ln 40 is 3.69; the last quarter of the losses counts."""
    curve = Curve("phase-2", points={"loss": list(enumerate(losses, 1))})
    curve.write(tmp_path)
    warn_if_untrained("phase2", tmp_path, 40)
    assert ("phase2: nothing has been learnt: the loss, 3.67" in caplog.text) == told
    assert ("raise train_samples, phase2_epochs or phase2_learning_rate" in caplog.text) == told


def test_the_load_balance_in_the_loss_is_no_sign_of_equal_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Curve("phase-2", points={"loss": [(1, 4.8), (2, 4.4)]}).write(tmp_path)
    warn_if_untrained("phase2", tmp_path, 40, balance=1.0)
    assert not caplog.text
    warn_if_untrained("phase2", tmp_path, 40)
    assert "the loss, 4.40, is not below that of equal scores for all 40 items, 3.69" in caplog.text


def test_a_run_says_so_of_its_last_phase(
    module_settings: dict[str, Any], assemble: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = assemble("Laser", module_settings, phase1_learning_rate=1e-9, phase2_epochs=0)
    made.trainer._run_stages()
    made.model.load(made.trainer.cache)
    assert "phase1: nothing has been learnt" in caplog.text


# -- experts and variants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degenerate", [True, False])
def test_a_router_that_sends_all_users_to_one_expert_is_warned_of_with_the_shares_and_the_keys(
    module_settings: dict[str, Any], assemble: Any, caplog: pytest.LogCaptureFixture, degenerate: bool
) -> None:
    made = assemble("Laser", module_settings)
    made.trainer.cache.run(made.model.cf.stage)
    reader = made.model._reader(made.trainer.cache)
    towers = reader.towers().eval()
    router = towers.user.m_former.router
    with torch.no_grad():
        if degenerate:
            router.weight.zero_()  # all alike: the first
        else:
            router.weight.copy_(torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))[0].T)
    with caplog.at_level("INFO"):
        made.model._log_experts("phase1", reader, towers)
    (record,) = [record for record in caplog.records if record.getMessage().startswith("phase1")]
    message = record.getMessage()
    if degenerate:
        assert record.levelname == "WARNING" and "has 100% of the users (shares 1.00 0.00 0.00)" in message
        assert "load_balance_weight, 0.01" in message and "num_experts, 3" in message
    else:
        shares = [float(share) for share in message.split("users by expert ")[1].split()]
        assert record.levelname == "INFO" and len(shares) == 3 and sum(shares) == pytest.approx(1, abs=0.02) and max(shares) < 0.9


@pytest.mark.parametrize("changes", [{"moe": False}, {"m_former": False}])
def test_of_one_expert_there_is_nothing_to_say(
    module_settings: dict[str, Any], assemble: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    made = assemble("Laser", module_settings, **changes)
    made.trainer.cache.run(made.model.cf.stage)
    reader = made.model._reader(made.trainer.cache)
    with caplog.at_level("INFO"):
        caplog.clear()
        made.model._log_experts("phase1", reader, reader.towers())
    assert not caplog.messages


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "candidates"])
def test_the_row_beside_laser_has_the_scores_of_its_collaborative_model(run: Any, standard: Made, mode: str) -> None:
    made = run(eval_args={"mode": mode}, topk=[1, 5, 10])
    interaction, _, _, targets = next(iter(made.test))
    interaction = interaction[:7]

    def scores(name: str) -> Tensor:
        variant = made.model.variants()[name]
        if mode == "full":
            return variant.score_catalogue(interaction)
        return variant.score(interaction, made.test.candidates.lookup(interaction["user_id"], targets[:7]))

    own = made.model.cf.scores(interaction)
    if mode == "candidates":
        own = own.gather(1, made.test.candidates.lookup(interaction["user_id"], targets[:7]))
    assert [*made.model.variants()] == ["Laser", "SASRec"]
    before = scores("Laser")
    torch.testing.assert_close(scores("SASRec"), own, atol=1e-5, rtol=0)
    assert torch.equal(scores("Laser"), before) and (before - own).abs().max() > 1e-2


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, "pooling: 'max' in config_dict is not one of suffix, eos, mean"),
        ({"cf_states": "all"}, "cf_states: 'all' in config_dict is not one of states, items, none or ~"),
        ({"null_share": 1.0}, r"null_share: 1\.0 in config_dict is not a number in \[0, 1\)"),
        ({"null_share": -0.1}, r"null_share: -0\.1 in config_dict is not a number in \[0, 1\)"),
        ({"single_share": 1.5}, r"single_share: 1\.5 in config_dict is not a number in \[0, 1\)"),
        ({"router": "soft"}, "router: 'soft' in config_dict is not one of gated, hard"),
        ({"num_experts": 0}, "num_experts: 0 in .* is not a whole number of at least 1"),
        ({"prefix_length": 0}, "prefix_length: 0 in .* is not a whole number of at least 1"),
        ({"m_former_num_heads": 5}, "m_former_hidden_size: 16 is not a multiple of m_former_num_heads, 5"),
        ({"prefix": False, "pooling": "eos"}, "prefix: False leaves nothing to train with pooling: eos"),
        ({"prefix": False, "pooling": "mean"}, "prefix: False leaves nothing to train with pooling: mean"),
        ({"warmup_epochs": 1, "m_former": False}, "warmup_epochs: there is no M-Former to warm up"),
        ({"warmup_epochs": 1, "prefix": False}, "warmup_epochs: there is no M-Former to warm up"),
        ({"text_fields": ["nosuch"]}, "text_fields: .* no column 'nosuch' besides the title; the columns are year, genre"),
        ({"prompt": "nosuch"}, "prompt: nosuch is not a key of `prompts`"),
        ({"cf_model": "Pop"}, "cf_model: Pop has no vectors"),
        ({"history_label": "{k}. "}, "history_label: .* needs a template with text after"),
        ({"cf_config": {"MAX_ITEM_LIST_LENGTH": 80}}, "MAX_ITEM_LIST_LENGTH: SASRec reads 80 .*_LENGTH=80"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(
    settings: dict[str, Any], assemble: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble("Laser", settings, **changes)
    assert not list(Path(settings["checkpoint_dir"]).glob("stages/*-*"))


def test_a_run_whose_towers_do_not_fit_is_refused_with_what_to_leave_out(
    run: Any, module_settings: dict[str, Any], assemble: Any
) -> None:
    made = run()
    record = {"model": "Laser", "stages": {name: folder.name for name, folder in made.trainer.cache.folders.items()}}
    other = assemble("Laser", module_settings, prefix_length=5)
    reader = other.model._reader(other.trainer.cache)
    other.model.init_run = SavedRun(Path(module_settings["checkpoint_dir"]) / "runs" / "some" / "record.json", record)
    with pytest.raises(ValueError, match="init_from: the towers of .* do not fit this run .*experts.*; leave out"):
        other.model._of_run(reader)
