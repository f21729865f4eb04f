"""Domains hold training items only, and their training examples cover every target as asked."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.config import LLMConfig
from recbole_llm.data import domains
from recbole_llm.data.domains import Domain
from recbole_llm.data.histories import Histories
from recbole_llm.data.items import ItemTexts
from recbole_llm.data.loading import create_dataset


def catalogue(categories: list[str]) -> ItemTexts:
    titles = ["", *(f"t{i}" for i in range(1, len(categories) + 1))]
    return ItemTexts(titles, titles, {"genre": ["", *categories]})


def domain(histories: list[list[int]], categories: list[str] | None = None, **values: Any) -> Domain:
    items = catalogue(categories or ["a"] * 9)
    arrays = [np.array(history, dtype=np.int64) for history in histories]
    return Domain(**{"name": "d", "items": items, "histories": arrays, "noun": "film", "verb": "seen", **values})


def views(whole: Domain, *, at_least: int, at_most: int, field: str | None = "genre") -> list[Domain]:
    return domains.views(whole, field, at_least=at_least, at_most=at_most, key="general_datasets")


@pytest.fixture
def config(settings: dict[str, Any]) -> LLMConfig:
    return LLMConfig("LoRACocktail", "tiny", config_dict=settings)


@pytest.fixture
def target(config: LLMConfig) -> tuple[Domain, Histories]:
    dataset = create_dataset(config)
    return domains.of_dataset(config, dataset), dataset.histories


@pytest.fixture
def tiny(target: tuple[Domain, Histories]) -> Domain:
    return target[0]


def last_two(data_path: Path, name: str) -> dict[str, set[str]]:
    lines = [line.split("\t") for line in (data_path / name / f"{name}.inter").read_text().splitlines()[1:]]
    histories: dict[str, list[str]] = {}
    for user, item, _ in sorted(lines, key=lambda line: int(line[2])):
        histories.setdefault(user, []).append(item)
    return {user: set(items[-2:]) for user, items in histories.items()}


# -- what a domain is --------------------------------------------------------------------------------------------------


def test_no_held_out_item_stands_in_any_domain(
    config: LLMConfig, target: tuple[Domain, Histories], tiny: Domain, data_path: Path
) -> None:
    other = domains.load(["other"], config, target)[0]
    for found in (tiny, other):
        dataset = create_dataset(LLMConfig("Pop", found.name, config_dict={"data_path": str(data_path)}))
        held_out = last_two(data_path, found.name)
        assert len(found.histories) == dataset.user_num - 1
        for user, history in enumerate(found.histories, start=1):
            tokens = set(dataset.id2token("item_id", history))
            assert not tokens & held_out[dataset.id2token("user_id", user)]
    for view in views(tiny, at_least=5, at_most=8):
        whole = [set(history.tolist()) for history in tiny.histories]
        assert all(any(set(history.tolist()) <= items for items in whole) for history in view.histories)


def test_other_datasets_are_read_with_their_own_texts(config: LLMConfig, target: tuple[Domain, Histories], tiny: Domain) -> None:
    other = domains.load(["other"], config, target)[0]
    assert other.name == "other" and other.items.titles[1].startswith("The ")
    assert len(other.histories) == 60 and other.fingerprint != tiny.fingerprint


def test_fingerprint_follows_texts_words_and_histories() -> None:
    changed = [
        domain([[1, 2], [3]]),
        domain([[1, 3], [3]]),
        domain([[1, 2, 3]]),
        domain([[1], [2, 3]]),
        domain([[1, 2], [3]], noun="book"),
        domain([[1, 2], [3]], verb="read"),
        domain([[1, 2], [3]], name="e"),
        domain([[1, 2], [3]], ["b"] * 9),
    ]
    assert len({found.fingerprint for found in changed}) == len(changed)
    assert domain([[1, 2], [3]]).fingerprint == changed[0].fingerprint


def test_what_domains_share_is_told_and_so_is_a_test_item_in_training_data(
    config: LLMConfig, target: tuple[Domain, Histories], data_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``twin`` is ``tiny`` with two more interactions a user, so that the test items become training data."""
    folder = tmp_path / "data" / "twin"
    folder.mkdir(parents=True)
    (folder / "twin.item").write_text((data_path / "tiny" / "tiny.item").read_text())
    lines = (data_path / "tiny" / "tiny.inter").read_text().splitlines()
    held_out = last_two(data_path, "tiny")
    known = {tuple(line.split("\t")[:2]) for line in lines}
    others = {user: [f"i{item}" for item in range(40) if (user, f"i{item}") not in known][:2] for user in held_out}
    more = [f"{user}\t{item}\t{2_000_000_000 + place}" for user in held_out for place, item in enumerate(others[user])]
    (folder / "twin.inter").write_text("\n".join([*lines, *more]) + "\n")
    twins = LLMConfig("LoRACocktail", "tiny", config_dict={**config.external_config_dict, "data_path": str(tmp_path / "data")})
    domains.load(["twin"], twins, target)
    assert "in common with tiny: 40 titles, 60 user ids" in caplog.text
    assert "domain twin: its training data contains the test item of 60 users of tiny" in caplog.text


