"""The table of a plan: what is cached, how long it takes on which machine, what does not fit and what makes it fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4TextConfig, Qwen3MoeConfig

from recbole_llm import cli, planner, quick_start
from recbole_llm.config import LLMConfig
from recbole_llm.costs import devices, parts
from recbole_llm.costs.devices import CARDS, Speed, card, of_card, probe
from recbole_llm.costs.plan import TO_RUN, Line, Plan
from recbole_llm.costs.shape import LMShape
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.memory import training_memory
from recbole_llm.model.parts import default_batch_tokens
from recbole_llm.planner import on_card, plan_of
from recbole_llm.quick_start import plan_run, run_recbole_llm
from recbole_llm.store.costs import Cost, Measured, Tokens
from recbole_llm.store.trials import trials
from tests.llm import families

SMALL = {"lora_epochs": 1, "train_samples": 8, "valid_users": 5}


def test_what_is_cached_costs_nothing_and_nothing_runs(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    before = plan_run("TALLRec", "tiny", config_dict={**settings, **SMALL})
    assert [line.name for line in before.lines] == ["ingredient", "validation", "test"] and before.speed is not None
    assert not list(Path(settings["checkpoint_dir"]).glob("stages/*"))
    result = run_recbole_llm("TALLRec", "tiny", config_dict={**settings, **SMALL})
    assert "plan: TALLRec on tiny, backbone tiny-llama" in caplog.text and "planned and measured:" in caplog.text
    assert Path(result["record"]).is_file()
    after = plan_run("TALLRec", "tiny", config_dict={**settings, **SMALL})
    status = [(line.status, line.cost is None) for line in after.lines]
    assert status == [("cached", True), ("", False), ("", False)]
    assert "ingredient  cached" in str(after)


def test_config_and_tokenizer_are_enough(settings: dict[str, Any], tiny_lm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_lm, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    given = {**settings, **SMALL, "llm_path": str(tmp_path / "bare")}
    bare, whole = (plan_run("TALLRec", "tiny", config_dict=values, device="l4") for values in (given, {**settings, **SMALL}))
    assert [line.cost for line in bare.lines] == [line.cost for line in whole.lines]
    assert bare.lines[0].cost is not None and bare.lines[0].cost.trained.fed > 0


def test_a_card_has_its_own_precision_and_time(settings: dict[str, Any]) -> None:
    given = {**settings, **SMALL}
    here, there = (plan_run("TALLRec", "tiny", config_dict=given, device=device) for device in (None, "h100"))
    first, second = here.lines[0].cost, there.lines[0].cost
    assert first is not None and second is not None and there.speed is not None
    assert second.memory["weights"] * 2 == first.memory["weights"]  # bf16
    assert there.speed.train == 0.4 * CARDS["h100"].bf16 and there.speed.memory == CARDS["h100"].memory
    assert there.seconds(second) == pytest.approx((second.flops or 0) / there.speed.train)
    assert "NVIDIA H100" in str(there) and "40%" in str(there)
    slower = plan_run("TALLRec", "tiny", config_dict={**given, "plan_efficiency": 0.1}, device="h100")
    assert slower.seconds(second) == pytest.approx(4 * (there.seconds(second) or 0))


def test_what_this_machine_cannot_load_can_be_planned_and_is_refused_by_a_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))
    given = {**settings, **SMALL, "load_in_4bit": True}
    four, whole = (plan_run("TALLRec", "tiny", config_dict=values, device="h100") for values in (given, {**settings, **SMALL}))
    assert four.lines[0].cost is not None and whole.lines[0].cost is not None
    assert four.lines[0].cost.memory["weights"] < whole.lines[0].cost.memory["weights"]
    with pytest.raises(ImportError, match="load_in_4bit: True needs bitsandbytes"):
        run_recbole_llm("TALLRec", "tiny", config_dict=given)


def test_batches_are_those_of_the_device(tiny_lm: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_lm)
    here, there = (parts.blank(Outline(config, None, torch.float32, device, False)) for device in ("cpu", "cuda:1"))
    assert (default_batch_tokens(here), default_batch_tokens(there)) == (2048, 16384)


def test_an_unknown_card_is_an_error() -> None:
    with pytest.raises(ValueError, match="--device=tpu: unknown card; choose .*h100.*4090"):
        card("tpu")
    assert of_card(card("A100"), torch.float32, 1.0).train == CARDS["a100"].fp32


@pytest.mark.parametrize(
    ("part", "key"),
    [("activations", "gradient_checkpointing"), ("weights", "load_in_4bit"), ("KV cache", "score_batch_tokens")],
)
def test_what_does_not_fit_names_the_key_that_makes_it_fit(part: str, key: str) -> None:
    cost = Cost(memory={"gradients": 10, part: 1000})
    lines = [Line("ingredient", TO_RUN, cost), Line("test", "", Cost(memory={part: 100}))]
    shown = str(Plan("", lines, Speed(1.0, 1.0, 500, "a machine")))
    (told,) = [line for line in shown.splitlines() if "does not fit" in line]
    assert "ingredient" in told and part in told and key in told
    assert "does not fit" not in str(Plan("", lines, Speed(1.0, 1.0, 5000, "a machine")))


def test_what_was_cached_is_no_wrong_prediction() -> None:
    plan = Plan("", [Line("test", "", Cost(read=Tokens(fed=1234)))])
    assert "test, cached" in plan.compared({"test": Measured()})
    assert "cached" not in plan.compared({"test": Measured(read=Tokens(fed=1234))})


def test_a_long_part_is_counted_on_some_steps(settings: dict[str, Any], assemble: Callable) -> None:
    def plan() -> Cost:
        run: SimpleNamespace = assemble("TALLRec", settings)
        plan = plan_of(run.trainer, run.stages, run.train, run.valid, run.test)
        (line,) = [line for line in plan.lines if line.name == "ingredient"]
        assert line.cost is not None
        return line.cost

    exact = plan()
    with parts.counting(5):
        sampled = plan()
    assert exact.exact and not sampled.exact and exact.steps == sampled.steps
    assert sampled.trained.fed == pytest.approx(exact.trained.fed, rel=0.25) and sampled.trained != exact.trained
    assert f"~{sampled.trained.fed:,}" in str(Plan("", [Line("ingredient", TO_RUN, sampled)]))


@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_of_an_lm_is_that_of_its_weights(tied: bool, tiny_lm: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_lm, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # which the counter knows on a CPU
    shape = LMShape.of(config, torch.bfloat16)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.matrices == sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert shape.head == model.lm_head.weight.numel() and shape.weight_bytes == 2 * shape.parameters
    sharded = LMShape.of(config, torch.bfloat16, shards=4)  # a quarter of the two layers, and both whole
    assert sharded.weight_bytes == 2 * (shape.parameters - shape.matrices + shape.matrices // 4 + 2 * (shape.matrices // 2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(3, 10, dtype=torch.long), logits_to_keep=1)
    planned = shape.flops(Tokens(real=30, fed=30, pairs=300, logits=3))
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_part_that_reads_images_is_in_memory_and_multiplies_no_token() -> None:
    config = families.build("gemma3").config
    whole, text = (LMShape.of(part, torch.float32) for part in (config, config.text_config))
    assert whole.matrices == text.matrices and whole.parameters > text.parameters


def test_a_process_holds_its_share_of_all_experts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 8, "vocab_size": 100}
    config = Qwen3MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=16, num_experts_per_tok=2)
    one, four = (LMShape.of(config, torch.bfloat16, shards=shards) for shards in (1, 4))
    apart = 2 * 2 * 100 * 32  # bytes of the embeddings and of the head, which each process has whole
    layers = one.weight_bytes - apart
    assert four.weight_bytes == pytest.approx(apart + layers / 4 + 2 * layers / 8, rel=0.02)
    assert one.matrices < layers / 4, "two of sixteen experts are computed"


def test_sizes_may_differ_between_layers() -> None:
    """As in Gemma 4, whose layers with full attention have wider heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 100, "vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma4TextConfig(**sizes, layer_types=kinds, per_layer_config={1: {"head_dim": 32}})
    shape = LMShape.of(config, torch.float32)
    assert (shape.attention, shape.cached) == (4 * (16 + 32), 2 * 2 * (16 + 32))
    narrow = Gemma4TextConfig(**sizes, layer_types=kinds, per_layer_config={1: {"head_dim": 16}})
    assert training_memory(config).per_token > training_memory(narrow).per_token


