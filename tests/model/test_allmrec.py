"""ALLMRec: soft tokens where the items are, a frozen LM and collaborative model, controls that are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.allmrec import LLM_ONLY, TEXT_ONLY
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.files import sha256_file
from recbole_llm.training.loop import TrainingLoop

QUOTED = '", "'
LISTWISE = {
    "soft_prompt": "allmrec",
    "user_text": "{user} is a user representation. ",
    "history_separator": repr(QUOTED),
    "candidate_separator": repr(QUOTED),
}
PROMPTS: dict[str, dict[str, Any]] = {"history": {}, "listwise": LISTWISE}
Made = SimpleNamespace


@pytest.fixture(scope="module")
def trained(module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``trained(**changes)``: a model with its stages, of which most are kept, and seven test users; made once."""
    kept: dict[str, Made] = {}

    def trained(**changes: Any) -> Made:
        key = json.dumps(changes, sort_keys=True)
        if key not in kept:
            made = assemble("ALLMRec", module_settings, **changes)
            made.trainer.fit(made.train, made.valid)
            interaction, _, _, targets = next(iter(made.test))
            made.interaction = interaction[:7]
            made.users = made.interaction["user_id"].tolist()
            made.histories = [made.model.histories.before(user, "test").tolist() for user in made.users]
            if made.test.candidates:
                made.candidates = made.test.candidates.lookup(made.interaction["user_id"], targets[:7])
            kept[key] = made
        return kept[key]

    return trained


@pytest.fixture(scope="module")
def made(trained: Callable[..., Made]) -> Made:
    return trained()


@torch.no_grad()
def scores(made: Made) -> torch.Tensor:
    return made.model.score_candidates(made.interaction, made.candidates)


