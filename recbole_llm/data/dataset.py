"""RecBole's datasets with exact time order, item texts, whole histories and a reliable download.

:class:`RankedTime` extends any RecBole dataset class: ``dataset.SequentialDataset`` is RecBole's class of that name, extended.
"""

from __future__ import annotations

import glob
import os
import shutil
import zipfile
from functools import cache, cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.data import forms, repeats, scenarios, ties
from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError, AtomicFormat
from recbole_llm.data.columns import NamedColumns
from recbole_llm.data.grouping import ArrayGroups
from recbole_llm.data.histories import Histories, Scenario
from recbole_llm.data.items import NO_ITEM_FILE, ItemTexts, chosen_columns, refuse_given
from recbole_llm.data.masking import KnownItems, Masking
from recbole_llm.data.passport import Interactions
from recbole_llm.data.sequences import UnbuiltLists
from recbole_llm.data.splitting import Split
from recbole_llm.data.tables import StrictTables
from recbole_llm.data.times import odd_times


class RankedTime(Split, StrictTables, NamedColumns, ArrayGroups):
    """Mixin for a RecBole dataset class.

    Attributes:
        scenario: what the run holds out.
        known_items: of a validation or test split, what a full ranking masks; None if it masks nothing.
    """

    scenario = Scenario()
    known_items: KnownItems | None = None
    repeats_dropped = 0
    equal_rows = 0  # of repeats_dropped, those with the time of another one, too
    repeats_kept = False
    read_counts = (0, 0, 0)  # users, items and interactions of the files, before the filters

    def _data_filtering(self: Any) -> None:
        self._count()
        super()._data_filtering()  # type: ignore[misc]

    def _count(self: Any) -> None:
        frame = self.inter_feat
        self.read_counts = (frame[self.uid_field].nunique(), frame[self.iid_field].nunique(), len(frame))

    def _data_processing(self: Any) -> None:
        """Remove what the scenario holds out, after RecBole's filters and numbering of tokens: ids do not change."""
        if self.benchmark_filename_list is not None:  # which RecBole does not filter
            self._count()
            self._remove_duplication()
            self._leave_out_unknown()
            self.inter_feat.reset_index(drop=True, inplace=True)
        super()._data_processing()  # type: ignore[misc]
        if self.config["rm_dup_inter"] is None:
            self.repeats_kept = repeats.any_left(self)
        if scenarios.active(self.config):
            order = self._order
            users, items = (self.inter_feat[field].to_numpy()[order] for field in (self.uid_field, self.iid_field))
            rows, self.scenario = scenarios.hold_out(self.config, users, items, *self.tokens)
            self.inter_feat = self.inter_feat.iloc[order[rows]].reset_index(drop=True)

    def _remove_duplication(self: Any) -> None:
        self.repeats_dropped = repeats.drop(self)

    @property
    def file_of_row(self: Any) -> np.ndarray:
        """The number of the file that each row was read from [R], 0 unless files are split already."""
        if self.benchmark_filename_list is None:
            return np.zeros(len(self.inter_feat), dtype=np.int64)
        return np.repeat(np.arange(len(self.file_size_list)), self.file_size_list)

    def build(self: Any) -> Any:
        """RecBole's splits, with the same evaluation users for every model and with what a full ranking masks."""
        masked = self.config["full_phases"] if self.masking.masks(self.config["MODEL_TYPE"]) else []
        if forms.leaves_one_out(self.config):
            self.inter_feat = self.inter_feat.iloc[self.time_order].reset_index(drop=True)
            self.inter_feat[self.time_field] = np.arange(len(self.inter_feat), dtype=np.float64)  # by which RecBole sorts
        splits = super().build()  # type: ignore[misc]
        for phase in masked:
            splits[1 if phase == "valid" else 2].known_items = KnownItems(self.histories)
        if self.scenario.label:
            _keep(splits[0], [user for user in range(self.user_num) if user not in self.scenario.untrained])
        if forms.leaves_one_out(self.config):
            for split, phase in zip(splits[1:], ("valid", "test"), strict=True):
                _keep(split, self.histories.evaluated(phase))
        return splits

    @cached_property
    def masking(self: Any) -> Masking:
        """The rule of a full ranking; must be read first before :meth:`build`, whose splits copy it."""
        return Masking.of(self.config, repeats_kept=repeats.repeats_kept(self))

    @property
    def time_order(self: Any) -> np.ndarray:
        """Rows [R] in time order, equal times by ``tie_order``.

        RecBole sorts once more, by times in float32, which has 24 bits; a Unix time needs 31 (RUCAIBox/RecBole#1653). Its sort is
        stable, so rows in this order stay in it.
        """
        return np.lexsort((self._tie_keys, self._times))

    @property
    def _times(self: Any) -> np.ndarray:
        if self.time_field in self.inter_feat:
            return self.inter_feat[self.time_field].to_numpy()
        if not forms.needs_time(self.config):
            return np.zeros(len(self.inter_feat))  # all rows are in the order of the file
        raise ValueError(
            f"TIME_FIELD: {self.time_field} is not loaded from {self.dataset_path}; name the time column of the .inter "
            f"file and list it in load_col (columns loaded: {', '.join(self.inter_feat)}). Without times, files that are split "
            "already (benchmark_filename) and, for models that read no histories, eval_args: {'order': 'RO'} are possible"
        )

    @property
    def odd_times(self: Any) -> list[str]:
        """What :func:`recbole_llm.data.times.odd_times` says of the column of times."""
        return odd_times(self.inter_feat[self.time_field].to_numpy()) if self.time_field in self.inter_feat else []

    @cached_property
    def histories(self: Any) -> Histories:
        """Whole histories; must be read first before :meth:`build`, whose splits copy them."""
        frame, order = self.inter_feat, self._order
        users = frame[self.uid_field].to_numpy()[order]
        items = frame[self.iid_field].to_numpy()[order].astype(np.int64)
        starts = np.searchsorted(users, np.arange(1, self.user_num))
        times = self._times[order]
        moments = np.cumsum(np.concatenate([[True], times[1:] != times[:-1]]))  # [R], rises with the time in each history
        by_user, moments_by_user = ([np.empty(0, dtype=np.int64), *np.split(values, starts[1:])] for values in (items, moments))
        for user, known in self._before_first_row(users, items, order).items():  # at moments before that row's
            by_user[user] = np.concatenate([np.array(known, dtype=np.int64), by_user[user]])
            moments_by_user[user] = np.concatenate(
                [moments_by_user[user][0] - np.arange(len(known), 0, -1), moments_by_user[user]]
            )
        user_ids, item_ids = self.tokens
        disliked = self._disliked(users, items, order)
        facts = self.repeats_kept, moments_by_user, self.held_out
        return Histories(user_ids, item_ids, by_user, self.scenario, disliked, *facts)

    @property
    def interactions(self: Any) -> Interactions:
        """All interactions by user and time, however they are split; must be read before :meth:`build` replaces the table."""
        users, items = (self.inter_feat[field].to_numpy() for field in (self.uid_field, self.iid_field))
        timed = self.time_field in self.inter_feat
        order = np.lexsort((self._tie_keys, self._times, users)) if timed else np.argsort(users, kind="stable")
        users, items = users[order].astype(np.int64), items[order].astype(np.int64)
        tied = np.append(False, users[1:] == users[:-1])
        if timed:
            times = self._times[order]
            tied[1:] &= times[1:] == times[:-1]
        return Interactions(users, items, tied, *self.tokens)

    def _disliked(self: Any, users: np.ndarray, items: np.ndarray, order: np.ndarray) -> list[frozenset[int]] | None:
        """The items that each user rated with ``liked_above`` or less; None without that key or without ratings.

        Of several ratings of an item the first one counts: the last one may be that of a held-out interaction.
        """
        least, column = self.config["liked_above"], self.config["RATING_FIELD"]
        if least is None or column not in self.inter_feat:
            return None
        rated = pd.DataFrame({"user": users, "item": items, "rating": self.inter_feat[column].to_numpy()[order]})
        low = rated.drop_duplicates(["user", "item"]).query("rating <= @least")
        ends = np.searchsorted(low["user"], np.arange(self.user_num), side="right")
        return [frozenset(own.tolist()) for own in np.split(low["item"].to_numpy(), ends[:-1])]

    @property
    def _order(self: Any) -> np.ndarray:
        """Rows by user, then in time order (of training, of validation, of test); equal times by ``tie_order``."""
        keys = [self._tie_keys, self._times, self.inter_feat[self.uid_field].to_numpy()]
        if self.division is not None:
            keys.insert(2, self.part)
        return np.lexsort(keys)

    @property
    def _tie_keys(self: Any) -> np.ndarray:
        users, items = (self.inter_feat[field].to_numpy() for field in (self.uid_field, self.iid_field))
        return ties.tie_keys(self.config, users, items, self._times, *self.tokens)

    @cached_property
    def tokens(self: Any) -> tuple[list[str], list[str]]:
        """Tokens of users and items by internal id."""
        return list(map(str, self.field2id_token[self.uid_field])), list(map(str, self.field2id_token[self.iid_field]))

    @cached_property
    def item_texts(self: Any) -> ItemTexts:
        """Texts of the catalogue by internal item id, read from the ``.item`` file."""
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        if not path.is_file():
            raise FileNotFoundError(f"title_field: the file of item texts, {path}, does not exist; {NO_ITEM_FILE}")
        file = AtomicFile(path, AtomicFormat.of(self.config))
        columns = chosen_columns(file, self.config)
        if any(isinstance(self.config[key], list | tuple) for key in columns):  # of several names, those that the file has
            taken = ", ".join(f"{key}: {name}" for key, name in columns.items() if name)
            getLogger().info(f"texts of {self.dataset_name}: {taken} (columns of {path.name}: {', '.join(file.types)})")
        return ItemTexts.read(
            file,
            item_ids=self.tokens[1],
            id_field=self.iid_field,
            **columns,
            **{key: self.config[key] for key in ("article_suffix", "no_value")},
        )

    @cached_property
    def catalogue_titles(self: Any) -> list[str]:
        """Titles by which candidates are unique; item tokens if the dataset has no titles, which classical models accept.

        Raises:
            ValueError: a column that the user names is absent.
        """
        try:
            return self.item_texts.titles
        except AtomicFileError:
            raise
        except (FileNotFoundError, ValueError) as error:
            refuse_given(self.config, error)
            getLogger().info(f"candidates are unique by item id, not by title: {error}")
            return self.tokens[1]

    def _download(self: Any) -> None:
        """RecBole's download, without its prompt on standard input and its barrier, which needs a process group."""
        from recbole.utils.url import download_url, extract_zip, rename_atomic_files

        folder = Path(self.dataset_path)
        try:
            url = self._get_download_url("url")
        except ValueError as error:
            raise FileNotFoundError(_advice(self.dataset_name, folder, "RecBole knows no download of that name")) from error
        partial = folder.with_name(f".{folder.name}.download")
        shutil.rmtree(partial, ignore_errors=True)  # RecBole would reuse an incomplete archive
        getLogger().info(f"downloading [{self.dataset_name}] from [{url}]")
        try:
            archive = Path(download_url(url, str(partial)))
            extract_zip(str(archive), str(partial))
            archive.unlink()
            rename_atomic_files(str(partial), archive.stem, self.dataset_name)
            os.replace(partial, folder)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise ConnectionError(_advice(self.dataset_name, folder, f"{url} could not be fetched ({error})")) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _load_inter_feat(self: Any, token: str, dataset_path: str) -> None:
        folder = Path(dataset_path)
        parts = [file.name[len(token) + 1 : -len(".inter")] for file in sorted(folder.glob(f"{glob.escape(token)}.*.inter"))]
        for name in self.benchmark_filename_list or ():
            if name not in parts:
                raise FileNotFoundError(
                    f"benchmark_filename: {folder / token}.{name}.inter does not exist; the parts there are {parts}"
                )
        if self.benchmark_filename_list is None and not (folder / f"{token}.inter").is_file():
            split = f', but parts of it do: give --benchmark_filename="{parts}" in the order train, valid, test' if parts else ""
            raise FileNotFoundError(_advice(token, folder, f"{folder / token}.inter does not exist{split}"))
        super()._load_inter_feat(token, dataset_path)  # type: ignore[misc]


def _advice(name: str, folder: Path, reason: str) -> str:
    return (
        f"--dataset={name}: {reason}. Put the atomic files {name}.inter (user_id:token, item_id:token, timestamp:float) and "
        f"{name}.item (item_id:token and a title) into {folder.absolute()}, or set --data_path to the folder that contains "
        f"{name}/. --dataset=ml-100k comes with RecBole and needs no download."
    )


def _keep(split: Any, users: Any) -> None:
    """Keep the rows of ``users`` in a split."""
    rows = np.isin(split.inter_feat[split.uid_field].numpy(), users)
    if not rows.all():
        split.inter_feat = split.inter_feat[np.flatnonzero(rows)]


def __getattr__(name: str) -> type:
    """RecBole's dataset class of that name, extended; unpickling a checkpoint with a dataset (DIN) needs it here."""
    import recbole.data.dataset as classes

    if name.startswith("_") or not hasattr(classes, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _extended(getattr(classes, name))


@cache
def _extended(base: type) -> type:
    from recbole.data.dataset import SequentialDataset

    augments = getattr(base, "data_augmentation", None) is SequentialDataset.data_augmentation
    return type(base.__name__, (RankedTime, *((UnbuiltLists,) if augments else ()), base), {"__module__": __name__})
