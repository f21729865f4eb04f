"""Prompts read as their templates and keep to the lengths, whatever the titles."""

from __future__ import annotations

import logging
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from recbole_llm.data.prompts import Example
from recbole_llm.data.tokens import tokenise_as_text
from tests.data.prompt_builders import CONTINUATION, HOSTILE, LISTWISE, Make, build, sets_its_own_space


def test_listwise_prompt_reads_as_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer)
    text = "A user has watched these movies: Toy Story, Heat. The next one of Brazil || Cape Fear (1962) is:"
    assert tokenizer.decode(builder.prompt([1, 3], [5, 2]).ids) == text
    assert tokenizer.decode(builder.answers[3]) == " Heat</s>"
    assert builder.shows_candidates and not builder.is_continuation


def test_titles_take_the_space_before_them(tokenizer: PreTrainedTokenizerFast) -> None:
    title = tokenizer(" Toy Story", add_special_tokens=False).input_ids
    builder = build(tokenizer)
    assert builder.answers[1] == [*title, tokenizer.eos_token_id]
    whole = tokenizer("A user has watched these movies: Toy Story", add_special_tokens=False).input_ids
    assert builder.prompt([1], [2]).ids[: len(whole)] == whole
    bare = build(tokenizer, history_separator="||", template="[{history}] {candidates} is:\n")
    assert bare.answers[1] == [*tokenizer("Toy Story", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(bare.prompt([1, 3], [2]).ids) == "[Toy Story||Heat] Cape Fear (1962) is:\n"


def test_a_separator_of_nothing_but_a_space_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer, template="{history} and", history_separator=" ")
    assert tokenizer.decode(builder.prompt([1, 3]).ids) == "Toy Story Heat and"
    with pytest.raises(ValueError, match="candidate_separator"):
        build(tokenizer, candidate_separator="")


@pytest.mark.parametrize("separator", ["\n", ", "])
def test_a_continuation_is_what_a_sequence_trains(tokenizer: PreTrainedTokenizerFast, separator: str) -> None:
    builder = build(tokenizer, template=CONTINUATION, history_separator=separator)
    row, mask = builder.sequence([1, 4, 3])
    for known in range(3):
        begun = builder.prompt([1, 4, 3][:known]) + builder.answers[[1, 4, 3][known]]
        assert row.ids[: len(begun)] == begun.ids
    header = len(builder.prompt([]))
    assert mask == [0] * header + [1] * (len(row) - header)
    assert tokenizer.decode(builder.answers[3]).strip(" ") == "Heat" + separator.rstrip(" ")
    assert builder.sequence([]) == Example(builder.prompt([]), [0] * header)


def test_sequences_keep_to_the_rule_of_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer, template=CONTINUATION, max_history=2)
    assert builder.sequence([1, 2, 3, 4, 5]) == builder.sequence([3, 4, 5])
    assert builder.sequence([3, 4, 5]) != builder.sequence([4, 5])
    for template in (LISTWISE, "{history} next:", "{candidates}: {history}"):
        with pytest.raises(ValueError, match="train_mode"):
            build(tokenizer, template=template).sequence([1, 2])


@pytest.mark.parametrize("template", [LISTWISE, CONTINUATION, "{history}", "{history} then"])
@pytest.mark.parametrize("bos", [False, True])
def test_an_empty_history_gives_a_prompt(make_tokenizer: Make, template: str, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    prompt = build(tokenizer, template=template).prompt([], [1, 2])
    assert prompt.ids and (prompt.ids[0] == tokenizer.bos_token_id) == (bos or template == "{history}")


def test_without_bos_an_empty_prompt_is_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert build(tokenizer, template="{history}").prompt([]).ids == [tokenizer.eos_token_id]


@pytest.mark.parametrize("own", [False, True])
def test_bos_stands_once(make_tokenizer: Make, own: bool) -> None:
    tokenizer = make_tokenizer(bos=True)
    if own:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    for chat in (False, True):
        builder = build(tokenizer, chat=chat)
        assert builder.prompt([1, 2], [3]).ids.count(tokenizer.bos_token_id) == 1
        assert builder.prompt([1, 2], [3]).ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in builder.answers[1]


def test_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer, chat=True, system="You are a helpful recommendation assistant.")
    text = (
        "<|im_start|>system\nYou are a helpful recommendation assistant.<|im_end|>\n<|im_start|>user\n"
        "A user has watched these movies: Toy Story, Heat. The next one of Brazil is:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(builder.prompt([1, 3], [5]).ids) == text
    assert builder.prompt([1, 3], [5]).ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert tokenizer.decode(builder.answers[5]) == "Brazil</s>"
    assert not build(tokenizer, chat=True, template=CONTINUATION).is_continuation


def test_chat_errors(make_tokenizer: Make) -> None:
    with pytest.raises(ValueError, match="chat: .* has no chat template"):
        build(make_tokenizer(chat_template=None), chat=True)
    refusing = make_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="system: 's': .* rejects it: no system role; give system: ~"):
        build(refusing, chat=True, system="s")
    with pytest.raises(ValueError, match="system: None: .* rejects it: no system role; give a text, or chat: false"):
        build(refusing, chat=True)


