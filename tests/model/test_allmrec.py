"""ALLMRec: soft tokens where the items are, a frozen LM and collaborative model, rows beside the model that are what they say."""

from __future__ import annotations

import copy
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
from recbole_llm.data.examples import ExampleEncoder
from recbole_llm.data.prompts import Prompt, PromptBuilder, PromptSettings
from recbole_llm.llm.scoring import Scorer
from recbole_llm.model.allmrec import LLM_ONLY, TEXT_ONLY
from recbole_llm.model.eval_users import EvalUsers
from recbole_llm.model.parts import histories_of
from recbole_llm.model.projection import SoftTokens
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.files import sha256_file
from recbole_llm.store.stages import Work
from recbole_llm.training.loop import TrainingLoop

LISTWISE = {
    "soft_prompt": "allmrec",
    "user_text": "{user} is a user representation.",
    "user_before_bos": True,
    "title_quote": "'\"'",
    "history_separator": ", ",
    "candidate_separator": ", ",
}
PROMPTS: dict[str, dict[str, Any]] = {"history": {}, "listwise": LISTWISE}
Made = SimpleNamespace


@pytest.fixture(scope="module")
def trained(module_settings: dict[str, Any], assemble: Callable[..., Made]) -> Callable[..., Made]:
    """``trained(**changes)``: a model with its stages, of which most are cached, and seven test users; made once."""
    cached: dict[str, Made] = {}

    def trained(**changes: Any) -> Made:
        key = json.dumps(changes, sort_keys=True)
        if key not in cached:
            made = assemble("ALLMRec", module_settings, **changes)
            made.trainer.fit(made.train, made.valid)
            interaction, _, _, targets = next(iter(made.test))
            made.interaction = interaction[:7]
            made.users = made.interaction["user_id"].tolist()
            made.histories = [made.model.parts.histories.before(user, "test").tolist() for user in made.users]
            if made.test.candidates:
                made.candidates = made.test.candidates.lookup(made.interaction["user_id"], targets[:7])
            made.causal = made.model.parts.backbone.load(made.trainer.cache)
            made.builder = made.model.parts.builder(made.causal.tokenizer)
            made.soft = made.model.soft
            made.likelihood = made.model.projection.likelihood(made.causal, made.soft)
            cached[key] = made
        return cached[key]

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
    return made.likelihood(*given, made.users if users is None else users)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def codes(made: Made) -> dict[str, torch.Tensor]:
    """What the alignment stage has left."""
    return load_file(made.trainer.cache.folder(made.model.projection.alignment) / "codes.safetensors")


def with_codes(made: Made, item_codes: torch.Tensor) -> Made:
    """The same model with other vectors for the items."""
    soft = copy.copy(made.soft)
    soft._codes = item_codes
    return SimpleNamespace(**{**vars(made), "likelihood": replace(made.likelihood, soft_tokens=soft)})


def row_of(prompt: Prompt) -> list[int]:
    """Token ids, with ``-1 - key`` for a soft token."""
    return [-1 - prompt.soft_slots[place] if place in prompt.soft_slots else token for place, token in enumerate(prompt.ids)]


def run_stages(made: Made) -> dict[str, float]:
    """What ``fit`` does before it validates; the seconds of each stage."""
    made.trainer.cache.run(*made.model.plan(made.candidates))
    made.model.load(made.trainer.cache)
    return made.trainer.cache.seconds


@pytest.fixture
def projection(module_settings: dict[str, Any], assemble: Any, tmp_path: Path) -> Callable[..., Made]:
    """``projection(**changes)``: stage 2 as it is before its first step, on the cached alignment: its loop, its soft tokens."""

    def projection(**changes: Any) -> Made:
        made, fill = assemble("ALLMRec", module_settings, **changes), SoftTokens.fill
        made.trainer.cache.run(made.model.projection.alignment)

        def noted(soft: SoftTokens, *arguments: Any) -> Any:
            made.soft = soft
            return fill(soft, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingLoop, "run", lambda loop: setattr(made, "loop", loop))
            patch.setattr(SoftTokens, "fill", noted)
            made.model.projection_stage.build(Work(tmp_path, tmp_path / "scratch", made.trainer.cache))
            [part() for part in made.loop.loss(0)]
        made.causal = made.model.parts.backbone.load(made.trainer.cache)
        return made

    return projection


