"""RecBole's datasets with true time order, item texts, whole histories and a download that ends well.

Any RecBole dataset class is extended by :class:`RankedTime`; nothing under ``saved/`` is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from dataclasses import dataclass
from functools import cache, cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.utils import ModelType

from recbole_llm.data import scenarios
from recbole_llm.data.items import ItemTexts, first_column
from recbole_llm.data.scenarios import Scenario

_PACKAGED = "ml-100k"  # ships inside the recbole wheel


@dataclass(frozen=True)
class Histories:
    """Every user's interactions in time order, after RecBole's filters and before any split or augmentation.

    Attributes:
        user_ids: token of each user by internal id; [0] is padding.
        item_ids: token of each item by internal id; [0] is padding.
        items: internal item ids of each user, by internal user id; [0] is empty.
        scenario: what is held out of training and validation; by default nothing but leave-one-out's two items a user.
    """

    user_ids: list[str]
    item_ids: list[str]
    items: list[np.ndarray]
    scenario: Scenario = Scenario()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all users, items and their order, and of what is held out."""
        digest = hashlib.sha256("\t".join([*self.user_ids, "", *self.item_ids]).encode())
        for items in self.items:
            digest.update(len(items).to_bytes(8, "little") + items.astype("<i8").tobytes())
        if self.scenario.label:
            digest.update(self.scenario.fingerprint.encode())
        return digest.hexdigest()

    def train(self, user: int) -> np.ndarray:
        """What the user did before the validation item (leave-one-out); nothing for a user held out of training."""
        return self.items[user][: 0 if user in self.scenario.untrained else -2]

    def before(self, user: int, phase: str) -> np.ndarray:
        """What precedes the user's ``valid`` or ``test`` target; the validation item belongs to the test history."""
        return self.items[user][: -2 if phase == "valid" else -1]

    def target(self, user: int, phase: str) -> int:
        """The user's held-out item of a phase."""
        return int(self.items[user][-2 if phase == "valid" else -1])

    def evaluated(self, phase: str) -> np.ndarray:
        """Users who are asked at ``valid`` or ``test``: those whom general and sequential RecBole models alike split so.

        That takes four interactions, for a train, a valid and a test row; three where only a test row is needed.
        """
        untrained, tested = self.scenario.untrained, self.scenario.tested
        found = [user for user, items in enumerate(self.items) if len(items) >= (3 if user in untrained else 4)]
        if phase == "valid":
            found = [user for user in found if user not in untrained]
        elif tested is not None:
            found = [user for user in found if user in tested]
        return np.array(found, dtype=np.int64)

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Training interactions of each item, by internal id."""
        rows = [self.train(user) for user in range(len(self.items))]
        return np.bincount(np.concatenate(rows), minlength=len(self.item_ids))


class RankedTime:
    """Mixin for a RecBole dataset class; see the module."""

    scenario = Scenario()

    def _get_preset(self: Any) -> None:
        super()._get_preset()  # type: ignore[misc]
        if self.config["train_dataset"]:
            self.dataset_name, self.dataset_path = scenarios.unite(self.config)

    def _data_processing(self: Any) -> None:
        """After RecBole's filters and its numbering of tokens, the scenario's cut: ids stay as they were."""
        super()._data_processing()  # type: ignore[misc]
        if scenarios.active(self.config):
            order = self._order
            users, items = (self.inter_feat[field].to_numpy()[order] for field in (self.uid_field, self.iid_field))
            kept, self.scenario = scenarios.hold_out(self.config, users, items, *self._tokens)
            self.inter_feat = self.inter_feat.iloc[order[kept]].reset_index(drop=True)

    def build(self: Any) -> Any:
        self._rank_time()
        splits = super().build()  # type: ignore[misc]
        if self.scenario.label:
            histories = self.histories
            trained = [user for user in range(self.user_num) if user not in self.scenario.untrained]
            asked = (histories.evaluated(phase) for phase in ("valid", "test"))
            for split, users in zip(splits, (trained, *asked), strict=True):
                rows = np.isin(split.inter_feat[self.uid_field].numpy(), users)
                split.inter_feat = split.inter_feat[np.flatnonzero(rows)]
        return splits

    def _rank_time(self: Any) -> None:
        """Replace timestamps by their dense rank: float32 keeps 24 bits, a Unix time needs 31 (RUCAIBox/RecBole#1653)."""
        if _leaves_one_out(self.config):
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
        """Whole histories; first asked for before :meth:`build`, and carried over to the splits."""
        frame, order = self.inter_feat, self._order
        users = frame[self.uid_field].to_numpy()[order]
        items = frame[self.iid_field].to_numpy()[order].astype(np.int64)
        starts = np.searchsorted(users, np.arange(1, self.user_num))
        by_user = [np.empty(0, dtype=np.int64), *np.split(items, starts[1:])]
        user_ids, item_ids = self._tokens
        return Histories(user_ids, item_ids, by_user, self.scenario)

    @property
    def _order(self: Any) -> np.ndarray:
        """Rows by user, then in time order; those of one moment in the order of the file."""
        return np.lexsort((self._times, self.inter_feat[self.uid_field].to_numpy()))

    @property
    def _tokens(self: Any) -> tuple[list[str], list[str]]:
        """Users and items by internal id."""
        user_ids, item_ids = (list(map(str, self.field2id_token[field])) for field in (self.uid_field, self.iid_field))
        return user_ids, item_ids

    @cached_property
    def item_texts(self: Any) -> ItemTexts:
        """Texts of the catalogue by internal item id, read from the ``.item`` file by ourselves."""
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        return ItemTexts.read(
            path,
            item_ids=list(map(str, self.field2id_token[self.iid_field])),
            id_field=self.iid_field,
            title_field=first_column(path, self.config["title_field"]),
            year_field=self.config["year_field"],
            brand_field=self.config["brand_field"],
            category_field=self.config["category_field"],
            article_suffix=self.config["article_suffix"],
            no_value=self.config["no_value"],
        )

    @cached_property
    def catalogue_titles(self: Any) -> list[str]:
        """Titles to keep candidates apart; item tokens where the dataset has no titles (classical models need none)."""
        try:
            return self.item_texts.titles
        except (FileNotFoundError, ValueError) as error:
            getLogger().info(f"candidates are told apart by item id: {error}")
            return list(map(str, self.field2id_token[self.iid_field]))

    def _download(self: Any) -> None:
        """RecBole's download without its faults: a question on standard input, a barrier that no process group answers."""
        from recbole.utils.url import download_url, extract_zip, rename_atomic_files

        folder = Path(self.dataset_path)
        try:
            url = self._get_download_url("url")
        except ValueError as error:
            raise FileNotFoundError(_advice(self.dataset_name, folder, "RecBole knows no download of that name")) from error
        partial = folder.with_name(f".{folder.name}.download")
        shutil.rmtree(partial, ignore_errors=True)  # RecBole would take half an archive, left by a kill, for the whole
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
        f"{name}.item (item_id:token and a title) into {folder.absolute()}, or point --data_path at the folder that holds "
        f"{name}/. --dataset={_PACKAGED} comes with RecBole and needs no download."
    )


