"""Repeats: interactions of a user with an item chosen before. They are dropped before the split, or kept (``rm_dup_inter``).

Where a target may be in the history and a negative never is, "the candidate from the history" is a perfect answer. So repeats are
dropped by default. With repeats kept, items of the history may be negatives too, and a full ranking does not mask them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories


def repeats_kept(dataset: Any) -> bool:
    """Whether ``rm_dup_inter`` is ~ and the data has repeats. Holds for the dataset of a run and for its splits."""
    return bool(dataset.repeats_kept)


def drop(dataset: Any) -> int:
    """Drop the repeats of a RecBole dataset whose tokens are not yet numbered; returns their number.

    ``rm_dup_inter: first`` keeps the earliest interaction of a user with an item, ``last`` the latest; equal times count in the
    order of the file. RecBole's own method leaves the rows sorted by time, equal times in any order; here the rows that are left
    stay in the order of the file. Files that are split already count one after the other, as in ``benchmark_filename``.

    A target that repeats an item of an earlier file is dropped too, and its user is not evaluated on it.

    Raises:
        ValueError: nothing is left of a file, or rows of such files contain whole histories, which cannot be reduced.
    """
    keep, frame, files = dataset.config["rm_dup_inter"], dataset.inter_feat, dataset.file_of_row
    if keep is None:
        return 0
    times = frame[dataset.time_field].to_numpy() if dataset.time_field in frame else np.zeros(len(frame))
    order = np.lexsort((times, files))  # [R]
    repeated = np.zeros(len(frame), dtype=bool)  # [R]
    repeated[order] = frame[[dataset.uid_field, dataset.iid_field]].iloc[order].duplicated(keep=keep)
    if dataset.benchmark_filename_list is not None:
        _check_lists(dataset)
        dataset.file_size_list = np.bincount(files[~repeated], minlength=len(dataset.file_size_list)).tolist()
        for name, size in zip(dataset.benchmark_filename_list, dataset.file_size_list, strict=True):
            if not size:
                raise ValueError(f"benchmark_filename: every row of {name} repeats one of another file; give rm_dup_inter: ~")
    dataset.equal_rows = equal_rows(dataset) if repeated.any() else 0
    frame.drop(frame.index[repeated], inplace=True)
    return int(repeated.sum())


def equal_rows(dataset: Any) -> int:
    """The number of loaded rows that repeat user, item and time of another row."""
    columns = [name for name in (dataset.uid_field, dataset.iid_field, dataset.time_field) if name in dataset.inter_feat]
    pairs = dataset.inter_feat[columns[:2]]
    return int(dataset.inter_feat.loc[pairs.duplicated(keep=False).to_numpy(), columns].duplicated().sum())


def any_left(dataset: Any) -> bool:
    """Whether the interactions of a RecBole dataset, before its split, contain repeats."""
    pairs = dataset.inter_feat[[dataset.uid_field, dataset.iid_field]]
    return bool(pairs.duplicated().any()) or _in_lists(dataset)


def _in_lists(dataset: Any) -> bool:
    """Whether a row's item is also in the history that the row contains, in files for RecBole's sequential models."""
    frame, lists = dataset.inter_feat, f"{dataset.iid_field}{dataset.config['LIST_SUFFIX']}"
    return lists in frame and any(item in items for item, items in zip(frame[dataset.iid_field], frame[lists], strict=True))


def _check_lists(dataset: Any) -> None:
    if _in_lists(dataset):
        raise ValueError(
            f"benchmark_filename: rm_dup_inter: {dataset.config['rm_dup_inter']} cannot drop repeats from rows that contain "
            "whole histories; give rm_dup_inter: ~ to keep them (items of the history may be negatives), or remove the column"
        )


def repeated_targets(histories: Histories, phase: str) -> float:
    """Share of the evaluation users of a phase whose target is in their history before it."""
    users = histories.evaluated(phase).tolist()
    if not users or not histories.repeats_kept:
        return 0.0
    return sum(histories.target(user, phase) in histories.before(user, phase) for user in users) / len(users)
