"""The tables of a RecBole dataset, read by :mod:`recbole_llm.data.atomic_files` into the frames that RecBole expects."""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.utils import FeatureSource, FeatureType

from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError, AtomicFormat
from recbole_llm.data.ids import check_ids, check_joined, report_repeated, written_twice

logger = getLogger()

# settings that remove rows, in RecBole's order
_FILTERS = ("rm_dup_inter", "val_interval", "filter_inter_by_user_or_item", "user_inter_num_interval", "item_inter_num_interval")


class StrictTables:
    """Mixin for a RecBole dataset class."""

    def _load_feat(self: Any, filepath: str, source: Any) -> pd.DataFrame | None:
        """The columns of a file that ``load_col`` and ``unload_col`` choose, as RecBole's method of that name returns them.

        Raises:
            AtomicFileError: the file is malformed, an id is empty or odd, or an interaction has an empty number.
        """
        chosen, left_out = self._get_load_and_unload_col(source)
        if chosen == set() and source in (FeatureSource.KG, "link"):
            raise AtomicFileError(f"load_col: {self.config['model']} reads {filepath}; list its columns, or give load_col: ~")
        if chosen == set():
            return None
        file = AtomicFile(Path(filepath), AtomicFormat.of(self.config))
        self._check_listed(file, source)
        ids = self._check_types(file, source)
        names = [name for name in file.types if (chosen is None or name in chosen) and name not in (left_out or ())]
        self._check_loaded(file, source, names, self._id_fields(source))
        if not names:
            logger.warning(f"no column of {file.path} is loaded; load_col and unload_col choose them")
            return None
        self._check_same_columns(file, source, names)
        for name in names if source != "link" else ():
            self.field2source[name], self.field2type[name] = source, FeatureType(file.types[name])
            if file.types[name].startswith("float"):
                self.field2bucketnum[name] = 2
        columns = file.read(names)
        for name in ids.intersection(names):
            check_ids(file, name, pd.unique(columns[name]))
            if source in (FeatureSource.USER, FeatureSource.ITEM):
                report_repeated(file, name, columns[name])
        return pd.DataFrame({name: self._values(file, source, name, columns.pop(name)) for name in names})

    def _check_types(self: Any, file: AtomicFile, source: Any) -> set[str]:
        """Check the columns that RecBole looks for in a file of this kind; returns those that hold ids."""
        wanted = {key: (name, "token") for key, name in self._id_fields(source).items()}
        ids = {name for name, _ in wanted.values()}
        if source not in (FeatureSource.INTERACTION, FeatureSource.USER, FeatureSource.ITEM):
            ids = {name for name, kind in file.types.items() if kind == "token"}  # of a knowledge graph
        for key, (name, _) in wanted.items():
            if name not in file.types:
                raise AtomicFileError(
                    f"{key}: there is no column {name!r} in {file.path}; its columns are {', '.join(file.types)}; "
                    f"set {key} to one of them"
                )
        if source == FeatureSource.INTERACTION:
            wanted |= {key: (self.config[key], "float") for key in ("TIME_FIELD", "RATING_FIELD")}
        for key, (name, kind) in wanted.items():
            if file.types.get(name, kind) != kind:
                raise AtomicFileError(
                    f"{file.path}, line 1: {name}:{file.types[name]} is the column of {key}, which must be a {kind}; "
                    f"write {name}:{kind}"
                )
        return ids

    def _id_fields(self: Any, source: Any) -> dict[str, str]:
        """The columns of ids that RecBole needs of a file, by key."""
        keys = {
            FeatureSource.INTERACTION: ("USER_ID_FIELD", "ITEM_ID_FIELD"),
            FeatureSource.USER: ("USER_ID_FIELD",),
            FeatureSource.ITEM: ("ITEM_ID_FIELD",),
            FeatureSource.KG: ("HEAD_ENTITY_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "RELATION_ID_FIELD"),
            "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
        }
        return {key: self.config[key] for key in keys.get(source, ())}

    def _check_same_columns(self: Any, file: AtomicFile, source: Any, names: list[str]) -> None:
        """Files of ``benchmark_filename`` form one table."""
        if source == FeatureSource.INTERACTION:
            first = self.__dict__.setdefault("_first_inter", (file.path, names))
            if sorted(first[1]) != sorted(names):
                raise AtomicFileError(
                    f"benchmark_filename: {first[0]} has the columns {', '.join(first[1])}, and {file.path} has "
                    f"{', '.join(names)}; give both the same ones, or name those of both in load_col"
                )

    def _values(self: Any, file: AtomicFile, source: Any, name: str, cells: np.ndarray) -> Any:
        kind, separator = file.types[name], file.form.seq_separator
        if kind == "token":
            self._set_length(source, name, 1)
            return np.where(cells == "", np.nan, cells) if "" in cells else cells  # RecBole's padding token
        if kind == "float":
            self._set_length(source, name, 1)
            missing = int(np.isnan(cells).sum())
            if missing and source == FeatureSource.INTERACTION:
                remedy = "fill it in or remove the row" + (
                    "" if name == self.time_field else ", or leave the column out of load_col"
                )
                raise file.error(name, lambda cell: not cell, f"is a missing value, which RecBole replaces by the mean; {remedy}")
            if missing:
                logger.warning(
                    f"{file.path}: {missing} of {len(cells)} rows have no {name}; RecBole takes the mean of the others"
                )
            return cells
        convert = (lambda parts: np.array(parts)) if kind == "token_seq" else (lambda parts: np.array(parts, dtype=np.float64))
        values = [convert([part for part in cell.split(separator) if part]) for cell in cells]
        longest, limit = max(map(len, values)), (self.config["seq_len"] or {}).get(name)
        self._set_length(source, name, longest if limit is None else min(longest, limit))
        return values if limit is None else [value[:limit] for value in values]

    def _set_length(self: Any, source: Any, name: str, length: int) -> None:
        if source != "link":
            self.field2seqlen[name] = length

    def _load_inter_feat(self: Any, token: str, dataset_path: str) -> None:
        super()._load_inter_feat(token, dataset_path)  # type: ignore[misc]
        for field in (self.uid_field, self.iid_field) if self.benchmark_filename_list else ():
            if twice := written_twice(pd.unique(self.inter_feat[field])):
                raise AtomicFileError(
                    f"benchmark_filename: {field} {twice[0]!r} in the .inter files of {dataset_path} is also "
                    f"written as {twice[1]!r}; write each id in one way"
                )

    def _load_user_or_item_feat(self: Any, token: str, dataset_path: str, source: Any, field_name: str) -> Any:
        """RecBole's table of users or items, whose ids must be those of the interactions; the first row of an id counts."""
        table = super()._load_user_or_item_feat(token, dataset_path, source, field_name)  # type: ignore[misc]
        if table is not None:
            field, file = getattr(self, field_name), Path(dataset_path) / f"{token}.{source.value}"
            key = "USER_ID_FIELD" if source == FeatureSource.USER else "ITEM_ID_FIELD"
            check_joined(pd.unique(self.inter_feat[field]), {*table[field]}, name=f"{key} {field}", other=file)
        return table

    def _filter_inter_by_user_or_item(self: Any) -> None:
        before = len(self.inter_feat)
        super()._filter_inter_by_user_or_item()  # type: ignore[misc]
        if removed := before - len(self.inter_feat):
            logger.warning(
                f"filter_inter_by_user_or_item: {removed} of {before} interactions are removed, whose user or item has no row in "
                "the .user or .item file"
            )

    def _leave_out_unknown(self: Any) -> None:
        """Leave out rows of .user and .item without an interaction.

        RecBole counts them as users and items, but only for a model that loads the file: catalogues would differ by model.
        """
        for source, field in (("user", self.uid_field), ("item", self.iid_field)):
            table, known = getattr(self, f"{source}_feat"), {*pd.unique(self.inter_feat[field])}
            if table is None:
                continue
            if source == "item" and self._has_lists:
                known.update(token for tokens in self.inter_feat[self.list_field] for token in tokens)
            left = table[field].isin(known)
            if not left.all():
                logger.info(
                    f"{self.dataset_name}: {(~left).sum():,} of {len(left):,} rows of .{source} have no interaction; left out"
                )
                setattr(self, f"{source}_feat", table[left].reset_index(drop=True))

    def _reset_index(self: Any) -> None:
        self._leave_out_unknown()
        for name in self.feat_name_list:
            if getattr(self, name).empty:
                filters = ", ".join(f"{key}: {self.config[key]}" for key in _FILTERS if self.config[key] is not None)
                raise ValueError(
                    f"{self.dataset_path}: the filters leave no row of .{name.removesuffix('_feat')}; relax them ({filters})"
                )
        super()._reset_index()  # type: ignore[misc]