def batch_loss(made: Made, soft: SoftTokens, batch: Any) -> float:
    """Mean loss of the titles of the next items over their tokens, through the scorer."""
    targets = batch["item_id"]
    likelihood = made.model.projection.likelihood(made.causal, soft)
    with torch.no_grad():
        found = likelihood(histories_of(made.model, batch), targets[:, None], batch["user_id"].tolist())  # [B, 1]
    return -found.sum().item() / sum(len(likelihood.prompts.answers[item]) for item in targets.tolist())


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
    soft, lm = made.soft, made.causal.model
    embed, found, filled = lm.get_input_embeddings(), scores(made), set()
    for row in (0, 3, 6):
        history, candidates, user = made.histories[row], made.candidates[row].tolist(), made.users[row]
        vectors = []
        for token in row_of(made.builder.prompt(history, candidates, 9998)):
            if token == -9999:
                vectors.append(soft.project_user(made.model.cf.user_states([user], [history]))[0])
            elif token < 0:
                vectors.append(soft.project_item(codes(made)["joint"][-1 - token]))
            else:
                vectors.append(embed.weight[token])
            filled |= {token} if token < 0 else set()
        for item, value in zip(candidates, found[row], strict=True):
            answer = made.builder.answers[item]
            inputs = torch.stack([*vectors, *embed.weight[answer[:-1]]])[None]  # [1, T, D]
            logp = lm(inputs_embeds=inputs).logits[0].log_softmax(-1)
            expected = sum(logp[len(vectors) - 1 + place, token] for place, token in enumerate(answer))
            assert float(value) == pytest.approx(float(expected), abs=1e-4)
    assert len(filled) > 8 and found.std(1).min() > 0.1


def test_the_history_prompt_is_each_title_with_its_token_and_then_the_users(made: Made) -> None:
    tokens = made.causal.tokenizer
    row, history = [tokens.bos_token_id], made.histories[0][-5:]
    for item in history:
        row += tokens(made.model.parts.domain.items.names[item], add_special_tokens=False).input_ids
        row += [-1 - item, *tokens("\n", add_special_tokens=False).input_ids]
    assert row_of(made.builder.prompt(made.histories[0], None, 76)) == [*row, -77]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_scorer_gives_the_same_scores(trained: Any, prompt: str) -> None:
    made, found = trained(**PROMPTS[prompt]), {}
    for strategy, budget in (("naive", 9999), ("prefix", 700), ("tree", 700)):
        scorer = replace(made.likelihood.scorer, strategy=strategy, batch_tokens=budget)
        with torch.no_grad():
            likelihood = replace(made.likelihood, scorer=scorer)
            found[strategy] = likelihood(made.histories, made.candidates, made.users)
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
    last, changed = made.histories[0][-1], codes(made)["joint"].clone()
    close(score(with_codes(made, changed)), scores(made))
    changed[last] = 1 - changed[last]
    assert (score(with_codes(made, changed))[0] - scores(made)[0]).abs().max() > 1e-3


