"""Every causal LM family is exact or refused before anything is trained: never raw, never silently wrong."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm.encoding import encode
from recbole_llm.llm.exactness import NotExactError, check_vocabulary, exact_reading, probe_lengths
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.generation import check_generates
from recbole_llm.llm.reading import Reading
from recbole_llm.llm.scoring import Scorer
from tests.llm import families
from tests.llm.conftest import tiny_tokenizer

LONGEST = 80
NOT_BUILT, ALL = families.NOT_BUILT, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SOME = {  # one of each kind, in the fast set: what it is run by, and whether it pads
    "llama": Reading(),
    "gpt2": Reading(),
    "bloom": Reading("prefix"),  # position biases from the mask
    "mistral": Reading("prefix", share=False),  # a window
    "gpt_oss": Reading("prefix", share=False),  # a window in every second layer
    "llama4_text": Reading("prefix", share=False),  # chunks
    "lfm2": Reading("naive", share=False),  # convolutions
    "mamba": Reading("naive", share=False),
    "qwen3_next": Reading("naive", share=False),  # linear attention
    "bart": Reading("prefix", padding=False),  # positions that cannot be given
    "rwkv": Reading("naive", padding=False, share=False),
    "bert": None,  # not causal
    "deepseek_v4": Reading("naive", padding=False, share=False),  # compressed attention, and ids that layers read themselves
}


def tokens(number, draw):
    return torch.randint(families.VOCABULARY, (number,), generator=draw).tolist()


def rows():
    """Prompts with a common beginning, reaching beyond the windows, and their answers; not those of the check."""
    draw = torch.Generator().manual_seed(5)
    start = tokens(10, draw)
    prompts = [start + tokens(number, draw) for number in (5, 40, 23, 12)]
    return prompts, [[tokens(number, draw) for number in (4, 2, 1)] for _ in prompts]


def truth(model, prompts, answers):
    """log P of each answer, from one row of ids at a time."""
    scores = torch.zeros(len(prompts), len(answers[0]))
    for user, (prompt, some) in enumerate(zip(prompts, answers, strict=True)):
        for place, answer in enumerate(some):
            logp = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
            scores[user, place] = sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
    return scores


@torch.no_grad()
def check_scores(model):
    """The reading of a ranker, after comparing scores and loss; None if the model is refused."""
    try:
        reading = exact_reading(model, scorer="tree", longest=LONGEST, source="some-lm")
    except NotExactError as error:
        assert "llm_path: some-lm" in str(error) and model.config.model_type in str(error)
        return None
    prompts, answers = rows()
    pad, examples = 0 if reading.padding else None, [Example.of(Prompt(p), a[0]) for p, a in zip(prompts, answers, strict=True)]
    scorer = Scorer(reading.scorer or "tree", pad_token_id=pad, share=reading.share)
    expected = truth(model, prompts, answers)
    assert expected.std() > 0.1  # otherwise everything is near
    torch.testing.assert_close(scorer(model, [Prompt(ids) for ids in prompts], answers), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(lm_loss(model, examples), -expected[:, 0].sum() / 16, atol=1e-3, rtol=0)
    assert bool(reading.warnings) == (reading.scorer is not None or not reading.padding)
    return reading


@torch.no_grad()
def check_encoding(model):
    try:
        reading = exact_reading(model, scorer=None, longest=LONGEST, source="some-lm")
    except NotExactError as error:
        assert model.config.model_type in str(error)
        return
    prompts, _ = rows()
    expected = torch.stack([model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in prompts])
    found = encode(model, [Prompt(row) for row in prompts], 0 if reading.padding else None)
    torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.std()), rtol=1e-3)


@pytest.mark.parametrize("family", SOME)
def test_each_kind_is_exact_or_refused(family):
    model, expected = families.build(family), SOME[family]
    reading = check_scores(model)
    assert (reading and (reading.scorer, reading.padding, reading.share)) == (
        expected and (expected.scorer, expected.padding, expected.share)
    )
    check_encoding(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in ALL if family not in SOME and family not in NOT_BUILT])
def test_every_family_is_exact_or_refused(family):
    with warnings.catch_warnings(action="ignore"):
        model = families.build(family)
    check_scores(model)
    check_encoding(model)


def test_few_families_cannot_be_built():
    assert len(NOT_BUILT) <= 10 and all(NOT_BUILT.values())
    tested = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if f"transformers=={transformers.__version__}" in tested:  # an older one lacks the newest families
        assert set(NOT_BUILT) <= set(ALL)


def test_a_window_out_of_reach_changes_nothing():
    model = families.build("mistral", sliding_window=LONGEST)
    assert exact_reading(model, scorer="tree", longest=LONGEST, source="") == Reading(context=families.CONTEXT)
    assert probe_lengths(model.config, LONGEST) == (20, 40)
    assert probe_lengths(families.build("mistral", sliding_window=50).config, LONGEST)[1] == 66  # beyond the window
    assert probe_lengths(model.config, 30) == (13, 27)


def test_attention_without_free_masks_runs_prefix():
    """As flash attention is: it takes the mask of padding alone."""
    AttentionInterface.register("mask_of_padding", sdpa_attention_forward)
    AttentionMaskInterface.register("mask_of_padding", sdpa_mask)
    model = families.build("llama")
    model.set_attn_implementation("mask_of_padding")
    found = exact_reading(model, scorer="tree", longest=LONGEST, source="")
    assert (found.scorer, found.padding, found.share) == ("prefix", True, True)
    assert "needs attn_implementation sdpa or eager, not 'mask_of_padding'" in found.warnings[0]


@pytest.mark.parametrize(("family", "scorer"), [("llama", None), ("mistral", "prefix"), ("lfm2", "naive")])
def test_half_precision_is_compared_with_its_own_tolerance(family, scorer):
    found = exact_reading(families.build(family).bfloat16(), scorer="tree", longest=LONGEST, source="")
    assert found.scorer == scorer and found.padding


def test_labels_and_naive_are_checked_too():
    for scorer in ("label", "naive", "prefix"):
        assert exact_reading(families.build("llama"), scorer=scorer, longest=LONGEST, source="").scorer is None


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = tiny_tokenizer(eos_token="</s>")
    check_vocabulary(families.build("llama"), tokenizer, "some-lm")
    with pytest.raises(NotExactError, match="tokenizer of some-lm has 40 tokens, but the LM embeds 39.*resize_token_embeddings"):
        check_vocabulary(families.build("llama", vocab_size=39), tokenizer, "some-lm")


@torch.no_grad()
def test_layers_that_look_up_ids_are_given_them():
    """Without the ids, transformers compares each vector with the whole vocabulary, and finds none in half precision."""
    model = families.build("gemma4_text").bfloat16()
    assert exact_reading(model, scorer="prefix", longest=LONGEST, source="").scorer is None
    for reads in ({"scorer": "prefix", "vectors": True}, {"scorer": None}):
        with pytest.raises(
            NotExactError, match="gemma4_text.*: its layers look up the ids of tokens, so it takes no soft tokens"
        ):
            exact_reading(model, longest=LONGEST, source="", **reads)
    with pytest.raises(ValueError, match="scoring: published generates answers from vectors, which Gemma4ForCausalLM"):
        check_generates(model.config)
