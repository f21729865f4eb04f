"""The columns that settings name: each must be there, and of a type for which the setting has a meaning.

RecBole looks a column up where it uses it. A name that is not there ends in a ``KeyError`` or changes nothing, and some types are
read otherwise than they are written: a list of values for a float column drops one row, a threshold for a token column compares
internal ids, and of two columns with one name the last one stands for both.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from logging import getLogger
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from recbole.utils import FeatureSource, FeatureType

from recbole_llm.data import forms
from recbole_llm.data.atomic_files import AtomicFile, AtomicFileError, AtomicFormat

logger = getLogger()

_TOKENS, _NUMBERS = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ), (FeatureType.FLOAT, FeatureType.FLOAT_SEQ)
_LISTS = (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ)
_FILES = ("inter", "user", "item", "kg", "link")


class NamedColumns:
    """Mixin for a RecBole dataset class."""

    def _load_data(self: Any, token: str, dataset_path: str) -> None:
        """Load the tables, and check the settings that name their columns.

        Raises:
            ValueError: names key, column and remedy.
        """
        for key in ("load_col", "unload_col", "unused_col"):
            self._check_suffixes(key)
        super()._load_data(token, dataset_path)  # type: ignore[misc]
        for name in ("user_id", "item_id", "entity_id", "relation_id"):
            self._check_columns(f"alias_of_{name}", self.config[f"alias_of_{name}"] or (), _TOKENS)
        for key, kinds in {"normalize_field": _NUMBERS, "numerical_features": _NUMBERS, "seq_len": _LISTS}.items():
            self._check_columns(key, self.config[key] or (), kinds)
        for key in ("selected_features", "item_attribute"):  # of RecBole's models that read features of items
            if own := self.config[key] if key in self.config.internal_config_dict else None:
                self._check_columns(key, [own] if isinstance(own, str) else own, (*_TOKENS, *_NUMBERS))
        if self.time_field in self.config["numerical_features"]:
            raise ValueError(
                f"numerical_features: {self.time_field} is the time (TIME_FIELD), by which interactions are ordered; copy the "
                "column under another name"
            )
        for name, values in (self.config["val_interval"] or {}).items():
            self._check_columns("val_interval", [name], (FeatureType.TOKEN, FeatureType.FLOAT))
            _check_values(name, values, self.field2type[name])
        for name, how in (self.config["discretization"] or {}).items():
            self._check_columns("discretization", [name], _NUMBERS)
            _check_buckets(name, how, self.config["numerical_features"])
        self._check_threshold()
        self._check_unused()

    def _load_additional_feat(self: Any, token: str, dataset_path: str) -> None:
        for suffix in self.config["additional_feat_suffix"] or ():
            file = Path(dataset_path) / f"{token}.{suffix}"
            if suffix in _FILES or not file.is_file():
                reason = f"RecBole reads .{suffix} anyway" if suffix in _FILES else f"there is no file {file}"
                raise ValueError(
                    f"additional_feat_suffix: {suffix!r}: {reason}; name a file beside the .inter file, or remove it"
                )
        super()._load_additional_feat(token, dataset_path)  # type: ignore[misc]

    def _set_label_by_threshold(self: Any) -> None:
        super()._set_label_by_threshold()  # type: ignore[misc]
        threshold, model = self.config.external_config_dict.get("threshold"), self.config["model"]
        if threshold and not forms.labels_matter(self.config):
            ((name, value),) = threshold.items()
            logger.warning(
                f"threshold: {threshold} changes nothing: {model} reads no labels, or draws its negatives; val_interval: "
                f"{ {name: f'[{value},inf)'} } keeps the interactions above it"
            )
        if forms.reads_labels(self.config) and self.label_field not in self.inter_feat:
            raise ValueError(
                f"threshold: {model} and mode 'labeled' read labels, and no column {self.label_field} "
                "(LABEL_FIELD) is loaded; name a column to make them from, such as --threshold=\"{'rating': 4}\""
            )

    def _preload_weight_matrix(self: Any) -> None:
        try:
            super()._preload_weight_matrix()  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(f"preload_weight: {error}") from None
        # RecBole's are float64, which KSR cannot multiply with its weights
        self._preloaded_weight = {name: matrix.astype(np.float32) for name, matrix in self._preloaded_weight.items()}

    # -- files, while they are read -------------------------------------------------------------------------------------------

    def _check_suffixes(self: Any, key: str) -> None:
        known = [*_FILES, *(self.config["additional_feat_suffix"] or ())]
        for suffix in self.config[key] or ():
            if suffix not in known:
                raise ValueError(f"{key}: {suffix!r} is none of the files {', '.join(known)} (and of additional_feat_suffix)")

    def _check_listed(self: Any, file: AtomicFile, source: Any) -> None:
        """What ``load_col`` or ``unload_col`` of the user lists; RecBole skips an absent column."""
        suffix = source.value if isinstance(source, FeatureSource) else source
        for key in ("load_col", "unload_col"):
            given = self.config.external_config_dict.get(key)
            listed = given.get(suffix) if given and given == self.config[key] else None  # not of united datasets
            for name in listed if isinstance(listed, (list, tuple)) else ():
                if name not in file.types:
                    raise ValueError(
                        f"{key}: there is no column {name!r} in {file.path}; its columns are {', '.join(file.types)}"
                    )

    def _check_loaded(self: Any, file: AtomicFile, source: Any, names: Collection[str], ids: Mapping[str, str]) -> None:
        """Whether the ids are among the loaded columns, and no column has the name of one of another file.

        Args:
            names: the columns that are loaded.
            ids: the id columns of the file by key.
        """
        for key, name in ids.items():
            if name not in names:
                raise ValueError(
                    f"load_col: {name} ({key}) of {file.path} must be loaded with the other columns; list it, or take it out of "
                    "unload_col"
                )
        for name in names if source != "link" else ():
            other = self.field2source.get(name)
            if other not in (None, source) and name not in ids.values():
                other = other.value if isinstance(other, FeatureSource) else other
                raise ValueError(
                    f"{file.path}: its column {name} has the name of a column of .{other}, and RecBole takes one for the other; "
                    "rename it, or leave it out of load_col"
                )

    # -- columns, once they are loaded ----------------------------------------------------------------------------------------

    def _check_columns(self: Any, key: str, names: Iterable[str], kinds: Collection[FeatureType]) -> None:
        for name in names:
            if name not in self.field2type:
                raise ValueError(
                    f"{key}: there is no column {name!r} among those loaded from {self.dataset_path} "
                    f"({', '.join(self.field2type)}); {self._where(name)}"
                )
            if self.field2type[name] not in kinds:
                allowed = " or ".join(kind.value for kind in kinds)
                raise ValueError(
                    f"{key}: {name} is a column of type {self.field2type[name].value}, and this key is for {allowed}; name "
                    "another one, or change the type in the header"
                )

    def _where(self: Any, name: str) -> str:
        """The remedy for a column that is not loaded, if a file has it."""
        for file in sorted(Path(self.dataset_path).glob(f"{glob.escape(self.dataset_name)}.*")):
            suffix = file.suffix[1:]
            with suppress(AtomicFileError, OSError):
                types = AtomicFile(file, AtomicFormat.of(self.config)).types if suffix in _FILES else {}
                if name in types:
                    others = {one: [*names] for one, names in (self.config["load_col"] or {}).items()}
                    others = {one: [own for own in names if own != name] for one, names in others.items()}
                    listed = others.get(suffix) or {"user": [self.uid_field], "item": [self.iid_field]}.get(suffix, [])
                    return f"it is in {file.name}: give load_col: { {**others, suffix: [*listed, name]} }"
        return "name one of the files"

    def _check_threshold(self: Any) -> None:
        threshold = self.config["threshold"]
        if threshold is None:
            return
        if len(threshold) != 1:
            raise ValueError(f"threshold: {threshold} must name one column, such as {{'rating': 4}}")
        self._check_columns("threshold", threshold, (FeatureType.FLOAT,))
        (name,) = threshold
        if name not in self.inter_feat or name == self.time_field:
            reason = "is the time (TIME_FIELD)" if name == self.time_field else "is not a column of .inter"
            raise ValueError(f"threshold: {name} {reason}; name a column of interactions, such as {self.config['RATING_FIELD']}")

    def _check_unused(self: Any) -> None:
        needed = {"USER_ID_FIELD": self.uid_field, "ITEM_ID_FIELD": self.iid_field}
        if forms.reads_labels(self.config):
            needed["LABEL_FIELD"] = self.label_field
        for suffix, names in (self.config["unused_col"] or {}).items():
            table = getattr(self, f"{suffix}_feat", None)
            for name in names:
                if table is None or name not in table:
                    raise ValueError(f"unused_col: .{suffix} has no column {name!r} that is loaded; take it out")
                if key := next((key for key, field in needed.items() if field == name), None):
                    raise ValueError(f"unused_col: {name} ({key}) is needed by every model; take it out")


def _check_values(name: str, values: Any, kind: FeatureType) -> None:
    """Check what ``val_interval`` keeps of a column; the form of an interval is checked already."""
    if kind == FeatureType.TOKEN:
        odd = [value for value in values if not isinstance(value, str)] if isinstance(values, (list, tuple)) else [values]
        if odd:
            remedy = [str(value) for value in values] if isinstance(values, (list, tuple)) else ["A", "B"]
            raise ValueError(
                f"val_interval: {name} is a column of type token, whose values are texts, not {odd[0]!r}; give {remedy}"
            )
    elif isinstance(values, (list, tuple)):
        numbers = [value for value in values if isinstance(value, Real)]
        if not (len(values) == len(numbers) == 2 and numbers[0] <= numbers[1]):
            raise ValueError(
                f"val_interval: {name} is a column of type float, of which an interval such as '[3,5]' is kept, or several, "
                f"'[1,2];[5,inf)'; {values} is none"
            )


def _check_buckets(name: str, how: Any, numerical: Collection[str]) -> None:
    """Check how ``discretization`` divides a column."""
    if name not in numerical:
        raise ValueError(f"discretization: {name} is not in numerical_features: {list(numerical)}; list it there, too")
    method, bucket = (how.get(key) if isinstance(how, Mapping) else None for key in ("method", "bucket"))
    if method not in ("ED", "LD") or (method == "ED" and not (isinstance(bucket, int) and bucket > 0)):
        raise ValueError(
            f"discretization: {name}: {how!r} must be {{'method': 'ED', 'bucket': 10}} (ten parts of equal width) or "
            "{'method': 'LD'} (by logarithms)"
        )
