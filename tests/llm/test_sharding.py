"""An LM whose layers are spread over processes computes what the whole one does, bit by bit.

What two processes gather is pretended in most tests: both parts are in this process. Real ones are in the last test.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from several import Pretended, exit_codes, start
from torch import Tensor

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import sharding
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import _SELECTIONS, AdapterView, attach_lora, load_adapters, save_adapter, unload
from recbole_llm.llm.micro_batches import bounded_memory
from recbole_llm.llm.scoring import Scorer
from recbole_llm.llm.sharding import shard, sharded_layer
from recbole_llm.store import processes
from recbole_llm.store.processes import ProcessLostError, alone, current, joined
from recbole_llm.training.loop import LoopOptions

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2-gqa", "gpt2"]
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "seed": 0}
PROMPTS = [Prompt([5, 6, 7, 8, *rest]) for rest in ([9, 10], [11, 12, 13], [14])]
ANSWERS = [[[3, 4], [5], [6, 7, 8]], [[9], [3, 5], [4]], [[8, 8], [7], [6]]]
EXAMPLES = [Example.of(prompt, row[0]) for prompt, row in zip(PROMPTS, ANSWERS, strict=True)]


@dataclass(frozen=True)
class Half(Pretended):
    """The first of two processes that has the other's parts, too."""

    parts: Any = None

    def smallest(self, number: int) -> int:
        return number

    def whole(self, part: Tensor) -> Tensor:
        self.parts.gathered.append(part.data_ptr())
        return torch.cat([part, self.parts.others[part.data_ptr()]])