def test_a_mixture_of_experts_is_planned_with_times(settings: dict[str, Any], tiny_lm: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 310}
    config = Qwen3MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    shutil.copytree(tiny_lm, tmp_path / "experts")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    given = {**settings, **SMALL, "llm_path": str(tmp_path / "experts"), "target_modules": ["q_proj", "v_proj"]}
    plan = plan_run("TALLRec", "tiny", config_dict=given)
    assert plan.lines[0].cost is not None and plan.lines[0].cost.flops and plan.speed is not None


def test_an_lm_whose_speed_cannot_be_measured_is_planned_without_times(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Speed:  # as a family of which two layers cannot be built
        raise ValueError("no layer has this cache")

    monkeypatch.setattr(planner, "probe", fails)
    plan = plan_run("TALLRec", "tiny", config_dict={**settings, **SMALL})
    assert plan.lines[0].cost is not None and plan.lines[0].cost.flops and plan.speed is None
    assert "the speed of this machine cannot be measured (no layer has this cache); no times are predicted" in caplog.text


@pytest.mark.parametrize(("card", "dtype"), [("t4", "float32"), ("v100", "float32"), ("a100", "bfloat16")])
def test_a_plan_for_a_card_has_the_dtype_of_a_run_there(card: str, dtype: str, settings: dict[str, Any]) -> None:
    config = LLMConfig("TALLRec", "tiny", config_dict={**settings, "dtype": "auto"})
    assert on_card(config, CARDS[card])["dtype"] == dtype


def test_the_speed_of_this_machine_is_measured(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, probed = torch.get_rng_state(), []
    monkeypatch.setattr(devices, "read_slices", lambda model: probed.append(type(model).__name__))
    found = probe(AutoConfig.from_pretrained(tiny_lm), torch.float32, "cpu", 0.1, 7)
    assert found.train > 0 and found.read > 0 and found.memory == 7 and "this machine" in found.source
    assert probed == ["LlamaForCausalLM"], "it reads the last states as a run does"
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_of_recbole_is_timed(settings: dict[str, Any]) -> None:
    given = {**settings, "epochs": 3, "eval_step": 1}
    plan = plan_run("SASRec", "tiny", config_dict=given)
    assert [line.name for line in plan.lines] == ["training", "test"]
    training, test = (line.cost for line in plan.lines)
    assert training is not None and training.seconds and training.at_most and training.parameters and training.steps
    assert "3 epochs of" in training.note and "3 validations of" in training.note
    for step, number in ((0, 0), (5, 1)):  # never, and at the end of fewer epochs
        line = plan_run("SASRec", "tiny", config_dict={**given, "eval_step": step}).lines[0].cost
        assert line is not None and f"{number} validation" in line.note and line.at_most == (number > 0)
    assert test is not None and test.seconds and not test.at_most
    assert plan_run("SASRec", "tiny", config_dict={**given, "eval_users": 7}).lines[1].cost.samples == 7 < test.samples
    assert plan.speed is None and plan.seconds(test) == test.seconds and "≤" in str(plan)
    elsewhere = plan_run("SASRec", "tiny", config_dict=given, device="h100")
    assert all(line.cost is not None and line.cost.seconds is None for line in elsewhere.lines)
    assert str(elsewhere).count("not estimated") == 2
    once = plan_run("SASRec", "tiny", config_dict={**given, "epochs": 1}, device="h100")
    assert "at most 1 epoch, not estimated" in str(once)


def test_the_seconds_of_a_long_epoch_are_written_out(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recbole_llm.classical.trial.trial", lambda step, steps: 1234.5)
    line = plan_run("SASRec", "tiny", config_dict={**settings, "epochs": 3}).lines[0].cost
    assert line is not None and "3 epochs of 1,234 s and" in line.note


def test_a_model_that_counts_is_planned_for_one_epoch(settings: dict[str, Any]) -> None:
    plan = plan_run("Pop", "tiny", config_dict={**settings, "epochs": 300, "eval_step": 1})
    training = plan.lines[0].cost
    assert training is not None and "1 epoch of" in training.note


def test_short_trainings_have_no_trial(settings: dict[str, Any]) -> None:
    costs = [line.cost for line in quick_start.assemble(LLMConfig("BPR", "tiny", config_dict=settings)).plan().lines]
    assert all(cost is not None and cost.seconds is None for cost in costs)


@pytest.mark.parametrize("model", ["SASRec", "BPR", "BERT4Rec"])
def test_a_trial_changes_no_result(model: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for folder, make in (("timed", partial(trials, 0.05)), ("untimed", partial(trials, 0.05, worth=1e9))):
        monkeypatch.setattr("recbole_llm.quick_start.trials", lambda *_, make=make, **__: make())
        given = {**settings, "epochs": 2, "checkpoint_dir": str(Path(settings["checkpoint_dir"]) / folder)}
        results.append(json.loads(Path(run_recbole_llm(model, "tiny", config_dict=given)["record"]).read_text()))
    timed, untimed = results
    assert timed["plan"][0]["planned"]["seconds"] and not untimed["plan"][0]["planned"]["seconds"]
    assert timed["plan"][0]["measured"]["seconds"] > 0
    assert timed["ranks"] == untimed["ranks"] and timed["results"] == untimed["results"]


def test_the_command_prints_the_table(settings: dict[str, Any], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**settings, **SMALL}))
    cli.main(["plan", "--model=TALLRec", "--dataset=tiny", f"--config_files={tmp_path / 'tiny.yaml'}", "--device=4090"])
    out = capsys.readouterr().out
    assert out.startswith("plan: TALLRec on tiny") and "RTX 4090" in out and "trained tokens" in out
    with pytest.raises(SystemExit):
        cli.main(["plan", "--dataset=tiny"])
    assert "--model is missing" in capsys.readouterr().err
