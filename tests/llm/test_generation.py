"""Greedy answers equal those of a loop that any reader can check: one prompt at a time, no cache, no padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.forward import context_length
from recbole_llm.llm.generation import Generator, check_generates
from recbole_llm.llm.lora import AdapterView, attach_lora
from tests.llm.conftest import FAMILIES
from tests.llm.families import CONTEXT, build

END, NEW = 2, 12
PROMPTS = [[1, 30, 7, 19], [1, 8], [1, 40, 41, 42, 9, 10, 33], [1, 8, 8]]


def reference(model: Any, embeddings: Tensor, new_tokens: int, penalty: float = 1.0) -> list[int]:
    """Greedy tokens after embeddings [L, D], up to and without the end token."""
    found: list[int] = []
    for _ in range(new_tokens):
        following = model.get_input_embeddings()(torch.tensor(found, dtype=torch.long))
        logits = model(inputs_embeds=torch.cat([embeddings, following])[None], use_cache=False).logits[0, -1].clone()
        for token in {*found}:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        if (token := int(logits.argmax())) == END:
            break
        found.append(token)
    return found


def texts(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows]


@pytest.fixture
def tokenizer(build_tokenizer: Any) -> Any:
    return build_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("batch_tokens", [10, 1000])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_those_of_the_plain_loop(
    family: str, batch_tokens: int, penalty: float, build_model: Any, tokenizer: Any
) -> None:
    model = build_model(family)
    expected = [reference(model, model.get_input_embeddings()(torch.tensor(ids)), NEW, penalty) for ids in PROMPTS]
    assert len({*map(tuple, expected)}) > 1
    answers = Generator(tokenizer, NEW, penalty, batch_tokens)(model, [Prompt(ids) for ids in PROMPTS])
    assert answers == texts(tokenizer, expected)


@torch.no_grad()
def test_an_lm_that_cannot_read_padding_gets_none(tokenizer: Any) -> None:
    model = build("rwkv", vocab_size=60)
    expected = texts(tokenizer, [reference(model, model.get_input_embeddings()(torch.tensor(ids)), NEW) for ids in PROMPTS])
    prompts = [Prompt(ids) for ids in PROMPTS]
    assert Generator(tokenizer, NEW, padding=False)(model, prompts) == expected
    assert Generator(tokenizer, NEW)(model, prompts) != expected


@torch.no_grad()
def test_an_lm_that_cannot_generate_from_vectors_is_refused(tokenizer: Any) -> None:
    check_generates(build("llama").config)
    model = build("openai-gpt", vocab_size=60)
    with pytest.raises(ValueError, match="inputs_embeds"):  # by transformers, after the training
        Generator(tokenizer, NEW)(model, [Prompt(PROMPTS[0])])
    with pytest.raises(
        ValueError, match=r"scoring: published .* OpenAIGPTLMHeadModel of transformers cannot; give scoring: like"
    ):
        check_generates(model.config)


@torch.no_grad()
def test_soft_tokens_are_read_at_their_slots(build_model: Any, tokenizer: Any) -> None:
    model, soft = build_model("llama"), torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 3
    prompts = [Prompt([1, 0, 7, 0], {1: 0, 3: 1}), Prompt([1, 0], {1: 1}), Prompt([1, 8, 9])]
    embed = model.get_input_embeddings().weight
    rows = [torch.stack([embed[1], soft[0], embed[7], soft[1]]), torch.stack([embed[1], soft[1]]), embed[[1, 8, 9]]]
    expected = texts(tokenizer, [reference(model, row, NEW, 1.5) for row in rows])
    assert Generator(tokenizer, NEW, 1.5)(model, prompts, soft) == expected
    assert Generator(tokenizer, NEW, 1.5)(model, prompts, soft * 0) != expected


@torch.no_grad()
def test_the_generation_settings_of_a_folder_change_nothing_but_where_answers_end(build_model: Any, tokenizer: Any) -> None:
    model, prompts = build_model("qwen2-gqa"), [Prompt(ids) for ids in PROMPTS]
    before = Generator(tokenizer, NEW)(model, prompts)
    own = model.generation_config
    own.update(repetition_penalty=3.0, no_repeat_ngram_size=1, do_sample=True, top_k=2, temperature=9.0, max_length=5)
    own.update(suppress_tokens=[*range(3, 30)], begin_suppress_tokens=[*range(30, 50)])
    assert Generator(tokenizer, NEW)(model, prompts) == before
    assert model.generation_config is own and own.no_repeat_ngram_size == 1
    (longest,) = [max(before, key=len)]
    (other,) = tokenizer(longest[3], add_special_tokens=False)["input_ids"]
    own.eos_token_id = [END, other]
    assert Generator(tokenizer, NEW)(model, prompts) == [text.partition(longest[3])[0] for text in before]


@torch.no_grad()
def test_a_complete_answer_is_not_continued_and_the_others_are(build_model: Any, tokenizer: Any) -> None:
    model, prompts, seen = build_model("opt"), [Prompt(ids) for ids in PROMPTS], []
    generator = Generator(tokenizer, NEW)
    whole = generator(model, prompts)
    mark = max(whole, key=len)[2]

    def complete(text: str) -> bool:
        seen.append(text)
        return mark in text

    expected = [text[: text.find(mark) + 1] if mark in text else text for text in whole]
    assert expected != whole and generator(model, prompts, None, complete) == expected
    assert all(text.startswith(one) for one, text in zip(expected, whole, strict=True)) and seen


@torch.no_grad()
def test_each_view_answers_with_its_own_adapters(build_model: Any, tokenizer: Any) -> None:
    model, prompts = build_model("llama-gqa"), [Prompt(ids) for ids in PROMPTS]
    generator = Generator(tokenizer, NEW)
    base = generator(model, prompts)
    lora = attach_lora(model, name="one", r=4, lora_alpha=8, lora_dropout=0.0, seed=0).eval()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    with_adapter, without = AdapterView(lora, {"one": 1.0}), AdapterView(lora, {})
    answers = generator(with_adapter, prompts)
    assert answers != base == generator(without, prompts)
    assert generator(with_adapter, prompts) == answers

    def loop(ids: list[int]) -> list[int]:
        with_adapter.select()
        return reference(lora.get_base_model(), lora.get_input_embeddings()(torch.tensor(ids)), NEW)

    assert answers == texts(tokenizer, [loop(ids) for ids in PROMPTS])


@torch.no_grad()
def test_an_answer_ends_with_the_context_and_a_prompt_without_room_is_refused(build_model: Any, tokenizer: Any) -> None:
    model = build_model("gpt2")  # learned positions: one more is an index error
    generator = Generator(tokenizer, 500)
    (answer,) = generator(model, [Prompt([1] + [9] * 124)])
    assert len(answer) <= 3
    with pytest.raises(ValueError, match="a prompt has 128 tokens and leaves no room .* context of 128; lower max_prompt_tokens"):
        generator(model, [Prompt([1] + [9] * 127)])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        Generator(tokenizer, 0)


@torch.no_grad()
def test_the_context_is_that_of_scoring_whatever_its_name(tokenizer: Any) -> None:
    model = build("mpt", vocab_size=60)  # max_seq_len
    assert context_length(model.config) == CONTEXT
    with pytest.raises(ValueError, match=f"leaves no room .* context of {CONTEXT}"):
        Generator(tokenizer, 5)(model, [Prompt([1] + [9] * (CONTEXT - 1))])


def test_end_tokens_are_those_of_tokenizer_and_folder(build_model: Any, tokenizer: Any) -> None:
    model, generator = build_model("llama"), Generator(tokenizer, NEW)
    view = AdapterView(attach_lora(build_model("llama"), name="x", r=2, lora_alpha=4, lora_dropout=0.0, seed=0))
    for own, expected in ((END, [END]), ([END, 9, 7], [END, 7, 9]), (None, [END])):
        for lm, settings in ((model, model.generation_config), (view, view.selected().generation_config)):
            settings.eos_token_id = own
            assert generator.end_tokens(lm) == expected