def test_without_any_soft_token_there_is_nothing_to_train(assemble: Any, module_settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="user_representation and joint_embedding: without both there is no soft token to train"):
        assemble("ALLMRec", module_settings, joint_embedding=False, user_representation=False)


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("joint", "user"), [(True, False), (False, True)])
def test_a_part_that_is_left_out_has_no_tokens(
    assemble: Any, module_settings: dict[str, Any], trained: Any, prompt: str, joint: bool, user: bool
) -> None:
    changes = {**PROMPTS[prompt], "joint_embedding": joint, "user_representation": user}
    made, other = trained(**PROMPTS[prompt]), assemble("ALLMRec", module_settings, **changes)
    model, n_items, tokenizer = other.model, made.model.n_items, made.causal.tokenizer
    shown = made.histories[0], made.candidates[0].tolist()
    found = model.parts.builder(tokenizer).prompt(*shown, n_items)
    keys = [*found.soft_slots.values()]
    assert (n_items in keys) == user and bool([item for item in keys if item < n_items]) == joint
    soft = model.projection.soft_tokens(other.trainer.cache, made.causal)
    (numbered,), table = soft.fill([found], [(made.users[0], made.histories[0])])
    assert (table is None) == (not keys) and {*numbered.soft_slots.values()} == {*range(len({*keys}))}
    if not keys:
        assert numbered == found == model.parts.builder(tokenizer, prompts=model.plain_prompts).prompt(*shown)


def test_tokens_are_numbered_once_each_and_point_to_their_vectors(made: Made) -> None:
    model, n_items = made.model, made.model.n_items
    rows = [Prompt([5, 0, 6, 0, 0], {1: 9, 3: 3, 4: n_items}), Prompt([0, 7, 0], {0: 9, 2: n_items + 1})]
    before, asking = copy.deepcopy(rows), [(1, [9, 3]), (2, [9])]
    with torch.no_grad():
        numbered, table = made.soft.fill(rows, asking)
        items = made.soft.project_item(codes(made)["joint"][[3, 9]])
        users = made.soft.project_user(model.cf.user_states([1, 2], [[9, 3], [9]]))
    assert [prompt.soft_slots for prompt in numbered] == [{1: 1, 3: 0, 4: 2}, {0: 1, 2: 3}]
    assert [prompt.ids for prompt in numbered] == [[5, 0, 6, 0, 0], [0, 7, 0]] and rows == before
    torch.testing.assert_close(table, torch.cat([items, users]))


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
        assert words in made.model.parts.domain.items.names[1]
        builder = made.model.parts.builder(made.model.parts.backbone.tokenizer)
        found.append([*builder.prompt([1, 2, 3], [4, 5], 98).soft_slots.values()])
        result = made.trainer.fit(made.train, made.valid)[1]
        assert all(0 <= value <= 1 for value in result.values())
    assert found[0] == found[1] == [98, 1, 2, 3, 4, 5]


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
        made = trained(cold_threshold=threshold)
        met = np.zeros(made.model.n_items, dtype=int)
        for history in made.model.parts.histories.items[1:]:
            for item in history[:-2]:  # neither the validation nor the test item counts
                met[item] += 1
        cold, found = met < threshold, codes(made)
        assert not torch.equal(found["text"], found["joint"])
        for item, code in enumerate(made.soft._codes):
            assert torch.equal(code, found["text" if cold[item] else "joint"][item])
        assert cold.sum() == {0: 0, 1: 1}.get(threshold, cold.sum())  # padding alone is below 1 here
    assert 5 < cold.sum() < 35


@torch.no_grad()
def test_a_colder_threshold_changes_the_scores_of_prompts_with_such_items_alone(trained: Any) -> None:
    made, colder = trained(), trained(cold_threshold=9)
    warm = [item for item in range(1, made.model.n_items) if colder.model.parts.histories.train_counts[item] >= 9]
    cold = [item for item in range(1, made.model.n_items) if item not in warm]
    given = [warm[:3], [*warm[:2], cold[0]]], made.candidates[:2], [1, 1]
    before, after = made.likelihood(*given), with_codes(made, colder.soft._codes).likelihood(*given)
    close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-4