def test_a_chat_template_that_shows_the_date_gives_one_prompt_on_all_days(make_tokenizer: Make) -> None:
    dated = make_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}")
    assert dated.decode(build(dated, chat=True).prompt([1], [2]).ids).startswith("26 Jul 2024 ")


def test_system_without_chat_is_a_first_line(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = build(tokenizer, system="Be brief.", template="Seen: {history}. Next:").prompt([3])
    assert tokenizer.decode(prompt.ids) == "Be brief.\nSeen: Heat. Next:"


@pytest.mark.parametrize("title", HOSTILE)
@pytest.mark.parametrize("chat", [False, True])
def test_hostile_titles_are_text(tokenizer: PreTrainedTokenizerFast, title: str, chat: bool) -> None:
    names = ["", title, "Heat", "Brazil"]
    hostile, plain = (
        build(tokenizer, [*names[:1], first, *names[2:]], chat=chat, max_prompt_tokens=10**6, max_title_tokens=10**6)
        for first in (title, "Alien")
    )
    prompt, calm = hostile.prompt([2, 1], [3, 1]).ids, plain.prompt([2, 1], [3, 1]).ids
    assert tokenizer.decode(prompt) == tokenizer.decode(calm).replace("Alien", title)
    added = set(tokenizer.added_tokens_decoder)
    assert [token for token in prompt if token in added] == [token for token in calm if token in added]
    assert hostile.answers[1].count(tokenizer.eos_token_id) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="<tool_call<tool_call>[HistoryEmb][HISTORYEMB]")
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*HOSTILE, " ", "a", "<", "|"])).map("".join))
def test_no_text_makes_an_added_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    row = tokenise_as_text(tokenizer, [text])[0]
    assert not set(tokenizer.added_tokens_decoder) & set(row)
    assert tokenizer.decode(row) == text.encode("utf-8", "replace").decode()


def test_overlapping_added_tokens(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["abc", "bcd", "b"])
    row = tokenise_as_text(tokenizer, ["xabcd abc"])[0]
    assert tokenizer.decode(row) == "xabcd abc"
    assert not set(row) & set(tokenizer.convert_tokens_to_ids(["abc", "bcd"]))