def test_new_items_are_in_no_other_domain_by_title(config: LLMConfig, data_path: Path, tmp_path: Path, caplog: Any) -> None:
    """``twin`` has the items of ``tiny``, of which the scenario keeps a fifth new."""
    folder = tmp_path / "data" / "twin"
    folder.mkdir(parents=True)
    for suffix in ("inter", "item"):
        (folder / f"twin.{suffix}").write_text((data_path / "tiny" / f"tiny.{suffix}").read_text())
    shutil.copytree(data_path / "tiny", tmp_path / "data" / "tiny")
    given = {**config.external_config_dict, "data_path": str(tmp_path / "data"), "new_items": 0.2}
    config = LLMConfig("LoRACocktail", "tiny", config_dict=given)
    dataset = create_dataset(config)
    tiny, histories = domains.of_dataset(config, dataset), dataset.histories
    twin = domains.load(["twin"], config, (tiny, histories))[0]
    new = {tiny.items.titles[item] for item in histories.scenario.new}
    trained = {twin.items.titles[item] for item in twin.trained_items.tolist()}
    assert new and trained and not new & trained and len(twin.histories) == 60
    assert re.search(r"domain twin: \d+ training interactions are left out, .* those of new items of tiny", caplog.text)


def test_domains_without_a_held_out_item_in_training_raise_no_alarm(
    target: tuple[Domain, Histories], caplog: pytest.LogCaptureFixture
) -> None:
    """The same histories hold out the same items, so nothing leaks."""
    caplog.set_level("INFO")
    domains._report_overlap(*target, *target)
    assert "in common with tiny: 40 titles, 60 user ids" in caplog.text and "test item" not in caplog.text


# -- views -------------------------------------------------------------------------------------------------------------


def test_views_are_the_largest_categories_reduced_to_their_items() -> None:
    kinds = ["a b", "a", "b", "c", "a b"]  # items 1 to 5
    found = views(domain([[1, 2, 3, 4], [5, 4, 1], [3, 4, 3]], kinds), at_least=2, at_most=8)
    assert {view.name: [history.tolist() for history in view.histories] for view in found} == {
        "d/a": [[1, 2], [5, 1]],
        "d/b": [[1, 3], [5, 1], [3, 3]],
    }
    assert [view.name for view in views(domain([[1, 2, 5]], kinds), at_least=1, at_most=1)] == ["d/a"]


def test_a_category_of_nearly_everything_is_no_view() -> None:
    kinds = ["film a"] * 5 + ["film"] * 5
    found = views(domain([[1, 2, 7]] * 3, kinds), at_least=1, at_most=8)
    assert [view.name for view in found] == ["d/a"]


@pytest.mark.parametrize(
    ("field", "at_least", "message"),
    [
        (
            None,
            1,
            r"general_datasets: none given, and d has no category_field for views.*--general_datasets.*COLUMN.*title are: genre",
        ),
        ("nosuch", 1, r"domain_field: d\.item has no column 'nosuch', only genre"),
        ("genre", 9, r"domain_field: no category of `genre` in d has 9 users"),
    ],
)
def test_views_that_cannot_be_cut(field: str | None, at_least: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        views(domain([[1, 2]], ["a", "a", "b"]), at_least=at_least, at_most=8, field=field)


# -- training examples -------------------------------------------------------------------------------------------------

lengths = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5), min_size=1, max_size=3).filter(
    lambda mixture: any(length > 1 for sizes in mixture for length in sizes)
)


@given(mixture=lengths, window=st.one_of(st.none(), st.integers(1, 8)), seed=st.integers(0, 5))
def test_every_target_is_covered_exactly_once(mixture: list[list[int]], window: int | None, seed: int) -> None:
    sources = [domain([list(range(size)) for size in sizes]) for sizes in mixture]
    examples = domains.training_examples(sources, window=window, samples=None, seed=seed)
    covered = Counter(
        (found.domain, found.user, target)
        for found in examples
        for target in range(found.end, max(0, found.end - (window or 1)), -1)
    )
    expected = {(d, u, t) for d, sizes in enumerate(mixture) for u, size in enumerate(sizes) for t in range(1, size)}
    assert covered == dict.fromkeys(expected, 1)