def test_random_vectors_depend_on_the_seed_alone(trained: Any, assemble: Any, module_settings: dict[str, Any]) -> None:
    def item_codes(**changes: Any) -> torch.Tensor:
        made = assemble("ALLMRec", module_settings, item_vectors="random", **changes)
        made.trainer.cache.run(made.model.projection.alignment)
        return made.model.projection.soft_tokens(made.trainer.cache, made.model.parts.backbone.load(made.trainer.cache))._codes

    made = trained(item_vectors="random")
    first = made.soft._codes
    torch.manual_seed(99)
    state_before = torch.get_rng_state()
    made.model.load(made.trainer.cache)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert torch.equal(item_codes(), first) and not torch.equal(item_codes(seed=1), first)
    assert first.shape == (41, 16) and len({*map(tuple, first.tolist())}) == 41
    assert not torch.equal(scores(made), scores(trained()))


def test_text_vectors_stand_for_every_item(trained: Any) -> None:
    made = trained(item_vectors="text")
    assert torch.equal(made.soft._codes, codes(made)["text"])
    assert not torch.equal(codes(made)["text"], codes(made)["joint"])
    assert list(made.model.variants()) == ["ALLMRec", "SASRec", LLM_ONLY]  # with its text vectors it would be itself


# -- variants ----------------------------------------------------------------------------------------------------------


def variant_scores(made: Made, name: str) -> torch.Tensor:
    with torch.no_grad():
        return made.model.variants()[name].score(made.interaction, made.candidates)


def test_the_text_row_is_the_model_with_its_item_vectors_replaced(made: Made) -> None:
    found = variant_scores(made, TEXT_ONLY)
    assert torch.equal(found, score(with_codes(made, codes(made)["text"]))) and not torch.equal(found, scores(made))