def test_normalised_added_tokens(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.add_special_tokens([AddedToken("<end>", normalized=True)])
    core.add_tokens([AddedToken("<tool>", normalized=True)])
    added = {core.token_to_id("<end>"), core.token_to_id("<tool>")}
    for text in ("<end>", "<END>", "＜end＞", "<TOOL>"):
        assert added & set(tokenizer(text, add_special_tokens=False).input_ids)
        assert not added & set(tokenise_as_text(tokenizer, [text])[0])


def test_oldest_history_goes_first_and_the_rest_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    history, candidates = [1, 2, 3, 4, 5], [5, 1]
    roomy, seen = build(tokenizer), set()
    wanted = [roomy.prompt(history[5 - kept :], candidates) for kept in range(6)]
    for limit in range(len(wanted[0]), len(wanted[5]) + 1):
        prompt = build(tokenizer, max_prompt_tokens=limit).prompt(history, candidates)
        kept = wanted.index(prompt)
        assert len(prompt) <= limit and (kept == 5 or len(wanted[kept + 1]) > limit)
        seen.add(kept)
    assert seen == {0, 1, 2, 3, 4, 5}


def test_truncated_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    full = build(tokenizer, template=CONTINUATION)
    limit = len(full.prompt([3, 4, 5]))
    builder = build(tokenizer, template=CONTINUATION, max_prompt_tokens=limit)
    assert builder.prompt([1, 2, 3, 4, 5]) == full.prompt([3, 4, 5])
    assert builder.sequence([2, 3, 4, 5, 1]) == full.sequence([3, 4, 5, 1])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_max_history(tokenizer: PreTrainedTokenizerFast, kept: int) -> None:
    builder = build(tokenizer, max_history=kept)
    assert builder.prompt([1, 2, 3, 4, 5], [1]) == build(tokenizer).prompt([1, 2, 3, 4, 5][5 - kept :], [1])


def test_max_title_tokens(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        builder = build(tokenizer, ["", "x" * 50 + "a", "x" * 50 + "b", "Heat"], max_title_tokens=10)
    assert len(builder.answers[1]) == 11 and builder.answers[3] == build(tokenizer).answers[3]
    assert [record.getMessage() for record in caplog.records] == [
        "max_title_tokens: 1 titles equal another one when cut to 10 tokens"
    ]
    with pytest.raises(ValueError, match="max_title_tokens: 0"):
        build(tokenizer, max_title_tokens=0)


def test_a_prompt_that_cannot_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(build(tokenizer).prompt([], [1, 2]))
    assert len(build(tokenizer, max_prompt_tokens=length).prompt([3], [1, 2])) == length
    message = f"max_prompt_tokens: {length - 1} is too small, the prompt has {length} tokens .* in its candidates"
    with pytest.raises(ValueError, match=message):
        build(tokenizer, max_prompt_tokens=length - 1).prompt([3], [1, 2])


@pytest.mark.parametrize(("end", "labels"), [("\n", string.ascii_uppercase), (" ", "ABC")])
def test_labels(tokenizer: PreTrainedTokenizerFast, end: str, labels: str) -> None:
    template = "Seen:\n{history}\nOne of:\n{candidates}\nAnswer:" + end
    builder = build(tokenizer, template=template, labels=labels, history_separator="\n", candidate_separator="\n")
    text = tokenizer.decode(builder.prompt([1, 3], [5, 4]).ids)
    assert text == f"Seen:\nToy Story\nHeat\nOne of:\nA. Brazil\nB. The Usual Suspects\nAnswer:{end.strip(' ')}"
    assert [tokenizer.decode(token) for token in builder.label_tokens] == [end.strip("\n") + label for label in labels]
    with pytest.raises(ValueError, match=f"scorer: {len(labels) + 1} candidates .* {len(labels)} labels"):
        builder.prompt([1], [1] * (len(labels) + 1))


def test_bad_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"scorer: .*\['10', '💿'\] are not"):
        build(tokenizer, template="{history} {candidates}\n", labels=["1", "10", "2", "💿"])
    with pytest.raises(ValueError, match=r"scorer: .*\['A', 'A'\]"):
        build(tokenizer, template="{history} {candidates}\n", labels=["A", "B", "A"])
    with pytest.raises(ValueError, match="scorer: labels need a template"):
        build(tokenizer, template=CONTINUATION, labels=["A", "B"])
    assert build(tokenizer).label_tokens == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{history} {cue}", r"unknown slots \['cue'\]"),
        ("{candidates}", "needs {history} once"),
        ("{history} {history}", "needs {history} once"),
        ("{history} {candidates} {candidates}", "at most once"),
        ("{user} {history} {user}", "at most once"),
    ],
)
def test_bad_templates(tokenizer: PreTrainedTokenizerFast, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompts: .*{message}"):
        build(tokenizer, template=template)


def test_candidates_only_where_the_template_shows_them(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="prompts: .* none are given"):
        build(tokenizer).prompt([1])
    builder = build(tokenizer, template="{history}; next:")
    assert builder.prompt([1], [2, 3]) == builder.prompt([1])


def test_inputs_and_parts_stay_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer)
    history, candidates, first = [1, 2], [3, 4], builder.prompt([1, 2], [3, 4])
    answers = [list(answer) for answer in builder.answers]
    builder.prompt(history, candidates).ids.clear()
    assert (history, candidates) == ([1, 2], [3, 4])
    assert builder.prompt(history, candidates) == first and builder.answers == answers


def test_ranking(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = build(tokenizer)
    assert tokenizer.decode(builder.ranking([3, 5, 1])) == " Heat || Brazil || Toy Story</s>"
    assert builder.ranking([3]) == builder.answers[3]
    begin = builder.first_of_ranking(3)
    assert builder.ranking([3, 5])[: len(begin)] == begin and tokenizer.decode(begin) == " Heat ||"
    for options in ({"template": CONTINUATION}, {"labels": "ABC", "template": "{history} {candidates}\n"}):
        with pytest.raises(ValueError, match="top_k_target"):
            build(tokenizer, **options).ranking([3, 5])


def test_arrays_will_do(tokenizer: PreTrainedTokenizerFast) -> None:
    history = np.array([1, 2, 3])
    assert build(tokenizer).prompt(history, history[:2]) == build(tokenizer).prompt([1, 2, 3], [1, 2])
    builder = build(tokenizer, template=CONTINUATION)
    assert builder.sequence(history) == builder.sequence([1, 2, 3])
    assert builder.sequence(history[:0]) == builder.sequence([])


def test_no_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="llm_path: .* no EOS"):
        build(tokenizer)
    assert build(tokenizer, template=CONTINUATION).answers[3]


def test_a_tokenizer_that_sets_the_space_by_itself() -> None:
    tokenizer = sets_its_own_space()
    builder = build(tokenizer, ["", "Heat", "Brazil"], template="next: {history}")
    assert tokenizer.convert_ids_to_tokens(builder.prompt([1, 2]).ids) == [
        "▁next",
        ":",
        "▁Heat",
        "▁",
        ",",
        "▁Brazil",
        "▁",
        ",",
    ]
