"""Only LoRA weights train, micro-batches add up to the batch, and a killed training ends where it would have ended."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.data.domains import TrainingExample
from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import finetune as module
from recbole_llm.llm.adapter_folders import WEIGHTS_FILE
from recbole_llm.llm.causal_lm import load_causal_lm
from recbole_llm.llm.finetune import LoRATrainingConfig, finetune
from recbole_llm.llm.lora import load_adapters
from recbole_llm.store.stages import StageCache, Work
from recbole_llm.training.loop import LoopOptions
from recbole_llm.training.schedule import Schedule

EXAMPLES = [TrainingExample(0, user, end) for user in range(5) for end in (1, 2)]
PAD = 2


def encode(example: TrainingExample, rng: np.random.Generator) -> Example:
    """Examples of many lengths, two prompt tokens and then the answer; one token is drawn, as negatives are."""
    answer = [10 + example.user, *range(20, 20 + 3 * example.end), int(rng.integers(50, 60))]
    return Example.of(Prompt([5, 6]), answer)


def of_two_tokens(first: int, second: int) -> Example:
    return Example.of(Prompt([first]), [second])


def training_config(**changes) -> LoRATrainingConfig:
    values = dict(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules="all-linear",
        use_rslora=False,
        train_mode="prefix",
        samples=None,
        epochs=2,
        batch_size=4,
        learning_rate=1e-2,
        schedule=Schedule(warmup_ratio=0.1),
        positions="all",
        valid="ranking",
        held_out=0.02,
        max_grad_norm=1.0,
        eval_steps=None,
        patience=0,
        seed=0,
    )
    return LoRATrainingConfig(**(values | changes))


@pytest.fixture
def model(tiny_lm: Path):
    return load_causal_lm(tiny_lm, device="cpu").model


def run(
    model, folder: Path, validate=None, examples=EXAMPLES, save_every=20.0, options=None, **changes
) -> dict[str, torch.Tensor]:
    """The adapter's tensors after a training that starts, as every stage does, from the seed."""
    torch.manual_seed(0)
    finetune(
        model,
        "test",
        examples,
        encode,
        training_config(**changes),
        validate=validate,
        work=Work(folder / "out", folder / "scratch", StageCache(folder)),
        options=LoopOptions(save_every=save_every, show_progress=False, **(options or {})),
    )
    return load_file(folder / "out" / WEIGHTS_FILE)


def difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


# -- what trains -------------------------------------------------------------------------------------------------------


def test_only_lora_weights_train_and_the_base_comes_back_byte_identical(model, tmp_path, monkeypatch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, seen = module.lm_loss, []

    def spy(lm, *rest):
        seen.append([name for name, parameter in lm.named_parameters() if parameter.requires_grad])
        return loss(lm, *rest)

    monkeypatch.setattr(module, "lm_loss", spy)
    adapter = run(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert seen and all("lora_" in name for names in seen for name in names) and len(seen[0]) == len(adapter)
    assert all(tensor.abs().max() > 0 for key, tensor in adapter.items() if "lora_B" in key)  # every one of them moved


def test_the_same_seed_trains_the_same_adapter_and_another_seed_another(model, tmp_path):
    one, same = run(model, tmp_path / "a"), run(model, tmp_path / "b")
    assert difference(one, same) == 0
    assert difference(one, run(model, tmp_path / "c", seed=1)) > 0


def test_the_adapter_folder_loads_in_vanilla_peft(model, tiny_lm, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(model, tmp_path)
    tokens = torch.arange(10, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    plain = base(tokens).logits
    vanilla = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()(tokens).logits
    ours = load_adapters(model, {"test": tmp_path / "out"})(tokens).logits
    torch.testing.assert_close(vanilla, ours, atol=1e-6, rtol=0)
    assert (vanilla - plain).abs().max() > 1e-3


def test_the_best_validated_weights_are_written(model, tmp_path):
    taken = []

    def validate(lm) -> float:
        assert not lm.training and not torch.is_grad_enabled()
        taken.append({n: p.detach().clone() for n, p in lm.named_parameters() if p.requires_grad})
        return float(len(taken) == 2)

    adapter = run(model, tmp_path, validate, eval_steps=1)
    written = {name.replace(".test.", "."): tensor for name, tensor in taken[1].items()}
    assert difference(adapter, written) == 0
    assert len(taken) == 4  # two epochs of two steps


# -- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_tokens": 20}, {"batch_tokens": 1}, {"gradient_checkpointing": True}])
def test_parts_and_checkpointing_equal_the_undivided_step_also_with_uneven_answers(model, tmp_path, options, monkeypatch):
    # Adam divides by the size of a gradient, and so makes rounding of the smallest ones as large as a step
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr=lr))
    settings = {"lora_dropout": 0.0, "learning_rate": 0.1}
    full = run(model, tmp_path / "full", **settings)
    assert difference(full, run(model, tmp_path / "parts", **settings, options=options)) < 1e-6
    assert difference(full, run(model, tmp_path / "other", **settings, seed=1)) > 1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_examples_than_a_batch_still_train(model, tmp_path, count):
    assert run(model, tmp_path, examples=EXAMPLES[:count], batch_size=8, options={"batch_tokens": 9})


def test_checkpointing_with_dropout_draws_the_same_masks_again(model, tmp_path):
    settings = {"lora_dropout": 0.3, "epochs": 1}
    whole = run(model, tmp_path / "whole", **settings, options={"gradient_checkpointing": False})
    assert difference(whole, run(model, tmp_path / "again", **settings, options={"gradient_checkpointing": True})) < 1e-5
    assert "forward" not in vars(model.model.layers[0])  # the model is as before


# -- interruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("die_at", [1, 3, 6])
def test_a_training_killed_midway_ends_bit_equal(model, tmp_path, monkeypatch, die_at):
    def validate(lm) -> float:
        return -float(lm(torch.arange(10, 20)[None]).logits.std())

    whole = run(model, tmp_path / "whole", validate, options={"batch_tokens": 20})
    loss, calls = module.lm_loss, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > die_at:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(module, "lm_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "resumed", validate, options={"batch_tokens": 20}, save_every=0)
    monkeypatch.setattr(module, "lm_loss", loss)
    assert difference(run(model, tmp_path / "resumed", validate, options={"batch_tokens": 20}, save_every=0), whole) == 0


def test_a_training_that_diverges_names_the_key_to_lower_and_writes_nothing(model, tmp_path):
    def validate(lm) -> float:
        return float(lm(torch.arange(3)[None]).logits.sum())

    with pytest.raises(ValueError, match="lower `lora_learning_rate`"):
        run(model, tmp_path, validate, learning_rate=1e30, max_grad_norm=None)
    assert not (tmp_path / "out").exists()