def test_samples_are_drawn_by_the_seed_without_repeating() -> None:
    source = [domain([list(range(9))] * 20)]
    whole = domains.training_examples(source, window=None, samples=None, seed=1)
    some = domains.training_examples(source, window=None, samples=30, seed=1)
    assert some == domains.training_examples(source, window=None, samples=30, seed=1) == whole[:30]
    assert some != domains.training_examples(source, window=None, samples=30, seed=2)
    assert len(set(some)) == 30 and len(whole) == 160
    assert domains.training_examples(source, window=None, samples=10_000, seed=1) == whole


def test_of_each_domain_as_many_and_the_same_ones_in_every_mixture() -> None:
    one, other = domain([list(range(9))] * 20), domain([list(range(5))] * 3)  # 160 and 12 examples
    alone = domains.training_examples([one], window=None, samples=30, seed=1, of_each=True)
    both = domains.training_examples([other, one], window=None, samples=30, seed=1, of_each=True)
    assert Counter(found.domain for found in both) == {0: 12, 1: 30}
    assert {found[1:] for found in alone} == {found[1:] for found in both if found.domain == 1}
    assert [found.domain for found in both] not in ([0] * 12 + [1] * 30, [1] * 30 + [0] * 12)  # shuffled


@given(mixture=lengths, samples=st.one_of(st.none(), st.integers(1, 8)), of_each=st.booleans())
def test_the_last_position_is_a_window_wider_than_any_history(
    mixture: list[list[int]], samples: int | None, of_each: bool
) -> None:
    sources = [domain([list(range(size)) for size in sizes]) for sizes in mixture]
    last = domains.training_examples(sources, positions="last", samples=samples, seed=3, of_each=of_each)
    assert last == domains.training_examples(sources, window=10**9, samples=samples, seed=3, of_each=of_each)
    assert all(found.end == mixture[found.domain][found.user] - 1 for found in last)


@given(mixture=lengths, samples=st.integers(1, 8), of_each=st.booleans())
def test_the_last_of_every_user_and_some_of_the_others(mixture: list[list[int]], samples: int, of_each: bool) -> None:
    """RecCocktail's ingredient; ``samples`` counts the others alone."""
    sources = [domain([list(range(size)) for size in sizes]) for sizes in mixture]
    found = domains.training_examples(sources, positions="last_and_others", samples=samples, seed=3, of_each=of_each)
    last = domains.training_examples(sources, positions="last", samples=None, seed=3)
    assert len({*found}) == len(found) and {*last} <= {*found}
    left = [sum(max(0, size - 2) for size in sizes) for sizes in mixture]
    assert len(found) - len(last) == (sum(min(samples, one) for one in left) if of_each else min(samples, sum(left)))


def test_one_example_of_each_user_whatever_the_length_of_the_history() -> None:
    """RecCocktail's base spirit: heavy users and large domains do not count more."""
    sources = [domain([list(range(2))] * 5 + [list(range(50))] * 2), domain([list(range(9))] * 3)]
    found = domains.training_examples(sources, positions="last", samples=None, seed=0)
    assert Counter(example.domain for example in found) == {0: 7, 1: 3}


def test_no_more_of_each_domain_than_asked_for() -> None:
    """WeaveRec's hybrids: the file of a domain is made first, then examples are drawn from it."""
    one, other = domain([list(range(9))] * 20), domain([list(range(5))] * 3)
    draw = partial(domains.training_examples, positions="last_and_others", samples=30, seed=1, of_each=True)
    assert Counter(found.domain for found in draw([one, other])) == {0: 50, 1: 12}
    both, alone = draw([other, one], most=40), draw([one], most=40)
    assert Counter(found.domain for found in both) == {0: 12, 1: 40}
    assert {found[1:] for found in alone} == {found[1:] for found in both if found.domain == 1}


def test_a_window_beside_the_last_position_is_refused() -> None:
    with pytest.raises(ValueError, match="window: 5 has no meaning"):
        domains.training_examples([domain([[1, 2]])], window=5, samples=None, seed=0, positions="last")


def test_united_domains_have_one_numbering() -> None:
    one, other = domain([[1, 2], [3]], ["a"] * 3), domain([[1, 1]], ["a"], name="e")
    names, histories = domains.united([one, other])
    assert names == ["", "t1", "t2", "t3", "", "t1"]
    assert [[names[item] for item in history] for history in histories] == [["t1", "t2"], ["t3"], ["t1", "t1"]]
    assert histories[2].tolist() == [5, 5]


def test_a_mixture_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="d, e: no user has two training interactions"):
        domains.training_examples([domain([[1]]), domain([[]], name="e")], window=None, samples=None, seed=0)
