"""Repeats: interactions of a user with an item chosen before. They are dropped before the split, or kept (``rm_dup_inter``).

Where a target may be in the history and a negative never is, "the candidate from the history" is a perfect answer. So repeats are
dropped by default. With repeats kept, items of the history may be negatives too, and a full ranking does not mask them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories

RULES = ("first", "last", None)


def check(config: Any) -> None:
    """Raises ValueError for an unknown ``rm_dup_inter``."""
    if config["rm_dup_inter"] not in RULES:
        raise ValueError(
            f"rm_dup_inter: {config['rm_dup_inter']!r} is unknown; choose first or last, the interaction of a user with an item "
            "that stays, or ~ to keep all of them"
        )


def repeats_kept(dataset: Any) -> bool:
    """Whether ``rm_dup_inter`` is ~ and the data has repeats. Holds for the dataset of a run and for its splits."""
    return bool(dataset.repeats_kept)


def drop(dataset: Any) -> int:
    """Drop the repeats of a RecBole dataset whose tokens are not yet numbered; returns their number.

    ``rm_dup_inter: first`` keeps the earliest interaction of a user with an item, ``last`` the latest; equal times count in the
    order of the file. RecBole's own method leaves the rows sorted by time, equal times in any order; here the rows that are left
    stay in the order of the file. Files that are split already count one after the other, as in ``benchmark_filename``.

    Raises:
        ValueError: a target in such a file would be dropped, though the protocol needs one per user; or the rows contain lists.
    """
    keep, frame, files = dataset.config["rm_dup_inter"], dataset.inter_feat, dataset.file_of_row
    if keep is None:
        return 0
    times = frame[dataset.time_field].to_numpy() if dataset.time_field in frame else np.zeros(len(frame))
    order = np.lexsort((times, files))  # [R]
    pairs = frame[[dataset.uid_field, dataset.iid_field]].iloc[order]
    repeated, lost = (np.zeros(len(frame), dtype=bool) for _ in range(2))  # [R]
    repeated[order] = pairs.duplicated(keep=keep)
    if repeated.any() and dataset.benchmark_filename_list is not None:
        lost[order] = repeated[order] & ~pairs.assign(_file=files[order]).duplicated(keep=keep) & (files[order] > 0)
        _check_split_files(dataset, int(lost.sum()))
        dataset.file_size_list = np.bincount(files[~repeated], minlength=len(dataset.file_size_list)).tolist()
        if empty := [dataset.benchmark_filename_list[file] for file in np.flatnonzero(np.equal(dataset.file_size_list, 0))]:
            raise ValueError(
                f"benchmark_filename: every row of {empty[0]} repeats one of another file; give rm_dup_inter: ~ to keep them"
            )
    frame.drop(frame.index[repeated], inplace=True)
    return int(repeated.sum())


def _check_split_files(dataset: Any, lost: int) -> None:
    rule = f"rm_dup_inter: {dataset.config['rm_dup_inter']}"
    remedy = (
        "give rm_dup_inter: ~ to keep repeats (items of the history may be negatives then), or remove these rows from the files"
    )
    if f"{dataset.iid_field}{dataset.config['LIST_SUFFIX']}" in dataset.inter_feat:
        raise ValueError(
            f"benchmark_filename: {rule} cannot drop repeats from files whose rows contain whole histories; {remedy}"
        )
    if lost and dataset.config["candidate_phases"]:
        raise ValueError(
            f"benchmark_filename: {rule} would drop {lost} targets that another file has for the same user, and candidates need "
            f"the target of every user; {remedy}"
        )


def repeated_targets(histories: Histories, phase: str) -> float:
    """Share of the evaluation users of a phase whose target is in their history before it."""
    users = histories.evaluated(phase).tolist()
    if not users or not histories.repeats_kept:
        return 0.0
    return sum(histories.target(user, phase) in histories.before(user, phase) for user in users) / len(users)