@torch.no_grad()
def score(made: Made, histories: Any = None, candidates: Any = None, users: Any = None) -> torch.Tensor:
    given = (made.histories if histories is None else histories), (made.candidates if candidates is None else candidates)
    return made.model.score_histories(*given, made.users if users is None else users)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def folder_sums(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- soft tokens -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_are_those_of_a_plain_forward_over_embeddings_put_together_by_hand(trained: Any, prompt: str) -> None:
    made = trained(**PROMPTS[prompt])
    model, cf = made.model, made.model.cf
    embed, found, filled = model.lm.get_input_embeddings(), scores(made), set()
    for row in (0, 3, 6):
        history, candidates, user = made.histories[row], made.candidates[row].tolist(), made.users[row]
        vectors = []
        for token in model.prompts.prompt(history, candidates, -9999):
            if token == -9999:
                vectors.append(model.project_user(cf.user_states([user], [history]))[0])
            elif token < 0:
                vectors.append(model.project_item(model.joint_codes[-1 - token]))
            else:
                vectors.append(embed.weight[token])
            filled |= {token} if token < 0 else set()
        for item, value in zip(candidates, found[row], strict=True):
            answer = model.prompts.answers[item]
            inputs = torch.stack([*vectors, *embed.weight[answer[:-1]]])[None]  # [1, T, D]
            logp = model.lm(inputs_embeds=inputs).logits[0].log_softmax(-1)
            expected = sum(logp[len(vectors) - 1 + place, token] for place, token in enumerate(answer))
            assert float(value) == pytest.approx(float(expected), abs=1e-4)
    assert len(filled) > 8 and found.std(1).min() > 0.1


def test_the_history_prompt_is_each_title_with_its_token_and_then_the_users(made: Made) -> None:
    tokens = made.model.tokenizer
    row, history = [tokens.bos_token_id], made.histories[0][-5:]
    for item in history:
        row += tokens(made.model.domain.items.names[item], add_special_tokens=False).input_ids
        row += [-1 - item, *tokens("\n", add_special_tokens=False).input_ids]
    assert made.model.prompts.prompt(made.histories[0], None, -77) == [*row, -77]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_scorer_gives_the_same_scores(trained: Any, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = trained(**PROMPTS[prompt]), {}
    for strategy, budget in (("naive", 9999), ("prefix", 700), ("tree", 700)):
        changed = replace(made.model.scorer, strategy=strategy, batch_tokens=budget)
        monkeypatch.setattr(made.model, "scorer", changed)
        found[strategy] = scores(made)
    close(found["prefix"], found["naive"])
    close(found["tree"], found["naive"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_permuted_users_have_permuted_scores(trained: Any, prompt: str) -> None:
    made, order = trained(**PROMPTS[prompt]), [4, 0, 6, 2, 1, 5, 3]
    moved = [[values[i] for i in order] for values in (made.histories, made.users)]
    close(score(made, moved[0], made.candidates[order], moved[1]), scores(made)[order])
    close(score(made, made.histories * 2, made.candidates.repeat(2, 1), made.users * 2), scores(made).repeat(2, 1))


def test_a_users_token_is_read_and_so_is_an_items(made: Made) -> None:
    """The collaborative model reads what the prompt has no room for: a change of the oldest item changes the state."""
    long = [3, 1, 4, 15, 9, 2, 6, 5]  # max_history is 5
    same_prompt = score(made, [long, [30, *long[1:]]], made.candidates[:1].expand(2, -1), [1, 1])
    assert not torch.allclose(same_prompt[0], same_prompt[1], atol=1e-3)
    with torch.no_grad():
        before, code = scores(made), made.model.joint_codes[made.histories[0][-1]].clone()
        made.model.joint_codes[made.histories[0][-1]] = 1 - code
        after = scores(made)
        made.model.joint_codes[made.histories[0][-1]] = code
    assert (after[0] - before[0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("joint", "user"), [(True, False), (False, True), (False, False)])
def test_a_part_that_is_left_out_has_no_tokens(
    assemble: Any, module_settings: dict[str, Any], trained: Any, prompt: str, joint: bool, user: bool
) -> None:
    changes = {**PROMPTS[prompt], "joint_embedding": joint, "user_representation": user}
    model, made = assemble("ALLMRec", module_settings, **changes).model, trained(**PROMPTS[prompt])
    n_items = model.n_items
    row = model.prompts.prompt(made.histories[0], made.candidates[0].tolist(), -1 - n_items)
    soft = [-1 - token for token in row if token < 0]
    assert (n_items in soft) == user and bool([item for item in soft if item < n_items]) == joint
    rows, table = model._fill([row], [(made.users[0], made.histories[0])])
    assert (table is None) == (not soft) and rows[0].count(-1) <= 1
    if not soft:
        assert rows == [row] and row == model._prompt_builder(model.domain, model.plain_settings).prompt(
            made.histories[0], made.candidates[0].tolist()
        )


def test_tokens_are_numbered_once_each_and_point_to_their_vectors(made: Made) -> None:
    model, n_items = made.model, made.model.n_items
    rows = [[5, -1 - 9, 6, -1 - 3, -1 - n_items], [-1 - 9, 7, -2 - n_items]]
    asking = [(1, [9, 3]), (2, [9])]
    with torch.no_grad():
        numbered, table = model._fill(rows, asking)
        items = model.project_item(model.joint_codes[[3, 9]])
        users = model.project_user(model.cf.user_states([1, 2], [[9, 3], [9]]))
    assert numbered == [[5, -2, 6, -1, -3], [-2, 7, -4]]
    torch.testing.assert_close(table, torch.cat([items, users]))
    assert rows[0] == [5, -10, 6, -4, -1 - n_items]  # the given rows stay


@pytest.mark.slow
@pytest.mark.parametrize("title", ["[HistoryEmb]", "{user}", "a || b", "<s> </s>"])
def test_hostile_titles_are_scored_as_any_other(
    settings: dict[str, Any], data_path: Path, assemble: Any, tmp_path: Path, title: str
) -> None:
    """The slots of a run whose titles spell markers are those of the run on harmless titles."""
    found = []
    for index, words in enumerate((title, "harmless")):
        path = copied(data_path, tmp_path / str(index), item=lambda text, words=words: text.replace("The ", f"{words} "))
        made = assemble("ALLMRec", {**settings, **LISTWISE, "max_prompt_tokens": 480}, data_path=str(path))
        assert words in made.model.domain.items.names[1]
        row = made.model.prompts.prompt([1, 2, 3], [4, 5], -99)
        found.append([token for token in row if token < 0])
        batch = next(iter(made.train))[:8]
        assert torch.isfinite(made.model.calculate_loss(batch))
    assert found[0] == found[1] == [-99, -2, -3, -4, -5, -6]


def copied(data_path: Path, folder: Path, **changes: Callable[[str], str]) -> Path:
    """A copy of ``tiny`` whose .inter and .item files went through functions; returns its data path."""
    (folder / "tiny").mkdir(parents=True)
    for kind in ("inter", "item"):
        text = (data_path / "tiny" / f"tiny.{kind}").read_text()
        (folder / "tiny" / f"tiny.{kind}").write_text(changes.get(kind, str)(text))
    return folder


# -- item vectors ------------------------------------------------------------------------------------------------------


def test_cold_items_are_those_with_too_few_training_interactions_and_take_their_text(trained: Any) -> None:
    for threshold in (0, 1, 9):
        model = trained(cold_threshold=threshold).model
        met = np.zeros(model.n_items, dtype=int)
        for history in model.histories.items[1:]:
            for item in history[:-2]:  # neither the validation nor the test item counts
                met[item] += 1
        cold = met < threshold
        model.joint_codes.fill_(0.25).add_(torch.arange(model.n_items)[:, None] / 100)
        model.text_codes.fill_(-0.5).sub_(torch.arange(model.n_items)[:, None] / 100)
        for item, code in enumerate(model.item_codes):
            expected = -0.5 - item / 100 if cold[item] else 0.25 + item / 100
            assert code.tolist() == pytest.approx([expected] * 16)
        assert cold.sum() == {0: 0, 1: 1}.get(threshold, cold.sum())  # padding alone is below 1 here
    assert 5 < cold.sum() < 35
    for threshold in (0, 1, 9):
        trained(cold_threshold=threshold).model._load_alignment()


@torch.no_grad()
def test_a_colder_threshold_changes_the_scores_of_prompts_with_such_items_alone(trained: Any) -> None:
    made = trained()
    model = made.model
    warm = [item for item in range(1, model.n_items) if not trained(cold_threshold=9).model._is_cold[item]]
    cold = [item for item in range(1, model.n_items) if item not in warm]
    asked = [warm[:3], [*warm[:2], cold[0]]], made.candidates[:2], [1, 1]
    before = model.score_histories(*asked)
    model.__dict__["_is_cold"] = trained(cold_threshold=9).model._is_cold
    after = model.score_histories(*asked)
    del model.__dict__["_is_cold"]
    close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-4


def test_random_vectors_hang_on_the_seed_alone(trained: Any, assemble: Any, module_settings: dict[str, Any]) -> None:
    made = trained(item_vectors="random")
    first = made.model.item_codes
    torch.manual_seed(99)
    torch.rand(7)
    state_before = torch.get_rng_state()
    assert torch.equal(made.model.item_codes, first) and torch.equal(torch.get_rng_state(), state_before)
    again = assemble("ALLMRec", module_settings, item_vectors="random").model.item_codes
    other = assemble("ALLMRec", module_settings, item_vectors="random", seed=1).model.item_codes
    assert torch.equal(again, first) and not torch.equal(other, first)
    assert first.shape == (41, 16) and len({*map(tuple, first.tolist())}) == 41
    assert not torch.equal(scores(made), scores(trained()))


def test_text_vectors_stand_for_every_item(trained: Any) -> None:
    made = trained(item_vectors="text")
    assert torch.equal(made.model.item_codes, made.model.text_codes)
    assert not torch.equal(made.model.text_codes, made.model.joint_codes)


# -- controls ----------------------------------------------------------------------------------------------------------


def test_the_text_control_is_the_model_with_its_item_vectors_replaced(made: Made) -> None:
    with made.model.controls()[TEXT_ONLY]():
        control = scores(made)
    joint = made.model.joint_codes.clone()
    made.model.joint_codes.copy_(made.model.text_codes)
    replaced = scores(made)
    made.model.joint_codes.copy_(joint)
    assert torch.equal(control, replaced) and not torch.equal(control, scores(made))


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "BPR"])
def test_the_collaborative_control_is_that_models_own_full_ranking_at_the_candidates(trained: Any, name: str) -> None:
    made = trained(cf_model=name)
    batch = next(iter(made.model.cf.loaders[2]))[0]
    own = made.model.cf.model.full_sort_predict(batch).view(len(batch), -1)
    place = {user: row for row, user in enumerate(batch["user_id"].tolist())}
    expected = own[[place[user] for user in made.users]].gather(1, made.candidates)
    with made.model.controls()[name]():
        close(scores(made), expected)
    assert not torch.allclose(scores(made), expected)


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_llm_alone_is_a_bare_lm_on_prompts_without_soft_tokens(trained: Any, prompt: str, tiny_lm: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trained(**PROMPTS[prompt])
    model, bare = made.model, AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    template = "{history}"
    if prompt == "listwise":
        template = (
            'This user has chosen "{history}" in the previous. Recommend one next item for this user to choose next from the '
            'following item title set: "{candidates}". The recommendation is '
        )
    between = {"history_separator": QUOTED, "candidate_separator": QUOTED} if prompt == "listwise" else {}
    builder = PromptBuilder(model.tokenizer, model.domain.items.names, template=template, max_history=5, **between)
    pairs = zip(made.histories, made.candidates.tolist(), strict=True)
    prompts = [builder.prompt(history, row if builder.shows_candidates else None) for history, row in pairs]
    answers = [[builder.answers[item] for item in row] for row in made.candidates.tolist()]
    with model.controls()[LLM_ONLY]():
        close(scores(made), Scorer("naive")(bare, prompts, answers))
    assert model.prompts.shows_user and not torch.allclose(scores(made), Scorer("naive")(bare, prompts, answers))


def test_every_control_answers_differently_and_the_model_answers_again_after_them(made: Made) -> None:
    answers, names = {"ALLMRec": scores(made)}, {"ALLMRec": made.model.answer_fingerprint}
    for name, control in made.model.controls().items():
        with control():
            answers[name], names[name] = scores(made), made.model.answer_fingerprint
        assert torch.equal(scores(made), answers["ALLMRec"]), name
        assert made.model.answer_fingerprint == names["ALLMRec"]
    assert list(answers) == ["ALLMRec", "SASRec", TEXT_ONLY, LLM_ONLY]
    assert len({tuple(found.flatten().tolist()) for found in answers.values()}) == 4
    assert len({*names.values()}) == 4  # what is kept of one is never taken for another's


def test_a_run_reports_every_control_beside_the_model(module_settings: dict[str, Any], made: Made) -> None:
    result = run_recbole_llm("ALLMRec", "tiny", config_dict=module_settings)
    record = json.loads(Path(result["record"]).read_text())
    assert list(record["results"]) == ["ALLMRec", "SASRec", TEXT_ONLY, LLM_ONLY]
    assert list(result["controls"]) == ["SASRec", TEXT_ONLY, LLM_ONLY]
    names = ["cf-SASRec", "builtin-text-encoder", "alignment", "projection"]
    assert record["stage_seconds"] == dict.fromkeys(names, 0.0)  # `made` has trained them
    assert all(len(ranks) == 60 for ranks in record["ranks"].values())
    made.trainer.evaluate(made.test)
    assert list(record["ranks"]["ALLMRec"].values()) == made.trainer.ranks.ranks


# -- without the prior of a title --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pmi_takes_off_what_the_lm_alone_finds_likely_without_a_history(trained: Any, prompt: str) -> None:
    made, plain = trained(**PROMPTS[prompt], normalize="pmi"), trained(**PROMPTS[prompt])
    model = made.model
    builder = model._prompt_builder(model.domain, model.plain_settings)
    rows = made.candidates.tolist()
    prompts = [builder.prompt([], row) for row in rows]
    answers = [[builder.answers[item] for item in row] for row in rows]
    prior = Scorer("naive")(model.lm, prompts, answers)  # [B, C]
    model.load_state_dict(plain.model.state_dict())  # pmi stops stage 2 elsewhere
    close(scores(made), scores(plain) - prior)
    assert prior.std() > 0.1 and model.answer_fingerprint != plain.model.answer_fingerprint
    alone = [score(made, [h], c[None], [u]) for h, c, u in zip(made.histories, made.candidates, made.users, strict=True)]
    close(torch.cat(alone), scores(made))


def test_pmi_holds_in_a_call_of_one_candidate_and_of_all(trained: Any) -> None:
    made = trained(normalize="pmi")
    for columns in (slice(0, 1), slice(2, 5)):
        close(score(made, candidates=made.candidates[:, columns]), scores(made)[:, columns])


# -- what is frozen ----------------------------------------------------------------------------------------------------


def test_stages_leave_the_lm_and_every_stage_before_them_as_they_were(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("ALLMRec", settings)
    model, cache = made.model, made.model.cache
    lm, read, fill = state(model.lm), [], model._fill
    model.cf.load(cache.run(model.cf.stage))
    known, files = state(model.cf.model), folder_sums(cache.folder(model.cf.stage))
    last = model.plan()
    aligned = folder_sums(cache.run(model.alignment))
    assert equal(state(model.cf.model), known)
    monkeypatch.setattr(model, "_fill", lambda *asked: (read.append(model.joint_codes.clone()), fill(*asked))[1])
    model.run_stages()
    codes = load_file(cache.folder(model.alignment) / "codes.safetensors")
    assert read and all(torch.equal(joint, codes["joint"]) for joint in read)  # stage 2 reads what stage 1 has left
    assert torch.equal(model.text_codes, codes["text"])
    assert not any(cache.seconds[name] == 0 for name in cache.seconds)
    assert equal(state(model.lm), lm) and equal(state(model.cf.model), known)
    assert folder_sums(cache.folder(model.cf.stage)) == files and folder_sums(cache.folder(model.alignment)) == aligned
    assert len(files) == 3 and len(aligned) > 7  # with their manifests, and how much they trained
    assert set(load_file(cache.folder(last) / "projectors.safetensors")) == set(model._projectors())


def test_nothing_trains_the_collaborative_model_whatever_the_model_around_it_does(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = assemble("ALLMRec", settings), []
    model, states = made.model, CollaborativeModel.user_states
    assert model.cf.model.hidden_dropout_prob == 0.5

    def spy(cf: CollaborativeModel, *asked: Any) -> torch.Tensor:
        found = states(cf, *asked)
        training = any(module.training for module in cf.model.modules())
        seen.append((training, torch.equal(found, states(cf, *asked)), found.requires_grad))
        return found

    monkeypatch.setattr(CollaborativeModel, "user_states", spy)
    model.train()
    made.trainer.fit(made.train, made.valid)
    model.train()
    scores(
        SimpleNamespace(model=model, interaction=next(iter(made.test))[0][:3], candidates=torch.tensor([[1, 2], [3, 4], [5, 6]]))
    )
    assert len(seen) > 12 and {*seen} == {(False, True, False)}
    assert not {name for name, _ in model.named_parameters() if "cf" in name}


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> Path:
    """A tiny OPT with half of everything dropped in training, whose embeddings are narrower than its layers."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("lm") / "opt", AutoTokenizer.from_pretrained(tiny_lm)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        init_std=0.2,
        num_attention_heads=4,
        max_position_embeddings=512,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_lm_is_read_without_dropout_also_in_training(
    settings: dict[str, Any], assemble: Any, opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assemble("ALLMRec", settings, llm_path=str(opt))
    made.trainer.fit(made.train, made.valid)
    model, batch = made.model.train(), next(iter(made.train))[:8]
    assert model.training and not any(module.training for module in model.lm.modules())
    losses = [model.calculate_loss(batch).item() for _ in range(3)]
    assert len({*losses}) == 1
    model.lm.train()
    assert model.calculate_loss(batch).item() != losses[0]  # there is dropout, had it been left on


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stage_2_reaches_the_projectors_and_nothing_else(trained: Any, prompt: str) -> None:
    model = trained(**PROMPTS[prompt]).model
    for part in (model, model.cf.model):  # of its own training
        part.zero_grad(set_to_none=True)
    model.calculate_loss(next(iter(trained().train))[:16]).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == set(model._projectors()) == {n for n in reached if n.startswith(("project_user", "project_item"))}
    assert not [name for name, parameter in model._projectors().items() if not parameter.grad.abs().max() > 0]
    assert len(reached) == 12  # two linear layers and a norm each, with biases
    assert all(parameter.grad is None for parameter in model.cf.model.parameters())
    assert not model.joint_codes.requires_grad and not model.text_codes.requires_grad
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_tokens_of_the_targets(made: Made) -> None:
    batch = next(iter(made.train))[:9]
    targets = batch["item_id"]
    likelihoods = made.model.score_candidates(batch, targets[:, None])  # [B, 1]
    tokens = sum(len(made.model.prompts.answers[item]) for item in targets.tolist())
    assert made.model.calculate_loss(batch).item() == pytest.approx(-likelihoods.sum().item() / tokens, abs=1e-4)


@pytest.mark.parametrize("stage", ["alignment", "projection"])
@pytest.mark.parametrize("every", [False, True])
def test_no_validation_or_test_item_is_trained_on_and_states_are_those_before_the_target(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, stage: str, every: bool
) -> None:
    made = assemble("ALLMRec", settings, all_positions=every, train_samples=None, stage1_epochs=1, stage2_epochs=1)
    model, asked, targets = made.model, [], []
    model.plan()
    model.cache.run(model.cf.stage)
    if stage == "projection":
        model.cache.run(model.plan().inputs[0])
    loss = model._encode
    states = CollaborativeModel.user_states

    def spy(cf: CollaborativeModel, users: Any, histories: Any) -> torch.Tensor:
        asked.extend(zip(users, map(list, histories), strict=True))
        return states(cf, users, histories)

    monkeypatch.setattr(CollaborativeModel, "user_states", spy)
    monkeypatch.setattr(model, "_encode", lambda items, *rest: (targets.append(items), loss(items, *rest))[1])
    monkeypatch.setattr(model.asked["valid"], "score", lambda: 0.0)  # it asks about validation users
    model.cache.run(model.plan() if stage == "projection" else model.alignment)
    trained_items = {user: model.histories.items[user][:-2].tolist() for user in range(1, 61)}
    asked = [(user, history) for user, history in asked if history]  # an empty one was asked for its width
    assert asked and all(history == trained_items[user][: len(history)] for user, history in asked)
    assert all(len(history) < len(trained_items[user]) for user, history in asked)
    places = {(user, len(history)) for user, history in asked}
    last = {(user, len(items) - 1) for user, items in trained_items.items() if len(items) > 1}
    assert places <= last if not every else len(places - last) > 60
    if stage == "projection":
        whole = [tuple(items) for items in trained_items.values()]
        known = {items[:end] for items in whole for end in range(2, len(items) + 1)} if every else {*whole}
        assert targets and {*map(tuple, targets)} <= known


def test_an_answer_is_a_title_and_its_end_without_soft_tokens(trained: Any) -> None:
    for changes in ({}, LISTWISE, {**LISTWISE, "top_k_target": 3}):
        model = trained(**changes).model
        rng = np.random.default_rng(0)
        ids, mask = model._encode([3, 1, 4, 15], model.prompts, model.domain, rng, -1 - model.n_items)
        answer = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
        assert mask == sorted(mask) and min(answer) >= 0 > min(ids)
        first = model.prompts.answers[15][:-1]
        assert answer[: len(first)] == first
        assert len(answer) == len(first) + 1 or changes.get("top_k_target") == 3


def test_training_learns(trained: Any, assemble: Any, module_settings: dict[str, Any]) -> None:
    """Stage 2's loss on its own rows, before and after it."""
    made = trained(stage2_epochs=8, all_positions=True, train_samples=200)
    fresh = assemble("ALLMRec", module_settings, all_positions=True)
    fresh.model.plan()
    fresh.model.cache.run(fresh.model.alignment)
    fresh.model._load_alignment()
    batch = next(iter(made.train))[:60]
    with torch.no_grad():
        assert made.model.calculate_loss(batch) < 0.95 * fresh.model.calculate_loss(batch)


# -- stages ------------------------------------------------------------------------------------------------------------


EVERYTHING = {"cf-SASRec", "builtin-text-encoder", "alignment", "projection"}
BOTH = {"alignment", "projection"}


@pytest.fixture
def stages_run(settings: dict[str, Any], assemble: Any) -> Callable[..., set[str]]:
    """Names of the stages that a run with ``changes`` trains, of the four that it has."""

    def run(**changes: Any) -> set[str]:
        model = assemble("ALLMRec", settings, **changes).model
        model.run_stages()
        assert len(model.cache.seconds) == 4
        return {name for name, seconds in model.cache.seconds.items() if seconds}

    return run


def test_a_second_run_trains_nothing_and_a_change_trains_what_it_touches_alone(
    stages_run: Any, data_path: Path, tmp_path: Path
) -> None:
    assert stages_run() == EVERYTHING and stages_run() == set()
    assert stages_run(alpha=0.1) == BOTH and stages_run(stage2_epochs=1) == {"projection"}
    retitled = copied(data_path, tmp_path / "retitled", item=lambda text: text.replace("The red wolf", "The red fox"))
    assert stages_run(data_path=str(retitled)) == EVERYTHING - {"cf-SASRec"}
    assert stages_run(alpha=0.1) == stages_run() == set()  # all of it is kept beside the other


@pytest.mark.slow
def test_every_setting_trains_the_stages_anew_that_depend_on_it_and_no_others(stages_run: Any) -> None:
    assert stages_run() == EVERYTHING
    for change in ({"logits": "mean"}, {"beta": 0.9}, {"joint_size": 8}, {"tune_text_encoder": False}, {"stage1_epochs": 1}):
        assert stages_run(**change) == BOTH, change
    for change in (
        {"item_vectors": "text"},
        {"cold_threshold": 9},
        {"valid_users": 9},
        {"stage2_learning_rate": 0.1},
        LISTWISE,
        {"max_history": 4},
        {"joint_embedding": False},
        {"normalize": "mean"},
        {"train_samples": 9},
    ):
        assert stages_run(**change) == {"projection"}, change
    assert stages_run(**LISTWISE, top_k_target=2) == {"projection"} and stages_run(top_k_target=2) == set()
    for change in ({"scorer": "naive"}, {"eval_batch_size": 7}, {"save_every_seconds": 3}, {"r": 8}, {"retriever_top": 5}):
        assert stages_run(**change) == set(), change
    assert stages_run(builtin_text_encoder={"dim": 8}) == EVERYTHING - {"cf-SASRec"}
    assert stages_run(cf_config={"hidden_size": 8}) == EVERYTHING - {"builtin-text-encoder"}
    assert stages_run(all_positions=True) == BOTH
    assert stages_run(seed=1) == EVERYTHING


def exchanged(data_path: Path, folder: Path, places: tuple[int, ...]) -> Path:
    """A copy of ``tiny`` in which the later users exchange their interactions at ``places`` (-1: the test item)."""

    def change(text: str) -> str:
        header, *lines = text.splitlines()
        rows = [line.split("\t") for line in lines]
        users = list(dict.fromkeys(row[0] for row in rows))
        of = {user: [row for row in rows if row[0] == user] for user in users}
        late, moved = users[30:], 0  # by then every item has its internal id
        for place in places:
            items = [of[user][place][1] for user in late]
            for user, item in zip(late, items[1:] + items[:1], strict=True):
                if item not in {row[1] for row in of[user]}:
                    of[user][place][1] = item
                    moved += 1
        assert moved > 15 * len(places)
        return "\n".join([header, *map("\t".join, rows)]) + "\n"

    return copied(data_path, folder, inter=change)


def results(made: Made) -> dict[str, dict[str, torch.Tensor]]:
    model = made.model
    stages = {"cf": model.cf.stage, "alignment": model.alignment, "projection": model.plan()}
    folders = {name: model.cache.folder(stage) for name, stage in stages.items()}
    files = {name: [*folder.rglob("*.safetensors")] for name, folder in folders.items()}
    return {name: {f"{file.name}/{k}": t for file in found for k, t in load_file(file).items()} for name, found in files.items()}


@pytest.mark.parametrize(("places", "same"), [((-1,), ["cf", "alignment", "projection"]), ((-1, -2), ["cf", "alignment"])])
def test_held_out_items_touch_no_weight(
    settings: dict[str, Any], assemble: Any, data_path: Path, tmp_path: Path, places: tuple[int, ...], same: list[str]
) -> None:
    """Exchanged test items change nothing that is kept; exchanged validation items nothing but what they choose."""
    found = []
    for path in (data_path, exchanged(data_path, tmp_path / "exchanged", places)):
        made = assemble("ALLMRec", settings, data_path=str(path), checkpoint_dir=str(tmp_path / path.name / "saved"))
        made.trainer.fit(made.train, made.valid)
        found.append((made, results(made)))
    (one, first), (other, second) = found
    assert one.model.histories.item_ids == other.model.histories.item_ids
    assert one.test.candidates.sha256 != other.test.candidates.sha256  # the labels did change
    assert (one.valid.candidates.sha256 == other.valid.candidates.sha256) == (places == (-1,))
    for name in same:
        assert first[name] and equal(first[name], second[name]), name


# -- full ranking ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "NeuMF"])
def test_a_full_ranking_is_its_collaborative_models_with_the_top_in_the_llms_order(trained: Any, name: str) -> None:
    made = trained(cf_model=name, retriever_top=5, eval_args={"mode": {"valid": "candidates", "test": "full"}})
    interaction = next(iter(made.test))[0][:7]
    ranked, own = made.model.full_sort_predict(interaction), made.model.cf.scores(interaction)
    own[:, 0] = -torch.inf
    order, before = ranked.argsort(descending=True, stable=True), own.argsort(descending=True, stable=True)
    assert torch.equal(order[:, 5:], before[:, 5:]) and torch.equal(order[:, :5].sort().values, before[:, :5].sort().values)
    assert (made.model.score_candidates(interaction, order[:, :5]).diff(dim=1) <= 1e-4).all() and not torch.equal(order, before)
    with made.model.controls()[name]():
        assert torch.equal(made.model.full_sort_predict(interaction), own)


@pytest.mark.slow
def test_histories_are_cut_to_what_a_collaborative_model_of_shorter_ones_can_read(trained: Any) -> None:
    changes = {"cf_config": {"MAX_ITEM_LIST_LENGTH": 4}, "eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    made = trained(**changes)
    assert 0 <= made.trainer.evaluate(made.test)["hit@1"] <= 1


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "label"}, "scorer: label asks for a label, ALLMRec for a title; choose tree, prefix or naive"),
        ({"item_vectors": "joined"}, "item_vectors: 'joined' is unknown; choose joint, text or random"),
        ({"logits": "max"}, "logits: 'max' is neither sum"),
        ({"soft_prompt": "nosuch"}, "prompt: nosuch is not a key of `prompts`"),
        ({"text_fields": ["nosuch"]}, "text_fields: .* no column 'nosuch'; there is year, genre"),
        ({"cf_model": "Pop"}, "cf_model: Pop keeps no vectors"),
        ({"cf_model": "Caser"}, "cf_model: Caser reads user, item_seq, not a history alone"),
        ({"cf_config": {"MAX_ITEM_LIST_LENGTH": 80}}, "MAX_ITEM_LIST_LENGTH: SASRec reads 80 .* to 50 .*_LENGTH=80"),
        ({"cf_config": {"item_inter_num_interval": "[9,inf)"}}, "cf_config: SASRec must be trained on the same items"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(
    settings: dict[str, Any], assemble: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble("ALLMRec", settings, **changes)
    assert not list(Path(settings["checkpoint_dir"]).glob("stages/*-*"))


def test_titles_are_encoded_with_the_columns_that_are_named_or_told(assemble: Any, module_settings: dict[str, Any]) -> None:
    def sentence(**changes: Any) -> str:
        return assemble("ALLMRec", module_settings, **changes).model.sentences[1]

    title, year, genre = sentence(text_fields=[]), sentence(text_fields=["year"]), sentence()
    assert year.startswith(f"{title}, 19") or year.startswith(f"{title}, 20")
    assert genre.startswith(year) and genre.endswith(" film")  # year_field and category_field are set


@pytest.mark.slow
@pytest.mark.parametrize("tune", [True, False])
def test_a_text_encoder_of_ones_own_is_taken_by_its_folder(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tune: bool
) -> None:
    first = assemble("ALLMRec", settings)
    first.model.run_stages()
    builtin = next(Path(settings["checkpoint_dir"]).glob("stages/builtin-text-encoder-*"))
    changes = {"text_encoder_path": str(builtin), "tune_text_encoder": tune, "checkpoint_dir": str(tmp_path / "other")}
    made = assemble("ALLMRec", settings, **changes)
    made.model.run_stages()
    assert [*made.model.cache.seconds] == ["cf-SASRec", "alignment", "projection"]
    assert equal(results(made)["alignment"], results(first)["alignment"]) == tune
    assert (tmp_path / "other" / "text_vectors").is_dir() == (not tune)
    less = assemble("ALLMRec", settings, **changes, text_fields=["year"])  # no builtin encoder depends on the texts here
    less.model.run_stages()
    assert [name for name, seconds in less.model.cache.seconds.items() if seconds] == ["alignment", "projection"]


@pytest.mark.slow
def test_the_builtin_lm_and_the_published_prompt_work_end_to_end(settings: dict[str, Any]) -> None:
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 4000, "batch_tokens": 256, "vocab_size": 300}
    changes = {**LISTWISE, "llm_path": "builtin", "builtin_lm": small, "normalize": "pmi"}
    result = run_recbole_llm("ALLMRec", "tiny", config_dict={**settings, **changes})
    assert 0 <= result["test_result"]["hit@1"] <= 1 and list(result["controls"]) == ["SASRec", TEXT_ONLY, LLM_ONLY]


@pytest.mark.parametrize(("stage", "key"), [("alignment", "stage1_learning_rate"), ("projection", "stage2_learning_rate")])
def test_a_stage_that_diverges_names_its_own_learning_rate(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, stage: str, key: str
) -> None:
    step = TrainingLoop._step

    def spoiled(loop: TrainingLoop) -> Any:
        sound = loop.loss
        if loop.name == stage:
            loop.loss = lambda micro: sound(micro) * float("nan")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_step", spoiled)
    with pytest.raises(ValueError, match=f"{stage}: the loss is nan at step 0; lower `{key}`"):
        assemble("ALLMRec", settings).model.run_stages()