def _leaves_one_out(config: Any) -> bool:
    return config["eval_args"]["order"] == "TO" and "LS" in config["eval_args"]["split"]


@cache
def _ranked(base: type) -> type:
    """``base`` extended; findable in this module, since checkpoints of DIN and others pickle the dataset they hold."""
    return globals().setdefault(base.__name__, type(base.__name__, (RankedTime, base), {"__module__": __name__}))


def create_dataset(config: Any) -> Any:
    """The dataset that RecBole would build for ``config``, extended by :class:`RankedTime` and never unpickled.

    Raises:
        FileNotFoundError: the dataset is not on disk and has no download; says which files go where.
        ConnectionError: it could not be downloaded; likewise.
    """
    import recbole.data.dataset as classes

    by_type = {ModelType.SEQUENTIAL: "SequentialDataset", ModelType.KNOWLEDGE: "KnowledgeBasedDataset"}
    own = f"{config['model']}Dataset"
    base = getattr(classes, own if hasattr(classes, own) else by_type.get(config["MODEL_TYPE"], "Dataset"))
    dataset = _ranked(base)(config)
    if _leaves_one_out(config):
        # read now: build() turns the table into RecBole's augmented rows, and its splits are copies of this dataset
        _ = dataset.histories, dataset.catalogue_titles
    if dataset.scenario.label:
        getLogger().info(scenarios.report(config, dataset.histories))
    return dataset


def data_preparation(config: Any, dataset: Any) -> tuple[Any, Any, Any]:
    """RecBole's train, valid and test loaders, split anew: it would unpickle ``saved/<dataset>-for-<model>-dataloader.pth``."""
    from recbole.data import data_preparation as recbole_data_preparation

    config["dataloaders_save_path"] = f"{os.devnull}/pickles are not read"  # what cannot exist is not looked for elsewhere
    train, valid, test = recbole_data_preparation(config, dataset)
    if hasattr(test, "uid2history_item"):  # its mask is read off the splits, where a user held out of training has no history
        for user in dataset.scenario.untrained.intersection(test.uid_list.tolist()):
            known = np.setdiff1d(dataset.histories.before(user, "test"), dataset.histories.target(user, "test"))
            test.uid2history_item[user] = torch.from_numpy(known)
    return train, valid, test