@torch.no_grad()
@pytest.mark.parametrize("name", ["SASRec", "BPR"])
def test_the_collaborative_row_is_that_models_own_full_ranking_at_the_candidates(trained: Any, name: str) -> None:
    made = trained(cf_model=name)
    batch = next(iter(made.model.cf.loaders[2]))[0]
    own = made.model.cf.model.full_sort_predict(batch).view(len(batch), -1)
    place = {user: row for row, user in enumerate(batch["user_id"].tolist())}
    expected = own[[place[user] for user in made.users]].gather(1, made.candidates)
    close(variant_scores(made, name), expected)
    assert not torch.allclose(scores(made), expected)


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_llm_alone_is_a_bare_lm_on_prompts_without_soft_tokens(trained: Any, prompt: str, tiny_lm: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trained(**PROMPTS[prompt])
    bare = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    template = "{history}"
    if prompt == "listwise":
        template = (
            "This user has chosen {history} in the previous. Recommend one next item for this user to choose next from the "
            "following item title set, {candidates}. The recommendation is "
        )
    between = {"history_separator": ", ", "candidate_separator": ", ", "title_quote": '"'} if prompt == "listwise" else {}
    settings = PromptSettings(template, max_history=5, **between)
    builder = PromptBuilder(made.causal.tokenizer, made.model.parts.domain.items.names, settings=settings)
    pairs = zip(made.histories, made.candidates.tolist(), strict=True)
    prompts = [builder.prompt(history, row if builder.shows_candidates else None) for history, row in pairs]
    answers = [[builder.answers[item] for item in row] for row in made.candidates.tolist()]
    close(variant_scores(made, LLM_ONLY), Scorer("naive")(bare, prompts, answers))
    assert made.builder.shows_user and not torch.allclose(scores(made), Scorer("naive")(bare, prompts, answers))


def test_every_variant_scores_differently_and_has_a_fingerprint_of_its_own(made: Made) -> None:
    found = {name: variant_scores(made, name) for name in made.model.variants()}
    assert list(found) == ["ALLMRec", "SASRec", TEXT_ONLY, LLM_ONLY] and torch.equal(found["ALLMRec"], scores(made))
    assert len({tuple(values.flatten().tolist()) for values in found.values()}) == 4
    fingerprints = {name: variant.fingerprint for name, variant in made.model.variants().items()}
    assert fingerprints.pop("SASRec") is None  # its scores cost less than reading them
    assert len({*fingerprints.values()}) == 3 and None not in fingerprints.values()


def test_a_run_reports_every_variant_beside_the_model(module_settings: dict[str, Any], made: Made) -> None:
    result = run_recbole_llm("ALLMRec", "tiny", config_dict=module_settings)
    record = json.loads(Path(result["record"]).read_text())
    assert list(record["results"]) == ["ALLMRec", "SASRec", TEXT_ONLY, LLM_ONLY]
    assert list(result["variants"]) == ["SASRec", TEXT_ONLY, LLM_ONLY]
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
    builder = model.parts.builder(made.causal.tokenizer, prompts=model.plain_prompts)
    rows = made.candidates.tolist()
    prompts = [builder.prompt([], row) for row in rows]
    answers = [[builder.answers[item] for item in row] for row in rows]
    prior = Scorer("naive")(made.causal.model, prompts, answers)  # [B, C]
    made.soft.load_state_dict(plain.soft.state_dict())  # pmi stops stage 2 elsewhere
    close(scores(made), scores(plain) - prior)
    assert prior.std() > 0.1
    assert model.variants()["ALLMRec"].fingerprint != plain.model.variants()["ALLMRec"].fingerprint
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
    model, cache = made.model, made.trainer.cache
    causal, read, fill = model.parts.backbone.load(cache), [], SoftTokens.fill
    lm = state(causal.model)
    model.cf.load(cache.run(model.cf.stage))
    known, files = state(model.cf.model), folder_sums(cache.folder(model.cf.stage))
    aligned = folder_sums(cache.run(model.projection.alignment))
    assert equal(state(model.cf.model), known)
    monkeypatch.setattr(SoftTokens, "fill", lambda soft, *given: (read.append(soft._codes.clone()), fill(soft, *given))[1])
    cache.run(model.projection_stage)
    joint = codes(made)["joint"]
    assert read and all(torch.equal(found[1:], joint[1:]) for found in read)  # what stage 1 has left
    assert not any(cache.seconds[name] == 0 for name in ("alignment", "projection"))
    model.load(cache)
    assert equal(state(causal.model), lm) and equal(state(model.cf.model), known)
    assert folder_sums(cache.folder(model.cf.stage)) == files and folder_sums(cache.folder(model.projection.alignment)) == aligned
    assert len(files) == 4 and len(aligned) > 7  # with their manifests, curves, and how much they trained
    projectors = load_file(cache.folder(model.projection_stage) / "projectors.safetensors")
    assert set(projectors) == {name for name, _ in model.soft.named_parameters()}


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
    made, loops = assemble("ALLMRec", settings, llm_path=str(opt)), []
    monkeypatch.setattr(TrainingLoop, "run", lambda loop: loops.append(loop))
    made.model.train()
    run_stages(made)
    lm, (_, projection) = made.model.parts.backbone.load(made.trainer.cache).model, loops
    assert projection.name == "projection" and not any(module.training for module in lm.modules())
    losses = [sum(part().item() for part in projection.loss(0)) for _ in range(3)]
    assert len({*losses}) == 1
    lm.train()
    assert sum(part().item() for part in projection.loss(0)) != losses[0]  # there is dropout, had it been left on


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stage_2_reaches_the_projectors_and_nothing_else(projection: Any, prompt: str) -> None:
    made = projection(**PROMPTS[prompt])
    made.model.cf.model.zero_grad(set_to_none=True)  # of its own training
    sum(part() for part in made.loop.loss(0)).backward()
    reached = {name: parameter.grad for name, parameter in made.loop.parameters.items()}
    assert len(reached) == 12  # two linear layers and a norm each, with biases
    assert all(name.startswith(("project_user", "project_item")) for name in reached)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in reached.values())
    assert all(p.grad is None for part in (made.causal.model, made.model.cf.model) for p in part.parameters())
    assert not made.soft._codes.requires_grad and not made.soft._text_codes.requires_grad


