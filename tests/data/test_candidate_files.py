"""Candidate files: read back as they were drawn, refused where they are damaged, regenerated where they are outdated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_llm.data import candidate_files as files
from recbole_llm.data.candidate_files import candidate_path, load_or_draw, read_candidates, write_candidates
from recbole_llm.data.candidates import CandidateSet
from tests.data.draws import draw
from tests.data.test_candidates import IDS, ITEMS, USER_IDS, as_tokens, toy

ORIGIN = {"titles": "a1", "histories": "b2"}


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, CandidateSet]:
    path = candidate_path(tmp_path, dataset="toy", split="test", source="uniform", number=19, seed=2020)
    assert candidate_path(tmp_path, dataset="toy", split="test", source="uniform", number=19, seed=2020, scenario="new0.1") == (
        tmp_path / "toy.new0.1.test.uniform19-2020.candidates"
    )
    arguments = toy()
    users, targets = torch.arange(1, 41), torch.tensor(arguments["targets"])
    return path, load_or_draw(path, users, targets, USER_IDS, IDS, lambda: draw(**arguments), ORIGIN)


def test_file(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    assert path.name == "toy.test.uniform19-2020.candidates"
    lines = path.read_text().split("\n")
    assert lines[0] == "user_id:token\titem_id:token\tcandidates:token_seq" and lines[-1] == ""
    users = [line.split("\t")[0] for line in lines[1:-1]]
    assert users == sorted(USER_IDS[1:])
    assert sha256(path.read_bytes()).hexdigest() == found.sha256 == found.identity
    origin = json.loads((path.parent / f"{path.name}.json").read_text())
    assert origin == {"sha256": found.sha256, "drawn_from": ORIGIN}


def test_what_is_read_is_what_was_drawn(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    arguments = toy()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    users, targets = torch.arange(1, 41)[order], torch.tensor(arguments["targets"])[order]
    assert torch.equal(found.lookup(users, targets), draw(**arguments)[order])
    renumbered = ["[PAD]", *reversed(IDS[1:])]
    other = read_candidates(path, USER_IDS, renumbered)
    assert other.sha256 == found.sha256
    assert as_tokens(other.items, renumbered) == as_tokens(found.items, IDS)


def test_a_sound_file_is_read_at_once_and_any_other_line_by_line(stored: tuple[Path, CandidateSet]) -> None:
    """To the same arrays; carriage returns are no damage."""
    content = stored[0].read_bytes()
    slowly = files._lines(content, USER_IDS, IDS, True)
    found = files._arrays(content, USER_IDS, IDS, True)
    assert found is not None and all(torch.equal(*pair) for pair in zip(found, slowly, strict=True))
    returned = content.replace(b"\n", b"\r\n")
    assert files._arrays(returned, USER_IDS, IDS, True) is None
    assert torch.equal(files._lines(returned, USER_IDS, IDS, True)[2], found[2])
    lines = content.decode().split("\n")
    damages = [
        "\n".join(lines[1:]),
        content.decode() + "\n",
        content.decode()[:-1],
        lines[0] + "\n",
        "\n".join([*lines[:3], "", *lines[3:]]),
        "\n".join([*lines[:3], lines[2], *lines[3:]]),
        "\n".join([*lines[:3], lines[3].replace("\t", "\tq", 1), *lines[4:]]),
        "\n".join([*lines[:3], "[PAD]" + lines[3][lines[3].index("\t") :], *lines[4:]]),
        "\n".join([*lines[:3], lines[3] + " " + lines[3].split(" ")[-1], *lines[4:]]),
        "\n".join([*lines[:3], lines[3].rsplit(" ", 1)[0], *lines[4:]]),
        "\n".join([*lines[:3], lines[3] + "\tmore", *lines[4:]]),
        "\n".join([*lines[:3], lines[3].replace(" ", "  ", 1), *lines[4:]]),
        "\n".join([*lines[:3], f'"{lines[3]}', *lines[4:]]),
    ]
    for damage in damages:
        assert files._arrays(damage.encode(), USER_IDS, IDS, True) is None
        with pytest.raises(ValueError, match=r"^line \d+: "):
            files._lines(damage.encode(), USER_IDS, IDS, True)
    assert files._arrays(content.replace(b"\ti", b"\t\xff"), USER_IDS, IDS, True) is None


def test_lookup_and_covers(stored: tuple[Path, CandidateSet]) -> None:
    _, found = stored
    user, target = found.users[:1], found.targets[:1]
    with pytest.raises(ValueError, match=r"1 of 2 users have none for their target, the first is user \d+ with item"):
        found.lookup(user.repeat(2), torch.cat([target, target % ITEMS + 1]))
    with pytest.raises(ValueError, match="the first is user 999"):
        found.lookup(torch.tensor([999]), target)
    assert found.covers(torch.tensor([1, 41, 40, 0])).tolist() == [True, False, True, False]


def test_a_stored_file_of_the_same_origin_wins_over_a_new_draw(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    again = load_or_draw(path, found.users, found.targets, USER_IDS, IDS, lambda: pytest.fail("drawn again"), ORIGIN)
    assert again.sha256 == found.sha256


def damage(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: damage(path, 1, "user_id", "users"), "line 1: the header must be"),
        (lambda path: damage(path, 3, "\t", " "), "line 3: 2 cells"),
        (lambda path: damage(path, 4, "u", "nobody"), "line 4: user 'nobody"),
        (lambda path: damage(path, 5, "\ti", "\tnothing"), "line 5: items .'nothing"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b" i", b" \xff", 1)), "line 2: items"),
        (lambda path: path.write_text(path.read_text()[:-1]), "line 40: the end is missing"),
        (lambda path: path.write_text(""), "line 1: the header"),
        (lambda path: path.write_text(path.read_text().split("\n")[0] + "\n"), "line 1: the end is missing"),
        (
            lambda path: path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n"),
            "line 42: an earlier line has the same",
        ),
    ],
)
def test_damaged_file(stored: tuple[Path, CandidateSet], change: Any, message: str) -> None:
    path, found = stored
    change(path)
    with pytest.raises(ValueError, match=f"{path.name}, {message}.*correct the file"):
        read_candidates(path, USER_IDS, IDS)
    rebuilt = load_or_draw(path, found.users, found.targets, USER_IDS, IDS, lambda: found.items, ORIGIN)
    assert rebuilt.sha256 == found.sha256


def write(folder: Path, *lines: str) -> Path:
    path = folder / "mine.candidates"
    path.write_text("\n".join(["user_id:token\titem_id:token\tcandidates:token_seq", *lines, ""]))
    return path


def test_users_own_file(tmp_path: Path) -> None:
    found = read_candidates(write(tmp_path, "u2\ti3\ti3 i4", "u1\ti1\ti2 i1"), USER_IDS, IDS)
    assert found.lookup(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [[2, 1], [3, 4]]
    for line, message in [
        ("u1\ti1\ti2 i1 i3", "line 3: 3 candidates, but 2 in line 2"),
        ("u1\ti1\ti1 i1", "line 3: duplicate candidates"),
        ("u1\ti1\ti2 i3", "line 3: the target is not among"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_candidates(write(tmp_path, "u2\ti3\ti3 i4", line), USER_IDS, IDS)
    missed = read_candidates(write(tmp_path, "u1\ti1\ti2 i3"), USER_IDS, IDS, target_required=False)
    assert missed.items.tolist() == [[2, 3]]
    with pytest.raises(FileNotFoundError, match="candidates"):
        read_candidates(tmp_path / "none", USER_IDS, IDS)


def test_a_file_for_other_targets_is_drawn_anew(stored: tuple[Path, CandidateSet]) -> None:
    path, found = stored
    targets = found.targets % ITEMS + 1
    items = torch.stack([targets, targets % ITEMS + 1], dim=1)
    again = load_or_draw(path, found.users, targets, USER_IDS, IDS, lambda: items, ORIGIN)
    assert torch.equal(again.lookup(found.users, targets), items)


ESCAPED = "user_id:token\titem_id:escaped_token\tcandidates:escaped_token_seq"
SPACED = ["[PAD]", "SKU 34 ü", "SKU%2034%20ü", "100%", "a\tb", 'x, "y"', "%", "a\u00a0b\u3000c", "a\r\nb", "plain", "SKU", "34"]


def test_item_ids_with_white_space_are_escaped_and_read_back(tmp_path: Path) -> None:
    own = torch.arange(1, len(SPACED))
    items = (own[:, None] + torch.tensor([3, 0, 5]) - 1) % len(own) + 1
    users = ["[PAD]", *(f"u {n:02}" for n in own)]
    found = write_candidates(tmp_path / "x", own, own, items, users, SPACED)
    content = (tmp_path / "x").read_bytes()
    lines = content.decode().split("\n")
    assert lines[:2] == [ESCAPED, "u 01\tSKU%2034%20ü\ta%09b SKU%2034%20ü %25"]
    assert lines[2].startswith("u 02\tSKU%252034%2520ü\t")
    quickly = files._arrays(content, users, SPACED, True)
    assert quickly is not None and torch.equal(quickly[2], items), "as quick as other files"
    again = read_candidates(tmp_path / "x", users, SPACED)
    assert again.sha256 == found.sha256 and torch.equal(again.lookup(own, own), items)
    assert torch.equal(files._lines(content.replace(b"\n", b"\r\n"), users, SPACED, True)[2], items)
    assert files._arrays(content.replace(ESCAPED.encode(), files._HEADER.encode()), users, SPACED, True) is None


def test_a_file_whose_item_ids_have_no_white_space_is_what_it_was(tmp_path: Path) -> None:
    """To the byte, also with ids that look like escapes: records have its SHA-256."""
    ids = ["[PAD]", "a%20b", "a", "%", "ü", "x,y", '"q"', "100%"]
    own, items = torch.arange(1, 4), torch.tensor([[user, user + 1, user + 3] for user in (1, 2, 3)])
    found = write_candidates(tmp_path / "x", own, own, items, ["[PAD]", "u 1", "u2", "u3"], ids)
    assert found.sha256 == "6705b009dc34993b72d9e16ae327aec91b6f048f5b7f86407d5aa66bfa0948dc"
    assert torch.equal(read_candidates(tmp_path / "x", ["[PAD]", "u 1", "u2", "u3"], ids).items, items)


def test_users_own_file_of_item_ids_with_white_space(tmp_path: Path) -> None:
    path = write(tmp_path, "u1\tSKU%2034%20%C3%BC\tSKU%2034%20%c3%bc plain")  # more escapes than are needed
    with pytest.raises(ValueError, match=r"line 2: items \['SKU%2034%20%C3.* such as 'SKU 34 ü' as 'SKU%2034%20ü', below"):
        read_candidates(path, USER_IDS, SPACED)
    path.write_text(path.read_text().replace(files._HEADER, ESCAPED))
    assert read_candidates(path, USER_IDS, SPACED).items.tolist() == [[1, 9]]


def test_an_empty_item_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an item id is empty"):
        write_candidates(tmp_path / "x", torch.tensor([1]), torch.tensor([1]), torch.tensor([[1]]), USER_IDS, ["[PAD]", ""])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["a\tb", "a\nb", "a\r"])
def test_user_ids_with_what_separates_cells_are_refused(tmp_path: Path, broken: str) -> None:
    with pytest.raises(ValueError, match="user id .* contains what separates cells"):
        write_candidates(tmp_path / "x", torch.tensor([1]), torch.tensor([1]), torch.tensor([[1]]), ["[PAD]", broken], IDS)
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_is_read_and_in_the_order_of_the_tokens(tmp_path: Path) -> None:
    """By code points, as the bytes of UTF-8 are."""
    users = ["[PAD]", "z", "\U0001f600", "\uffee", "é", "10", "9"]
    own, items = torch.arange(1, 7), torch.tensor([[user, user + 1] for user in range(1, 7)])
    found = write_candidates(tmp_path / "x", own, own, items, users, IDS)
    again = read_candidates(tmp_path / "x", users, IDS)
    for part in ("users", "targets", "items", "sha256"):
        one, two = getattr(found, part), getattr(again, part)
        assert one == two if part == "sha256" else torch.equal(one, two)
    assert [users[user] for user in found.users.tolist()] == sorted(users[1:])


# -- what it was drawn from --------------------------------------------------------------------------------------------


def flip_a_digit(path: Path) -> None:
    """Another item of the catalogue, so that every line is still sound."""
    first = path.read_text().split("\n")[1].split("\t")
    items = first[2].split(" ")
    place = next(place for place, item in enumerate(items) if item != first[1])
    other = next(item for item in IDS[1:] if item not in items)
    damage(path, 2, first[2], " ".join([*items[:place], other, *items[place + 1 :]]))
    read_candidates(path, USER_IDS, IDS)


def in_place_of(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")  # reading /dev/zero or a pipe would not end


@pytest.mark.parametrize(
    ("change", "origin", "message"),
    [
        (lambda path: None, {**ORIGIN, "titles": "a2"}, "has changed: titles$"),
        (lambda path: None, {"titles": "a2", "histories": "b3"}, "has changed: titles, histories$"),
        (lambda path: None, {**ORIGIN, "retriever": "c3"}, "has changed: retriever$"),
        (lambda path: None, {"titles": "a1"}, "has changed: histories$"),
        (flip_a_digit, ORIGIN, "it is damaged, its SHA-256 is not the one in .*json$"),
        (lambda path: path.write_text(path.read_text()[:-9]), ORIGIN, "it is damaged, line 40: the end is missing"),
        (in_place_of, ORIGIN, "is damaged: it is a pipe or a device, not a file$"),
        (lambda path: path.with_name(f"{path.name}.json").unlink(), ORIGIN, "json, which records .* is missing or damaged$"),
        (lambda path: path.with_name(f"{path.name}.json").write_text("[]"), ORIGIN, "json, which records .* missing or damaged$"),
    ],
    ids=["one", "two", "more", "fewer", "digit", "truncated", "device", "no origin", "damaged origin"],
)
def test_it_is_drawn_anew_with_a_line_in_the_log(
    stored: tuple[Path, CandidateSet],
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    origin: dict[str, str],
    message: str,
) -> None:
    path, found = stored
    change(path)
    items = found.items.flip(1)
    again = load_or_draw(path, found.users, found.targets, USER_IDS, IDS, lambda: items, origin)
    assert torch.equal(again.lookup(found.users, found.targets), items) and again.sha256 != found.sha256
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} is regenerated: ")
    assert re.search(message, line)
    load_or_draw(path, found.users, found.targets, USER_IDS, IDS, lambda: pytest.fail("drawn again"), origin)
    assert len(caplog.records) == 1


def test_a_first_draw_and_a_file_of_the_users_own_say_nothing(
    stored: tuple[Path, CandidateSet], caplog: pytest.LogCaptureFixture
) -> None:
    path, found = stored
    path.with_name(f"{path.name}.json").unlink()
    assert read_candidates(path, USER_IDS, IDS).sha256 == found.sha256 and not caplog.records
