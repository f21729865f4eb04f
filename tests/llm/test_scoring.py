"""The scorer's contract: order, batches, normalisation, gradients, refusals; and the training loss beside it."""

import pytest
import torch

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import scoring
from recbole_llm.llm.forward import lm_loss
from recbole_llm.llm.lora import AdapterView, attach_lora
from recbole_llm.llm.packing import Branches, shared_batches, token_batches
from recbole_llm.llm.scoring import STRATEGIES, Scorer
from tests.llm.conftest import FAMILIES, VOCABULARY


def users(number=7, candidates=4, seed=0, longest=6):
    """Prompts of 1 to 24 tokens, answers of 1 to ``longest``."""
    draw = torch.Generator().manual_seed(seed)

    def row(low, high):
        return torch.randint(3, VOCABULARY, (int(torch.randint(low, high + 1, (1,), generator=draw)),), generator=draw).tolist()

    return [Prompt(row(1, 24)) for _ in range(number)], [[row(1, longest) for _ in range(candidates)] for _ in range(number)]


def mostly_soft(prompt):
    """Two tokens of three soft, by keys that are their ids; the ids beneath are of no matter."""
    slots = {place: token for place, token in enumerate(prompt.ids) if place % 3}
    return Prompt([0 if place in slots else token for place, token in enumerate(prompt.ids)], slots)


def answers_for(strategy, answers):
    return [[answer[:1] for answer in row] for row in answers] if strategy == "label" else answers