def test_the_loss_is_the_mean_over_the_tokens_of_the_targets(projection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read, encode = projection(), [], ExampleEncoder.__call__
    monkeypatch.setattr(
        ExampleEncoder, "__call__", lambda self, items, *rest, **more: (read.append(items), encode(self, items, *rest, **more))[1]
    )
    found = sum(part().item() for part in made.loop.loss(0))
    assert len(read) == 16
    targets = torch.tensor([items[-1] for items in read])
    likelihood = made.model.projection.likelihood(made.causal, made.soft)
    with torch.no_grad():
        likelihoods = likelihood([items[:-1] for items in read], targets[:, None], [1] * 16)  # [B, 1]
    tokens = sum(len(likelihood.prompts.answers[item]) for item in targets.tolist())
    assert found == pytest.approx(-likelihoods.sum().item() / tokens, abs=1e-4)


@pytest.mark.parametrize("stage", ["alignment", "projection"])
@pytest.mark.parametrize("every", [False, True])
def test_no_validation_or_test_item_is_trained_on_and_states_are_those_before_the_target(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, stage: str, every: bool
) -> None:
    made = assemble("ALLMRec", settings, all_positions=every, train_samples=None, stage1_epochs=1, stage2_epochs=1)
    model, cache, read, targets = made.model, made.trainer.cache, [], []
    cache.run(model.cf.stage)
    if stage == "projection":
        cache.run(model.projection.alignment)
    encode, states = ExampleEncoder.__call__, CollaborativeModel.user_states

    def spy(cf: CollaborativeModel, users: Any, histories: Any) -> torch.Tensor:
        read.extend(zip(users, map(list, histories), strict=True))
        return states(cf, users, histories)

    monkeypatch.setattr(CollaborativeModel, "user_states", spy)
    monkeypatch.setattr(
        ExampleEncoder,
        "__call__",
        lambda self, items, *rest, **more: (targets.append(items), encode(self, items, *rest, **more))[1],
    )
    monkeypatch.setattr(EvalUsers, "score", lambda self, score: 0.0)  # it reads the states of validation users
    cache.run(model.projection_stage if stage == "projection" else model.projection.alignment)
    trained_items = {user: model.parts.histories.items[user][:-2].tolist() for user in range(1, 61)}
    read = [(user, history) for user, history in read if history]  # an empty one was read for its width
    assert read and all(history == trained_items[user][: len(history)] for user, history in read)
    assert all(len(history) < len(trained_items[user]) for user, history in read)
    places = {(user, len(history)) for user, history in read}
    last = {(user, len(items) - 1) for user, items in trained_items.items() if len(items) > 1}
    assert places <= last if not every else len(places - last) > 60
    if stage == "projection":
        whole = [tuple(items) for items in trained_items.values()]
        known = {items[:end] for items in whole for end in range(2, len(items) + 1)} if every else {*whole}
        assert targets and {*map(tuple, targets)} <= known


def test_an_answer_is_a_title_and_its_end_without_soft_tokens(trained: Any) -> None:
    for changes in ({}, LISTWISE, {**LISTWISE, "top_k_target": 3}):
        made = trained(**changes)
        encoder = ExampleEncoder(made.model.parts.domain, made.builder, made.model.parts.examples)
        row, mask = encoder([3, 1, 4, 15], np.random.default_rng(0), made.model.n_items, known=[3, 1, 4, 15])
        answer = [token for token, wanted in zip(row.ids, mask, strict=True) if wanted]
        assert mask == sorted(mask) and row.soft_slots and not any(mask[place] for place in row.soft_slots)
        first = made.builder.answers[15][:-1]
        assert answer[: len(first)] == first
        assert len(answer) == len(first) + 1 or changes.get("top_k_target") == 3


def test_training_learns(trained: Any, assemble: Any, module_settings: dict[str, Any]) -> None:
    """Stage 2's loss on training rows, before and after it."""
    made = trained(stage2_epochs=8, all_positions=True, train_samples=200)
    fresh = made.model.projection.soft_tokens(made.trainer.cache, made.causal)
    batch = next(iter(made.train))[:60]
    assert batch_loss(made, made.soft, batch) < 0.95 * batch_loss(made, fresh, batch)


# -- stages ------------------------------------------------------------------------------------------------------------


EVERYTHING = {"cf-SASRec", "builtin-text-encoder", "alignment", "projection"}
BOTH = {"alignment", "projection"}


@pytest.fixture
def stages_run(settings: dict[str, Any], assemble: Any) -> Callable[..., set[str]]:
    """Names of the stages that a run with ``changes`` trains, of the four that it has."""

    def run(**changes: Any) -> set[str]:
        seconds = run_stages(assemble("ALLMRec", settings, **changes))
        assert len(seconds) == 4
        return {name for name, spent in seconds.items() if spent}

    return run


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_a_change_trains_what_it_touches_alone(
    stages_run: Any, data_path: Path, tmp_path: Path
) -> None:
    assert stages_run() == EVERYTHING and stages_run() == set()
    assert stages_run(alpha=0.1) == BOTH and stages_run(stage2_epochs=1) == {"projection"}
    retitled = copied(data_path, tmp_path / "retitled", item=lambda text: text.replace("The red wolf", "The red fox"))
    assert stages_run(data_path=str(retitled)) == EVERYTHING - {"cf-SASRec"}
    assert stages_run(alpha=0.1) == stages_run() == set()  # all of it is cached beside the other


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
    stages = {"cf": model.cf.stage, "alignment": model.projection.alignment, "projection": model.projection_stage}
    folders = {name: made.trainer.cache.folder(stage) for name, stage in stages.items()}
    files = {name: [*folder.rglob("*.safetensors")] for name, folder in folders.items()}
    return {name: {f"{file.name}/{k}": t for file in found for k, t in load_file(file).items()} for name, found in files.items()}


@pytest.mark.parametrize(("places", "same"), [((-1,), ["cf", "alignment", "projection"]), ((-1, -2), ["cf", "alignment"])])
def test_held_out_items_touch_no_weight(
    settings: dict[str, Any], assemble: Any, data_path: Path, tmp_path: Path, places: tuple[int, ...], same: list[str]
) -> None:
    """Exchanged test items change no result of a stage; exchanged validation items nothing but what they choose."""
    found = []
    for path in (data_path, exchanged(data_path, tmp_path / "exchanged", places)):
        made = assemble("ALLMRec", settings, data_path=str(path), checkpoint_dir=str(tmp_path / path.name / "saved"))
        made.trainer.fit(made.train, made.valid)
        found.append((made, results(made)))
    (one, first), (other, second) = found
    assert one.model.parts.histories.item_ids == other.model.parts.histories.item_ids
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
    own[:, 0] = made.model.cf.scores(interaction)[:, 0]
    assert torch.equal(made.model.variants()[name].score_catalogue(interaction), own)


@pytest.mark.slow
def test_histories_are_cut_to_what_a_collaborative_model_of_shorter_ones_can_read(trained: Any) -> None:
    changes = {"cf_config": {"MAX_ITEM_LIST_LENGTH": 4}, "eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    made = trained(**changes)
    assert 0 <= made.trainer.evaluate(made.test)["hit@1"] <= 1


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "label"}, "scorer: label scores labels, but ALLMRec predicts titles; choose tree, prefix or naive"),
        ({"item_vectors": "joined"}, "item_vectors: 'joined' in .* is not one of joint, text, random; did you mean 'joint'"),
        ({"logits": "max"}, "logits: 'max' in config_dict is not one of sum, mean"),
        ({"soft_prompt": "nosuch"}, "prompt: nosuch is not a key of `prompts`"),
        ({"text_fields": ["nosuch"]}, "text_fields: there is no column 'nosuch' besides the title; the columns are year, genre"),
        ({"cf_model": "Pop"}, "cf_model: Pop has no vectors"),
        ({"cf_model": "Caser"}, "cf_model: Caser reads user, item_seq, not a history alone"),
        ({"cf_config": {"MAX_ITEM_LIST_LENGTH": 80}}, "MAX_ITEM_LIST_LENGTH: SASRec reads 80 .* to 50; .*_LENGTH=80"),
        ({"cf_config": {"item_inter_num_interval": "[9,inf)"}}, "cf_config: SASRec must be trained on the same items"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_trains(
    settings: dict[str, Any], assemble: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble("ALLMRec", settings, **changes)
    assert not list(Path(settings["checkpoint_dir"]).glob("stages/*-*"))


def test_titles_are_encoded_with_the_columns_that_are_named(assemble: Any, module_settings: dict[str, Any]) -> None:
    def sentence(**changes: Any) -> str:
        return assemble("ALLMRec", module_settings, **changes).model.alignment.text.sentences[1]

    title, year, genre = sentence(text_fields=[]), sentence(text_fields=["year"]), sentence()
    assert year.startswith(f"{title}, 19") or year.startswith(f"{title}, 20")
    assert genre.startswith(year) and genre.endswith(" film")  # year_field and category_field are set


@pytest.mark.slow
@pytest.mark.parametrize("tune", [True, False])
def test_a_text_encoder_of_ones_own_is_taken_by_its_folder(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tune: bool
) -> None:
    first = assemble("ALLMRec", settings)
    run_stages(first)
    builtin = next(Path(settings["checkpoint_dir"]).glob("stages/builtin-text-encoder-*"))
    changes = {"text_encoder_path": str(builtin), "tune_text_encoder": tune, "checkpoint_dir": str(tmp_path / "other")}
    made = assemble("ALLMRec", settings, **changes)
    assert [*run_stages(made)] == ["cf-SASRec", "alignment", "projection"]
    assert equal(results(made)["alignment"], results(first)["alignment"]) == tune
    assert (tmp_path / "other" / "text_vectors").is_dir() == (not tune)
    less = assemble("ALLMRec", settings, **changes, text_fields=["year"])  # no builtin encoder depends on the texts here
    assert [name for name, seconds in run_stages(less).items() if seconds] == ["alignment", "projection"]


@pytest.mark.slow
def test_the_builtin_lm_and_the_published_prompt_work_end_to_end(settings: dict[str, Any]) -> None:
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 4000, "batch_tokens": 256, "vocab_size": 300}
    changes = {**LISTWISE, "llm_path": "builtin", "builtin_lm": small, "normalize": "pmi"}
    result = run_recbole_llm("ALLMRec", "tiny", config_dict={**settings, **changes})
    assert 0 <= result["test_result"]["hit@1"] <= 1 and list(result["variants"]) == ["SASRec", TEXT_ONLY, LLM_ONLY]


@pytest.mark.parametrize(("stage", "key"), [("alignment", "stage1_learning_rate"), ("projection", "stage2_learning_rate")])
def test_a_stage_that_diverges_names_its_own_learning_rate(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch, stage: str, key: str
) -> None:
    step = TrainingLoop._step

    def spoiled(loop: TrainingLoop) -> Any:
        sound = loop.loss
        if loop.name == stage:
            loop.loss = lambda step: [lambda part=part: part() * float("nan") for part in sound(step)]
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_step", spoiled)
    with pytest.raises(ValueError, match=f"{stage}: the loss is nan at step 0; lower `{key}`"):
        run_stages(assemble("ALLMRec", settings))