@pytest.fixture
def sharded(build_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an LM of a family, spread over two processes of which this is the first."""
    monkeypatch.setattr(processes, "_helps", [])
    token: list[Any] = []

    def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
        parts = SimpleNamespace(others={}, gathered=[])
        first, second = (shard(build_model(family).to(dtype), Half(rank, 2, parts=parts), CPU) for rank in (0, 1))
        for own, other in zip(layers(first), layers(second), strict=True):
            parts.others[own.part.data_ptr()] = other.part
        token.append(processes._current.set(Half(0, 2, parts=parts)))
        return first

    yield build
    for one in reversed(token):
        processes._current.reset(one)


def layers(model: Any) -> list[Any]:
    found = (sharded_layer(weight) for weight in model.parameters())
    return list(dict.fromkeys(layer for layer in found if layer is not None))


def gradients(model: Any, loss: Any) -> dict[str, Tensor]:
    loss().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("llama", torch.bfloat16)])
def test_a_process_holds_half_of_the_layers_and_scores_as_with_the_whole(
    build_model: Any, sharded: Any, family: str, dtype: torch.dtype
) -> None:
    whole, model = build_model(family).to(dtype), sharded(family, dtype)
    inside = [weight for weight in model.parameters() if sharded_layer(weight)]
    total = sum(weight.numel() * weight.element_size() for weight in inside)
    held = sum(layer.part.untyped_storage().nbytes() for layer in layers(model))
    assert len(inside) > 8 and total / 2 <= held < total / 2 + len(inside) * 2 * sharding.ALIGNED
    assert sum(weight.untyped_storage().nbytes() for weight in inside) == dtype.itemsize * len(inside)  # what stands for them
    for strategy in ("naive", "prefix", "tree"):
        with torch.no_grad():
            scorer = Scorer(strategy)
            assert torch.equal(scorer(model, PROMPTS, ANSWERS), scorer(whole, PROMPTS, ANSWERS))
    assert all(bool(weight.isnan().all()) for weight in inside)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_are_those_of_the_whole(
    build_model: Any, sharded: Any, family: str, checkpointing: bool, tmp_path: Any
) -> None:
    found = []
    for model in (build_model(family), sharded(family)):
        adapted = attach_lora(model, name="x", **LORA).train()  # type: ignore[arg-type]
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.full_like(parameter, 0.1)
        options = LoopOptions(batch_tokens=64, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)  # GPT-2 has dropout of its own
        with bounded_memory(model, options, tmp_path, r=2):
            found.append(gradients(adapted, lambda adapted=adapted: lm_loss(adapted, EXAMPLES)))
    assert equal(found[1], found[0]) and len(found[0]) > 4


def test_gradients_through_a_cache_are_those_of_the_whole(build_model: Any, sharded: Any) -> None:
    """Those of a shared beginning reach the last layer by its keys and values alone."""
    found = []
    for model in (build_model("llama"), sharded("llama")):
        soft = torch.ones(1, 4, model.config.hidden_size, requires_grad=True)
        cache = model(inputs_embeds=soft, use_cache=True, logits_to_keep=1).past_key_values
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache, use_cache=True).logits.logsumexp(-1).sum().backward()
        found.append(soft.grad)
    assert torch.equal(found[1], found[0]) and bool(found[0].any())


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_adapters_score_as_those_of_the_whole(build_model: Any, sharded: Any, family: str, tmp_path: Any) -> None:
    for number, name in enumerate("xy"):
        adapted = attach_lora(build_model(family), name=name, **LORA | {"seed": number})  # type: ignore[arg-type]
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.data = torch.full_like(parameter, 0.1 * (number + 1))
        save_adapter(adapted, name, tmp_path / name)
    found: list[list[Tensor]] = []
    for base in (build_model(family), sharded(family)):
        model, scorer = load_adapters(base, {name: tmp_path / name for name in "xy"}), Scorer("tree")
        views = [AdapterView(model, adapters, fold=True) for adapters in ({"x": 1.0}, {"x": 0.5, "y": 0.5}, {}, {"x": 1.0})]
        with torch.no_grad():
            found.append([scorer(view, PROMPTS, ANSWERS) for view in views])
        assert views[0]._foldable(_SELECTIONS[model])
        soft = AdapterView(model, {"x": torch.tensor(0.5, requires_grad=True)}, fold=True)
        found[-1].append(scorer(soft, PROMPTS, ANSWERS).detach())  # with gradients, nothing is folded
        unload(model)
        with torch.no_grad():
            found[-1].append(scorer(base, PROMPTS, ANSWERS))
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][1]) and torch.equal(found[0][0], found[0][3])


def test_a_change_that_fails_leaves_no_trace(build_model: Any, sharded: Any) -> None:
    whole, model, scorer = build_model("llama"), sharded("llama"), Scorer("tree")
    (layer, *_), done = layers(model), []

    def fail() -> None:
        done.append(1)
        raise MemoryError

    with torch.no_grad():
        expected = scorer(whole, PROMPTS, ANSWERS)
        layer.change("one", lambda: model.model.layers[0].mlp.up_proj.weight.zero_())
        layer.change("two", fail)
        with pytest.raises(MemoryError):
            scorer(model, PROMPTS, ANSWERS)
        assert sharded_layer(model.model.layers[0].mlp.up_proj.weight) is layer, "its modules have no changed weights"
        layer.change("one", None)
        layer.change("two", None)
        assert done and torch.equal(scorer(model, PROMPTS, ANSWERS), expected)


def test_a_layer_is_gathered_once_a_pass(sharded: Any) -> None:
    model = sharded("llama")
    gathered, number = current().parts.gathered, len(layers(model))  # type: ignore[attr-defined]
    soft = torch.ones(1, 4, model.config.hidden_size, requires_grad=True)
    output = model(inputs_embeds=soft).logits
    assert len(gathered) == number
    output.sum().backward()
    assert len(gathered) == 2 * number - 1  # the last layer is still there


def test_one_process_alone_does_not_run_it(sharded: Any) -> None:
    model = sharded("llama")
    with alone(), pytest.raises(ValueError, match="fsdp: True: the LM is spread over 2 processes, and one of them alone"):
        model(input_ids=torch.tensor([[3]]))
    model(input_ids=torch.tensor([[3]]))


def test_an_lm_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="fsdp: True: Linear has no layers .* give fsdp: False and load_in_4bit: True"):
        shard(torch.nn.Linear(2, 2), Half(0, 2), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_processes_with_unequal_passes_keep_step(build_model: Any, dies: bool) -> None:
    """The first runs three passes and a backward pass, the other one pass; both wait for each other afterwards."""

    def work() -> None:
        with joined() as found:
            model = shard(build_model("llama"), found, CPU)
            soft = torch.ones(1, 4, model.config.hidden_size, requires_grad=True)
            for _ in range(3 if found.main else 1):
                output = model(inputs_embeds=soft).logits
            if found.main:
                output.sum().backward()
                assert soft.grad is not None and bool(soft.grad.isfinite().all())
            elif dies:
                raise SystemExit(7)
            calls = [lambda: model(inputs_embeds=soft).logits[0]] * 3
            with torch.no_grad():
                computed = found.compute(calls, CPU)
            assert torch.equal(computed[0], computed[1]) and torch.equal(computed[0], output[0])

    def dying() -> None:
        try:
            work()
        except ProcessLostError:
            raise SystemExit(2) from None

    assert exit_codes(start(dying), 60) == ([2, 7] if dies else [0, 0])
