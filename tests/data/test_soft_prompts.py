"""Soft tokens are positions of the prompt, and published prompts have the structure of their papers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from recbole_llm.config.property_files import PropertyFiles, properties_folder
from recbole_llm.data.prompts import Example, Prompt, number_soft_tokens
from tests.data.prompt_builders import HOSTILE, NAMES, SOFT, USER, Make, build, hard, soft, soft_keys


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("template", [SOFT, "{history}{user}", "{candidates}: {history} for {user}."])
def test_soft_tokens_stand_behind_their_titles_and_in_the_users_slot(
    tokenizer: PreTrainedTokenizerFast, template: str, chat: bool
) -> None:
    builder = soft(tokenizer, template=template, chat=chat)
    marks = {USER: " [user]"} | {item: f" [{name}]" for item, name in enumerate(NAMES)}
    prompt = builder.prompt([1, 3], [5, 2], USER)
    slots = prompt.soft_slots
    pieces = "".join(marks[slots[i]] if i in slots else tokenizer.decode(token) for i, token in enumerate(prompt.ids))
    assert "Toy Story [Toy Story], Heat [Heat]" in pieces.replace(",  ", ", ")
    assert ("Brazil [Brazil] || Cape Fear (1962) [Cape Fear (1962)]" in pieces) == ("{candidates}" in template)
    assert pieces.count(" [user]") == 1
    bare = build(tokenizer, template=template.replace("{user}", ""), chat=chat)
    assert hard(prompt) == bare.prompt([1, 3], [5, 2]).ids
    assert all(prompt.ids[position] == 0 for position in slots)
    assert builder.answers == bare.answers and min(map(min, builder.answers)) >= 0


@pytest.mark.parametrize("template", [SOFT, "{history}{user}"])
@pytest.mark.parametrize("title", [*HOSTILE, "{user}", "{user} is a user", "-2", "[UserRep] [CandidateEmb]"])
def test_no_title_makes_or_moves_a_soft_token(tokenizer: PreTrainedTokenizerFast, title: str, template: str) -> None:
    hostile, plain = (
        soft(tokenizer, ["", first, "Heat", "Brazil"], template=template, max_title_tokens=10**6, max_prompt_tokens=10**6)
        for first in (title, "Alien")
    )
    prompt, calm = (builder.prompt([2, 1, 1], [3, 1], USER) for builder in (hostile, plain))
    assert soft_keys(prompt) == soft_keys(calm) and len(soft_keys(prompt)) == 1 + 3 + 2 * plain.shows_candidates
    place = [{key: position for position, key in one.soft_slots.items()}[USER] for one in (prompt, calm)]
    before = [tokenizer.decode(hard(one, end)) for one, end in zip((prompt, calm), place, strict=True)]
    assert before[0] == before[1].replace("Alien", title)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(titles=st.lists(st.text(max_size=20) | st.sampled_from([*HOSTILE, "{user}"]), min_size=2, max_size=4))
def test_soft_tokens_are_where_the_items_are_whatever_the_titles(tokenizer: PreTrainedTokenizerFast, titles: list[str]) -> None:
    items = range(1, len(titles) + 1)
    builder = soft(tokenizer, ["", *titles], max_prompt_tokens=10**6)
    prompt = builder.prompt(list(items), [len(titles), 1], USER)
    assert soft_keys(prompt) == [USER, *items, len(titles), 1]


@pytest.mark.parametrize("template", [SOFT, "{history}{user}"])
def test_truncation_keeps_soft_tokens_with_their_titles(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    history, candidates, found = [1, 2, 3, 4, 5], [5, 1], set()
    roomy = soft(tokenizer, template=template)
    wanted = [roomy.prompt(history[5 - kept :], candidates, USER) for kept in range(6)]
    for limit in range(len(wanted[0]), len(wanted[5]) + 1):
        prompt = soft(tokenizer, template=template, max_prompt_tokens=limit).prompt(history, candidates, USER)
        kept = wanted.index(prompt)
        assert len(prompt) <= limit and (kept == 5 or len(wanted[kept + 1]) > limit)
        found.add(kept)
    assert found == {0, 1, 2, 3, 4, 5}
    cut = soft(tokenizer, template=template, max_title_tokens=2).prompt(history, candidates, USER)
    assert soft_keys(cut) == soft_keys(wanted[5]) and len(cut) < len(wanted[5])
    least = len(wanted[0])
    with pytest.raises(ValueError, match=f"max_prompt_tokens: {least - 1} is too small, the prompt has {least} tokens"):
        soft(tokenizer, template=template, max_prompt_tokens=least - 1).prompt([], candidates, USER)


def test_a_users_token_closes_a_list_that_the_answer_continues(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = soft(tokenizer, template="{history}{user}")
    plain = build(tokenizer, template="{history}")
    assert builder.is_continuation and builder.shows_user and builder.answers == plain.answers
    prompt = builder.prompt([1, 3], None, USER)
    assert prompt.soft_slots[len(prompt) - 1] == USER
    for template in ("{history} {user}", "{history}{user}.", "{user}{history}.", "{candidates}{user}{history} is: "):
        assert not soft(tokenizer, template=template).is_continuation
    assert soft(tokenizer, template="{user}{history}").is_continuation
    with pytest.raises(ValueError, match="lora_train_mode: sequence needs .* no other slot"):
        builder.sequence([1, 2])


def test_a_users_slot_needs_a_key(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="slot {user} needs the key of a soft token, and none is given"):
        soft(tokenizer).prompt([1], [2])
    for user in (0, 7):  # a user may have any key from 0 on; nothing keeps it from being an item's
        assert soft(tokenizer).prompt([1], [2], user).soft_slots[0] == user
        assert build(tokenizer).prompt([1], [2], user) == build(tokenizer).prompt([1], [2])  # no slot, nothing to fill


def test_an_answer_of_several_titles_has_no_soft_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert soft(tokenizer).ranking([3, 5, 1]) == build(tokenizer).ranking([3, 5, 1])
    assert soft(tokenizer).first_of_ranking(3) == build(tokenizer).first_of_ranking(3)


def test_soft_tokens_are_numbered_in_the_order_of_their_keys(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = soft(tokenizer)
    prompts = [builder.prompt([1, 3], [5, 3], USER), builder.prompt([], [5], USER + 7), build(tokenizer).prompt([1], [2])]
    numbered, keys = number_soft_tokens(prompts)
    assert keys == [1, 3, 5, USER, USER + 7]
    assert soft_keys(numbered[0]) == [3, 0, 1, 2, 1] and soft_keys(numbered[1]) == [4, 2] and numbered[2] == prompts[2]
    for before, after in zip(prompts, numbered, strict=True):
        assert after.ids == before.ids
        assert {place: keys[row] for place, row in after.soft_slots.items()} == before.soft_slots
    assert soft_keys(prompts[0]) == [USER, 1, 3, 5, 3]  # they stay as they were
    keys = [100, 3, 64, 3]
    assert number_soft_tokens([Prompt([0] * 4, dict(enumerate(keys)))]) == (
        [Prompt([0] * 4, {0: 2, 1: 0, 2: 1, 3: 0})],
        [3, 64, 100],
    )
    assert number_soft_tokens([]) == ([], [])


def test_soft_tokens_around_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt([5, 0, 7], {1: 3})
    found = prompt.surrounded([10, 11], [12])
    assert found == Prompt([0, 0, 5, 0, 7, 0], {0: 10, 1: 11, 3: 3, 5: 12})
    assert prompt == Prompt([5, 0, 7], {1: 3}) and prompt.surrounded([], []) == prompt
    answered = found + [8, 9]
    assert answered == Prompt([0, 0, 5, 0, 7, 0, 8, 9], found.soft_slots) and len(answered) == len(found) + 2
    assert Example.of(found, [8, 9]) == Example(answered, [0] * 6 + [1] * 2)


PUBLISHED = PropertyFiles(properties_folder()).read("overall")["prompts"]


def test_the_prompt_of_reccocktail_has_its_separators_and_a_random_tail(tokenizer: PreTrainedTokenizerFast) -> None:
    template = PUBLISHED["reccocktail"].replace("{top_k}", "5")
    bare = {"history_separator": "||", "candidate_separator": "||", "verb_base": "watch"}
    builder = build(tokenizer, template=template, system="You are a helpful recommendation assistant.", **bare)
    text = tokenizer.decode(builder.prompt([1, 3], [5, 2, 4]).ids)
    assert text.startswith("You are a helpful recommendation assistant.\nGiven the following history of movies")
    assert "watched:[Toy Story||Heat]. Please select the top 5 most likely movies that the user will watch next" in text
    assert text.endswith("Candidates: [Brazil||Cape Fear (1962)||The Usual Suspects]. The top 5 most likely movies are:")
    assert tokenizer.decode(builder.ranking([5, 2, 4])) == "Brazil||Cape Fear (1962)||The Usual Suspects</s>"


def test_the_prompt_of_allmrec_has_soft_tokens_before_bos_and_after_quoted_titles(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(bos=True)
    template = PUBLISHED["allmrec"].replace("{user}", "{user} is a user representation.")
    quoted = {"title_quote": '"', "history_separator": ", ", "candidate_separator": ", ", "verb_base": "watch"}
    builder = build(tokenizer, template=template, user_before_bos=True, item_tokens=True, **quoted)
    prompt = builder.prompt([1, 3], [5, 2], user=99)
    assert prompt.soft_slots[0] == 99 and prompt.ids[1] == tokenizer.bos_token_id
    marked = [*prompt.ids]
    for position in prompt.soft_slots:
        marked[position] = tokenizer("#", add_special_tokens=False).input_ids[0]
    assert tokenizer.decode(marked) == (
        '#<s> is a user representation.This user has watched "Toy Story"#, "Heat"# in the previous. Recommend one next movie for '
        'this user to watch next from the following movie title set, "Brazil"#, "Cape Fear (1962)"#. The recommendation is'
    )
    assert tokenizer.decode(builder.answers[3]) == ' "Heat"</s>'
    with pytest.raises(ValueError, match="user_before_bos: needs a template that begins with {user}"):
        build(tokenizer, user_before_bos=True)


def test_a_quoted_title_is_cut_between_its_quotes(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer, ["", "x" * 1_000], title_quote='"', max_title_tokens=4)
    answer = tokenizer.decode(builder.answers[1])
    assert answer.startswith(' "x') and answer.endswith('x"</s>') and len(answer) < 1_000


def test_the_prompt_of_llamarec_numbers_the_history_and_labels_the_candidates(tokenizer: PreTrainedTokenizerFast) -> None:
    marks = {"history_label": "({k}) ", "candidate_label": "({label}) ", "labels": ("A", "B")}
    between = {"history_separator": " \n ", "candidate_separator": " \n "}
    builder = build(tokenizer, template=PUBLISHED["llamarec"], **marks, **between)
    text = tokenizer.decode(builder.prompt([1, 3], [5, 2]).ids)
    assert "### Input:\nUser history: (1) Toy Story \n (2) Heat; \n Candidates: (A) Brazil \n (B) Cape Fear (1962)\n\n" in text
    assert text.startswith("### Instruction:\n") and text.endswith("\n\n### Response:\n")
    with pytest.raises(ValueError, match="candidate_label: needs the slot {label}"):
        build(tokenizer, template=PUBLISHED["llamarec"], candidate_label="-", labels=("A", "B"))
