"""Scenarios: what a run holds out of training and validation and tests on; the same for every model.

A scenario reduces the interaction table before RecBole splits it, so RecBole's models run under it as well, and leave-one-out
is the only split:

======================  ================================  ===========================================  ===================
key                     held out                          test users                                   test candidates
======================  ================================  ===========================================  ===================
``new_items: 0.1``      a tenth of the items              users with one of them after three others    half of them new
``cold_users: 0.1``     a tenth of the users, all but     these users                                  all items
                        their first three interactions
``train_users: 128``    all users but 128                 all users                                    all items
``train_dataset: X``    ``dataset``; X is trained on      all users of ``dataset``                     items of ``dataset``
======================  ================================  ===========================================  ===================

Whether a user or item is held out depends on ``candidates.seed`` and its token alone, not on internal ids, row order or other
data. So the 256 users of ``train_users: 256`` include the 128 of ``train_users: 128``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from recbole_llm.data.atomic_files import AtomicFormat
from recbole_llm.data.histories import Histories, Scenario

KEYS = ("new_items", "cold_users", "train_users", "train_dataset")
SETTINGS = (*KEYS, "cold_user_length")
TEXTS = {f"{name}_field": name for name in ("title", "year", "brand", "category", "description")}
# settings for the files that `unite` writes: their texts are clean, and each dataset has been filtered
SEPARATOR = "|"
UNITED: dict[str, Any] = {
    **TEXTS,
    **AtomicFormat(seq_separator=SEPARATOR).as_dict(),
    "no_value": [],
    "article_suffix": False,
    "val_interval": None,
    "unload_col": None,
    "user_inter_num_interval": None,
    "item_inter_num_interval": None,
}


def active(settings: Any) -> str | None:
    """The key of the active scenario, if any."""
    return next((key for key in KEYS if settings[key] is not None), None)


def check(settings: Mapping[str, Any]) -> None:
    """Check the scenario's settings.

    Raises:
        ValueError: a setting is invalid; the message names key, value and remedy.
    """
    key = active(settings)
    if key is None:
        return
    value = settings[key]
    also = [other for other in KEYS if other != key and settings[other] is not None]
    if also:
        raise ValueError(f"{key}: {value} and {also[0]}: {settings[also[0]]}: a run has one scenario, remove one of them")
    if key in ("new_items", "cold_users") and not (isinstance(value, (int, float)) and 0 < value < 1):
        raise ValueError(f"{key}: {value!r} is not a share between 0 and 1, such as 0.1")
    if key == "train_users" and not (isinstance(value, int) and value >= 2):
        raise ValueError(f"train_users: {value!r} is not a number of users of at least 2, such as 128")
    if key == "train_dataset" and (not isinstance(value, str) or value == settings["dataset"]):
        raise ValueError(f"train_dataset: {value!r} must name another dataset than the tested one, {settings['dataset']!r}")
    length = settings["cold_user_length"]
    if key == "cold_users" and not (isinstance(length, int) and length >= 3):
        raise ValueError(f"cold_user_length: {length!r} must be 3 or more: a history of two interactions and a target")
    if settings.get("benchmark_filename"):
        raise ValueError(f"benchmark_filename: {key} needs a single .inter file, not files that are split already")
    arguments = settings["eval_args"]
    if arguments.get("split") != {"LS": "valid_and_test"} or arguments.get("order") != "TO":
        raise ValueError(
            f"eval_args: {key} needs the last item of each user as target, split: {{'LS': 'valid_and_test'}} and order: TO, "
            f"not {arguments.get('split')} and {arguments.get('order')}"
        )
    if set(arguments["mode"].values()) != {"full"}:  # mode: candidates is full ranking to RecBole
        raise ValueError(f"eval_args: {key} needs mode: candidates or full, not {arguments['mode']}; its samplers ignore it")


def hold_out(
    config: Any, users: np.ndarray, items: np.ndarray, user_ids: Sequence[str], item_ids: Sequence[str]
) -> tuple[np.ndarray, Scenario]:
    """Which interactions remain, BoolArray[R], and what is held out, under the scenario of ``config``.

    Args:
        users, items: internal ids [R] of all interactions, sorted by user, then in time order.
        user_ids, item_ids: tokens by internal id; [0] is padding.

    Raises:
        ValueError: the dataset has fewer than ``train_users`` users.
    """
    key, seed = active(config), config["candidates"]["seed"]
    start = np.searchsorted(users, users)  # [R], the first row of the row's user
    place = np.arange(len(users)) - start  # [R], in the user's history
    lengths = np.bincount(users, minlength=len(user_ids))  # [U]
    whole = np.ones(len(users), dtype=bool)  # [R]
    if key == "new_items":
        new = draw_lots(item_ids, seed, key) < config[key]  # [I]
        kept, tested = _end_in_new(users, new[items], start, len(user_ids))
        return kept, Scenario(f"new{config[key]:g}", new=_ids(new), tested=_ids(tested), new_share=0.5)
    if key == "cold_users":
        length = config["cold_user_length"]
        cold = (draw_lots(user_ids, seed, key) < config[key]) & (lengths >= length)  # [U]
        kept = ~cold[users] | (place < length)
        return kept, Scenario(f"cold{config[key]:g}x{length}", untrained=_ids(cold), tested=_ids(cold))
    if key == "train_users":
        able = lengths >= 4  # [U]
        if config[key] > able.sum():
            raise ValueError(f"train_users: {config[key]} is more than the {able.sum()} users with four interactions; lower it")
        lots = np.where(able, draw_lots(user_ids, seed, key), np.inf)  # [U]
        trained = np.isin(np.arange(len(user_ids)), np.argsort(lots, kind="stable")[: config[key]])
        return whole, Scenario(f"few{config[key]}", untrained=_ids(~trained), tested=_ids(able))
    prefix = token_prefix(config["dataset"].removeprefix(f"{config['train_dataset']}+"))
    own_users, own_items = (np.array([token.startswith(prefix) for token in ids]) for ids in (user_ids, item_ids))
    own = _ids(own_users)
    return whole, Scenario(f"from-{config[key]}", untrained=own, new=_ids(own_items), tested=own, new_share=1.0)


def draw_lots(tokens: Sequence[str], seed: int, purpose: str) -> np.ndarray:
    """A number in [0, 1) for each token, FloatArray[N], that depends on seed, purpose and token alone."""
    digests = (sha256(f"{seed}\t{purpose}\t{token}".encode()).digest() for token in tokens)
    return np.array([int.from_bytes(digest[:6]) / 2**48 for digest in digests])


def _end_in_new(users: np.ndarray, new: np.ndarray, start: np.ndarray, user_num: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [R] that remain if each history ends at its last new item with three others before it, and the users [U] who have one.

    All other new items are removed.
    """
    others = np.concatenate([[0], np.cumsum(~new)])  # [R + 1], rows before that are not new
    known = others[:-1] - others[start]  # [R], of the same user
    possible = np.flatnonzero(new & (known >= 3))
    end = np.full(user_num, -1)  # [U]
    np.maximum.at(end, users[possible], possible)
    row, last = np.arange(len(users)), end[users]  # [R]
    return (~new & ((row < last) | (last < 0))) | (row == last), end >= 0


def _ids(mask: np.ndarray) -> frozenset[int]:
    """Internal ids where a mask is True, without the padding id 0."""
    return frozenset((np.flatnonzero(mask[1:]) + 1).tolist())


def token_prefix(dataset: str) -> str:
    """The prefix of the tokens of a dataset in :mod:`recbole_llm.data.united`."""
    return f"{dataset}/"  # no folder name contains a slash


def report(config: Any, histories: Histories) -> str:
    """One line about what the scenario holds out.

    Raises:
        ValueError: no validation or no test users are left.
    """
    key, scenario = active(config), histories.scenario
    valid, test = (len(histories.evaluated(phase)) for phase in ("valid", "test"))
    if not valid or not test:
        raise ValueError(
            f"{key}: {config[key]} leaves {valid} validation users and {test} test users; change it or candidates.seed"
        )
    return (
        f"{key}: {config[key]} holds {len(scenario.new)} of {len(histories.item_ids) - 1} items and {len(scenario.untrained)} of "
        f"{len(histories.user_ids) - 1} users out of training; {test} test users, {valid} validation users"
    )