def test_naive_is_the_plain_log_softmax(build_model):
    model, (prompts, answers) = build_model("llama"), users()
    scores = Scorer("naive")(model, prompts, answers)
    for prompt, row, score in zip(prompts, answers, scores, strict=True):
        for answer, value in zip(row, score, strict=True):
            logp = model(torch.tensor([prompt.ids + answer])).logits[0].log_softmax(-1)
            expected = sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
            assert value == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_do_not_depend_on_the_batch_or_on_padding(build_model, strategy):
    model, (prompts, answers) = build_model("gpt2"), users()
    answers = answers_for(strategy, answers)
    together = Scorer(strategy, batch_tokens=10**6)(model, prompts, answers)
    alone = Scorer(strategy, batch_tokens=1, pad_token_id=9)(model, prompts, answers)
    assert together.shape == (7, 4) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_come_in_the_order_given(build_model, strategy):
    model, (prompts, answers) = build_model("llama-gqa"), users()
    scorer, answers = Scorer(strategy, batch_tokens=150), answers_for(strategy, answers)
    scores, shuffled = scorer(model, prompts, answers), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    again = scorer(model, [prompts[i] for i in shuffled], [answers[i][::-1] for i in shuffled])
    torch.testing.assert_close(again, scores[shuffled].flip(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mean_divides_by_the_answers_length(build_model, strategy):
    model, (prompts, answers) = build_model("opt"), users()
    answers = answers_for(strategy, answers)
    lengths = torch.tensor([[len(answer) for answer in row] for row in answers])
    mean, total = (Scorer(strategy, normalize)(model, prompts, answers) for normalize in ("mean", "sum"))
    torch.testing.assert_close(mean * lengths, total, atol=1e-4, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_that_bfloat16_would_tie_keep_their_order(build_model, strategy, biased):
    model, labels, (prompts, _) = build_model("llama").bfloat16(), list(range(5, 25)), users()
    head, states = model.get_output_embeddings(), []
    with torch.no_grad():
        head.weight[labels] = 5 * head.weight[labels] + 200 * head.weight[labels[:1]]  # nearly alike, and large
        if biased:
            head.bias = torch.nn.Parameter(torch.randn(len(head.weight)).bfloat16())
    hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0][:, -1].float()))
    logits = torch.stack([model(torch.tensor([prompt.ids])).logits[0, -1] for prompt in prompts])
    hook.remove()
    exact = torch.cat(states) @ head.weight.float().T + (head.bias.float() if biased else 0)  # [B, V]
    assert min(len({*row}) for row in logits[:, labels].tolist()) < len(labels), "bfloat16 ties some"
    scores = Scorer(strategy, batch_tokens=1)(model, prompts, [[[label] for label in labels]] * len(prompts))
    differences = exact[:, labels] - exact[:, labels[:1]]
    torch.testing.assert_close(scores - scores[:, :1], differences, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_bfloat16_is_sure_of_is_not_rounded(build_model, strategy):
    """The sum over the vocabulary of rounded logits may be below the largest of them: that likelihood would exceed 1."""
    model, (prompts, _) = build_model("llama").bfloat16(), users(20)
    head, states = model.get_output_embeddings(), []
    with torch.no_grad():
        head.weight *= 20
    with head.register_forward_pre_hook(lambda _, given: states.append(given[0][:, -1].float())):
        for prompt in prompts:
            model(torch.tensor([prompt.ids]))
    exact = (torch.cat(states) @ head.weight.float().T).log_softmax(-1)  # [B, V]
    best = exact.topk(3).indices
    scores = Scorer(strategy, batch_tokens=1)(model, prompts, [[[token] for token in row] for row in best.tolist()])
    torch.testing.assert_close(scores, exact.gather(1, best), atol=1e-3, rtol=1e-3)
    assert (scores <= 0).all()


@pytest.mark.parametrize("target_modules", [["lm_head"], ["q_proj"]])
def test_an_adapted_head_counts_in_bfloat16(build_model, target_modules):
    model, (prompts, answers) = build_model("llama").bfloat16(), users()
    adapted = attach_lora(model, name="a", r=2, lora_alpha=64, lora_dropout=0.0, target_modules=target_modules, seed=0)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.3)
    answers = answers_for("label", answers)
    found = Scorer("label", batch_tokens=1)(adapted, prompts, answers)
    row = [adapted(torch.tensor([prompt.ids])).logits[0, -1].float().log_softmax(-1) for prompt in prompts]
    expected = [[float(values[answer]) for (answer,) in own] for values, own in zip(row, answers, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.15, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_soft_tokens_score_as_the_tokens_they_embed(build_model, strategy):
    model, (prompts, answers) = build_model("opt"), users()
    answers, scorer = answers_for(strategy, answers), Scorer(strategy)
    soft = model.get_input_embeddings()(torch.arange(60))  # [S, D]: soft token t is the token t
    mixed = [mostly_soft(prompt) for prompt in prompts]
    torch.testing.assert_close(scorer(model, mixed, answers, soft), scorer(model, prompts, answers), atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_soft_tokens_and_lora_alike(build_model, strategy):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        build_model("llama-gqa"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    prompts, answers = users(3)
    answers = answers_for(strategy, answers)
    soft = model.get_input_embeddings()(torch.arange(60)).requires_grad_()  # [S, D]
    prompts = [mostly_soft(prompt) for prompt in prompts]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pull = torch.arange(12.0).view(3, 4)  # [B, C]

    def gradients(name):
        scores = Scorer(name, batch_tokens=60)(model, prompts, answers, soft)
        return torch.autograd.grad((scores * pull).sum(), [soft, *weights])

    for found, expected in zip(gradients(strategy), gradients("naive"), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_autocast_still_returns_fp32_scores(build_model, strategy, attention):
    model, (prompts, answers) = build_model("llama-gqa", attention), users()
    answers = answers_for(strategy, answers)
    exact = Scorer(strategy, "mean")(model, prompts, answers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = Scorer(strategy, "mean")(model, prompts, answers)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.2
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the log-softmax itself is fp32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bf16_model_is_normalised_in_fp32(build_model, strategy, attention):
    model = build_model("llama", attention).bfloat16()
    prompts = [Prompt([5, 6, 7]), Prompt([8, 9])]
    scores = Scorer(strategy, batch_tokens=1)(model, prompts, [[[4], [30]]] * 2)  # no padding: the very same logits
    for prompt, score in zip(prompts, scores, strict=True):
        exact = model(torch.tensor([prompt.ids])).logits[0, -1].float().log_softmax(-1)[[4, 30]]
        torch.testing.assert_close(score, exact, atol=4e-3, rtol=0)  # the logits of answers are computed in fp32, too
    _, answers = users(2)
    if strategy != "label":  # the mask of the tree has the model's dtype
        oracle = Scorer("naive", "mean")(model, prompts, answers)
        torch.testing.assert_close(Scorer(strategy, "mean")(model, prompts, answers), oracle, atol=0.1, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_are_made_only_where_they_are_read(build_model, strategy):
    model, prompts = build_model("llama"), [Prompt([5] * 20), Prompt([6] * 30)]
    answers = answers_for(strategy, [[[7, 8, 9], [7, 8]], [[9], [8, 9, 7]]])
    made = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, out: made.append(out.shape[:-1].numel()))
    Scorer(strategy)(model, prompts, answers)
    hook.remove()
    assert sum(made) == {"naive": 2 * 6, "prefix": 2 + 5, "tree": 2 + 5, "label": 2}[strategy]


def test_a_large_vocabulary_is_normalised_in_pieces(build_model, monkeypatch):
    model, (prompts, answers) = build_model("llama"), users()
    whole = Scorer()(model, prompts, answers)
    monkeypatch.setitem(scoring.LOGITS_AT_ONCE, "cpu", 2 * VOCABULARY + 1)
    assert torch.equal(Scorer()(model, prompts, answers), whole)


def tokens_run(model, scorer, prompts, answers, soft=None):
    """The scores, and the number of tokens that went through the model, padding included."""
    seen = []
    hook = model.base_model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    scores = scorer(model, prompts, answers, soft)
    hook.remove()
    return scores, sum(seen)


def beginning_alike(number, start, lengths):
    draw = torch.Generator().manual_seed(3)
    first = torch.randint(3, VOCABULARY, (start,), generator=draw).tolist()
    rest = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in lengths[:number]]
    for place, row in enumerate(rest):
        row[:1] = [3 + place][: len(row)]  # they differ from here on
    return [Prompt(first + row) for row in rest]


@pytest.mark.parametrize("strategy", ["tree", "prefix", "label"])
def test_a_common_beginning_is_run_once(build_model, strategy):
    model, (_, answers) = build_model("llama-gqa"), users(4)
    answers = answers_for(strategy, answers)
    prompts = beginning_alike(4, 40, [9, 3, 6, 1])
    found, number = tokens_run(model, Scorer(strategy, batch_tokens=1), prompts, answers)
    apart, whole = tokens_run(model, Scorer(strategy, batch_tokens=1, share=False), prompts, answers)
    assert whole - number == 3 * 40  # with one user in a batch there is no padding
    torch.testing.assert_close(found, Scorer("naive")(model, prompts, answers), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, apart, atol=1e-4, rtol=0)
    together = Scorer(strategy, batch_tokens=10**6)(model, prompts, answers)  # rows are padded behind the beginning
    torch.testing.assert_close(found, together, atol=1e-4, rtol=0)


def test_a_beginning_is_shared_only_where_it_pays(build_model):
    model, (_, answers) = build_model("llama"), users(2)
    scorer, apart = Scorer(batch_tokens=1), Scorer(batch_tokens=1, share=False)
    for start, lengths, gain in ((1, [30, 30], 0), (4, [30, 30], 4), (20, [1, 1], 20)):
        prompts = beginning_alike(2, start, lengths)
        assert tokens_run(model, apart, prompts, answers)[1] - tokens_run(model, scorer, prompts, answers)[1] == gain
    assert tokens_run(model, scorer, prompts[:1], answers[:1])[1] == tokens_run(model, apart, prompts[:1], answers[:1])[1]
    same = [prompts[0]] * 2  # the last token stays each user's own
    assert tokens_run(model, apart, same, answers)[1] - tokens_run(model, scorer, same, answers)[1] == len(prompts[0]) - 1


def test_a_beginning_ends_before_a_soft_token(build_model):
    model, (_, answers) = build_model("llama"), users(2)
    soft = model.get_input_embeddings()(torch.tensor([7, 9])) + 1  # [2, D]
    prompts = [Prompt([5] * 30 + [0] + [6] * 5, {30: user}) for user in range(2)]
    found, number = tokens_run(model, Scorer(batch_tokens=1), prompts, answers, soft)
    apart, whole = tokens_run(model, Scorer(batch_tokens=1, share=False), prompts, answers, soft)
    assert whole - number == 30
    torch.testing.assert_close(found, apart, atol=1e-4, rtol=0)
    assert (found[0] - Scorer()(model, prompts, answers, soft.flip(0))[0]).abs().max() > 1e-3


def test_each_view_of_adapters_has_its_own_beginning(build_model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        build_model("llama-gqa"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "x"
    )
    (_, answers), prompts = users(3), beginning_alike(3, 40, [9, 3, 6])
    views = [AdapterView(model, {"x": weight}) if weight else AdapterView(model) for weight in (1.0, 0.0, 0.5, 1.0)]
    found = [Scorer()(view, prompts, answers) for view in views]
    for view, scores in zip(views, found, strict=True):
        torch.testing.assert_close(scores, Scorer("naive")(view, prompts, answers), atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-2 and torch.equal(found[0], found[3])


def test_copies_of_a_cache_count_towards_a_batch(build_model):
    model, prompts = build_model("llama"), [Prompt([5] * 30), Prompt([6] * 30)]
    answers = [[[7, 8, 9]] * 4] * 2
    rows = []
    hook = model.base_model.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for budget in (319, 320):  # a prompt of 30, and 4 copies of it with 2 tokens each, for 2 users: 316
        Scorer("prefix", batch_tokens=budget - 4)(model, prompts, answers)
    hook.remove()
    assert rows == [1, 4, 1, 4, 2, 8]


def test_logits_are_bounded_by_the_vocabulary(build_model, monkeypatch):
    model, (prompts, answers) = build_model("llama"), users()
    whole, made = Scorer()(model, prompts, answers), []
    monkeypatch.setitem(scoring.LOGITS, "cpu", 40 * VOCABULARY)
    hook = model.lm_head.register_forward_hook(lambda _, inputs, out: made.append(out.shape[:-1].numel()))
    torch.testing.assert_close(Scorer()(model, prompts, answers), whole, atol=1e-4, rtol=0)
    hook.remove()
    assert max(made) <= 40 and len(made) > 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prompts_are_not_padded_without_a_token_for_it(build_model, strategy):
    model, (prompts, answers) = build_model("llama"), users(9)
    answers = answers_for(strategy, answers)
    masks = []
    hook = model.register_forward_pre_hook(lambda _, __, given: masks.append(given.get("attention_mask")), with_kwargs=True)
    found = Scorer(strategy, pad_token_id=None)(model, prompts, answers)
    hook.remove()
    assert all(mask is None or mask.dim() == 4 or mask.all() for mask in masks)
    torch.testing.assert_close(found, Scorer(strategy)(model, prompts, answers), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("scorer", "prompts", "answers", "message"),
    [
        (Scorer(), [[1]], [], "1 prompts and 0 rows"),
        (Scorer(), [[1], [1]], [[[1]], [[1], [2]]], "same number of answers"),
        (Scorer(), [[]], [[[1]]], "no tokens"),
        (Scorer(), [[1]], [[[1], []]], "no tokens"),
        (Scorer("label"), [[1]], [[[1], [1, 2]]], "answers of one token"),
        (Scorer(), [[1] * 127], [[[1, 2, 3]]], "129 tokens, more than the model's context of 128; lower max_prompt_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(build_model, scorer, prompts, answers, message):
    with pytest.raises(ValueError, match=message):
        scorer(build_model("llama"), [Prompt(prompt) for prompt in prompts], answers)


def test_unknown_settings_are_refused():
    for settings in ({"strategy": "beam"}, {"normalize": "pmi"}, {"batch_tokens": 0}):
        with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
            Scorer(**settings)


def test_tree_refuses_attention_without_free_masks(build_model):
    model = build_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*prefix"):
        Scorer("tree")(model, [Prompt([1])], [[[1, 2]]])


def test_batches_cover_everyone_within_the_budget():
    lengths, extras = [3, 50, 7, 7, 20, 1], [4, 4, 9, 1, 2, 2]
    batches = token_batches(lengths, extras, budget=48)
    assert sorted(sum(batches, [])) == list(range(6)) and batches[0] == [1]  # over the budget alone
    for batch in batches[1:]:
        assert len(batch) * (max(lengths[i] for i in batch) + max(extras[i] for i in batch)) <= 48
    assert batches == [[1], [4], [2, 3, 0], [5]]


@pytest.mark.parametrize(("budget", "expected"), [(400, [[0, 1, 2], [3, 4], [5, 6]]), (1000, [[0, 1, 2], [3, 4, 5, 6]])])
def test_a_batch_ends_before_a_tenth_is_padding_unless_it_is_small(budget, expected):
    assert shared_batches([40, 39, 38, 20, 19, 5, 4], budget, processes=1) == expected


def test_branches_see_the_prompt_and_themselves_only():
    tokens = torch.tensor([[[5, 6, 7], [8, 0, 0], [9, 4, 0]]])  # [1, 3, 3]
    branches = Branches.of(tokens, torch.tensor([[[1, 1, 1], [1, 0, 0], [1, 1, 0]]]).bool())
    assert branches.tokens.tolist() == [[5, 6, 9]] and branches.depth.tolist() == [[0, 1, 0]]
    visible = branches.visible(torch.tensor([[False, True]]))  # [1, 3, 2 + 3]
    assert visible.int().tolist() == [[[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 1]]]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_models_own(build_model, family):
    model, (prompts, answers) = build_model(family), users()
    rows = [(prompt + row[0]).ids for prompt, row in zip(prompts, answers, strict=True)]
    mask = [[0] * len(prompt) + [1] * len(row[0]) for prompt, row in zip(prompts, answers, strict=True)]
    mask[0][0] = 1  # a first token has nothing before it: never a target
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # [B, T]
    labels = torch.tensor(
        [
            [token if wanted else -100 for token, wanted in zip(row, wants, strict=True)] + [-100] * (longest - len(row))
            for row, wants in zip(rows, mask, strict=True)
        ]
    )
    expected = model(ids, attention_mask=(ids > 0).long(), labels=labels).loss
    examples = [Example(Prompt(row), wants) for row, wants in zip(rows, mask, strict=True)]
    torch.testing.assert_close(lm_loss(model, examples), expected, atol=1e-5, rtol=0)


def test_loss_of_rows_with_soft_tokens(build_model):
    model, (prompts, _) = build_model("llama"), users()
    soft = model.get_input_embeddings()(torch.tensor([7, 9])).requires_grad_()  # [2, D]
    rows = [Example.of(prompt.surrounded([0], [1]), [4, 5]) for prompt in prompts]
    loss = lm_loss(model, rows, soft=soft)
    plain = [Example.of(Prompt([7, *prompt.ids, 9]), [4, 5]) for prompt in prompts]
    torch.testing.assert_close(loss, lm_loss(model, plain), atol=1e-5, rtol=0)
    loss.backward()
    assert (soft.grad.abs().sum(-1) > 0).all()


def test_rows_beyond_the_context_are_refused_in_training(build_model):
    for family in ("gpt2", "llama"):
        with pytest.raises(ValueError, match="a row has 130 tokens, more than the model's context of 128; lower max_prompt"):
            lm_loss(build_model(family), [Example.of(Prompt([5] * 128), [6, 7])])


def test_loss_without_a_target_is_refused(build_model):
    with pytest.raises(ValueError, match="answer mask"):
        lm_loss(build_model("llama"), [Example(Prompt([1, 2]), [1, 0])])
