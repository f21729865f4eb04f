"""RecBole's datasets with exact time order, item texts, whole histories and a reliable download.

:class:`RankedTime` extends any RecBole dataset class: ``dataset.SequentialDataset`` is RecBole's class of that name, extended.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from functools import cache, cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.data import scenarios
from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError, AtomicFormat
from recbole_llm.data.grouping import ArrayGroups
from recbole_llm.data.histories import Histories, Scenario
from recbole_llm.data.items import ItemTexts, chosen_columns
from recbole_llm.data.sequences import UnbuiltLists
from recbole_llm.data.tables import StrictTables


class RankedTime(StrictTables, ArrayGroups):
    """Mixin for a RecBole dataset class."""

    scenario = Scenario()

    def _data_processing(self: Any) -> None:
        """Remove what the scenario holds out, after RecBole's filters and numbering of tokens: ids do not change."""
        super()._data_processing()  # type: ignore[misc]
        if scenarios.active(self.config):
            order = self._order
            users, items = (self.inter_feat[field].to_numpy()[order] for field in (self.uid_field, self.iid_field))
            rows, self.scenario = scenarios.hold_out(self.config, users, items, *self._tokens)
            self.inter_feat = self.inter_feat.iloc[order[rows]].reset_index(drop=True)

    def build(self: Any) -> Any:
        self._rank_time()
        splits = super().build()  # type: ignore[misc]
        if self.scenario.label:
            histories = self.histories
            trained = [user for user in range(self.user_num) if user not in self.scenario.untrained]
            evaluated = (histories.evaluated(phase) for phase in ("valid", "test"))
            for split, users in zip(splits, (trained, *evaluated), strict=True):
                rows = np.isin(split.inter_feat[self.uid_field].numpy(), users)
                split.inter_feat = split.inter_feat[np.flatnonzero(rows)]
        return splits

    def _rank_time(self: Any) -> None:
        """Replace timestamps by their dense rank: float32 has 24 bits, a Unix time needs 31 (RUCAIBox/RecBole#1653)."""
        if leaves_one_out(self.config):
            self.inter_feat[self.time_field] = np.unique(self._times, return_inverse=True)[1].astype(np.float64)

    @property
    def _times(self: Any) -> np.ndarray:
        if self.time_field not in self.inter_feat:
            raise ValueError(
                f"TIME_FIELD: {self.time_field} is not loaded from {self.dataset_path}; name the time column of the .inter "
                f"file and list it in load_col (columns loaded: {', '.join(self.inter_feat)})"
            )
        return self.inter_feat[self.time_field].to_numpy()

    @cached_property
    def histories(self: Any) -> Histories:
        """Whole histories; must be read first before :meth:`build`, whose splits copy them."""
        frame, order = self.inter_feat, self._order
        users = frame[self.uid_field].to_numpy()[order]
        items = frame[self.iid_field].to_numpy()[order].astype(np.int64)
        starts = np.searchsorted(users, np.arange(1, self.user_num))
        by_user = [np.empty(0, dtype=np.int64), *np.split(items, starts[1:])]
        user_ids, item_ids = self._tokens
        return Histories(user_ids, item_ids, by_user, self.scenario, self._disliked(users, items, order))

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
        """Rows by user, then in time order; equal times in the order of the file."""
        return np.lexsort((self._times, self.inter_feat[self.uid_field].to_numpy()))

    @cached_property
    def _tokens(self: Any) -> tuple[list[str], list[str]]:
        """Tokens of users and items by internal id."""
        return list(map(str, self.field2id_token[self.uid_field])), list(map(str, self.field2id_token[self.iid_field]))

    @cached_property
    def item_texts(self: Any) -> ItemTexts:
        """Texts of the catalogue by internal item id, read from the ``.item`` file."""
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        if not path.is_file():
            raise FileNotFoundError(f"title_field: the file of item texts, {path}, does not exist")
        file = AtomicFile(path, AtomicFormat.of(self.config))
        return ItemTexts.read(
            file,
            item_ids=self._tokens[1],
            id_field=self.iid_field,
            **chosen_columns(file, self.config),
            **{key: self.config[key] for key in ("article_suffix", "no_value")},
        )

    @cached_property
    def catalogue_titles(self: Any) -> list[str]:
        """Titles by which candidates are unique; item tokens if the dataset has no titles, which classical models accept."""
        try:
            return self.item_texts.titles
        except AtomicFileError:
            raise
        except (FileNotFoundError, ValueError) as error:
            getLogger().info(f"candidates are unique by item id, not by title: {error}")
            return self._tokens[1]

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
        file = Path(dataset_path) / f"{token}.inter"
        if self.benchmark_filename_list is None and not file.is_file():
            raise FileNotFoundError(_advice(token, Path(dataset_path), f"{file} does not exist"))
        super()._load_inter_feat(token, dataset_path)  # type: ignore[misc]


def _advice(name: str, folder: Path, reason: str) -> str:
    return (
        f"--dataset={name}: {reason}. Put the atomic files {name}.inter (user_id:token, item_id:token, timestamp:float) and "
        f"{name}.item (item_id:token and a title) into {folder.absolute()}, or set --data_path to the folder that contains "
        f"{name}/. --dataset=ml-100k comes with RecBole and needs no download."
    )


def leaves_one_out(config: Any) -> bool:
    """Whether the last items of each user, in time order, are the validation and test targets."""
    return config["eval_args"]["order"] == "TO" and "LS" in config["eval_args"]["split"]


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
