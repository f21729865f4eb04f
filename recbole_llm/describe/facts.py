"""The facts about a dataset that ``recbole-llm data describe`` shows, each computed by the part that a run uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recbole.utils import init_seed

from recbole_llm.config import LLMConfig
from recbole_llm.config.values import as_literals
from recbole_llm.data import forms
from recbole_llm.data.atomic_files import AtomicFile, AtomicFormat
from recbole_llm.data.domains import Domain, of_dataset
from recbole_llm.data.histories import Histories
from recbole_llm.data.items import chosen_columns, lacks_titles, title_key
from recbole_llm.data.loading import create_dataset
from recbole_llm.data.repeats import equal_rows
from recbole_llm.data.tokens import tokenise_as_text
from recbole_llm.describe.needs import Asked, Need, needs
from recbole_llm.evaluation.known_splits import passport_of
from recbole_llm.llm.builtin_lm import untrained
from recbole_llm.model import assembly

_AT_ONCE = 4096  # titles that are tokenised together


@dataclass(frozen=True, eq=False)
class Titles:
    """The titles of a catalogue of I items.

    Attributes:
        columns: of the ``.item`` file, by key.
        untitled: number of items without a title; other texts or the id replace it.
        without_row: number of items that the ``.item`` file lacks.
        shared: number of items whose title another item has.
        tokens: length of each title as prompts show it, uncut: IntArray[I].
        tokenizer: the backbone whose tokens these are.
        limit: tokens to which prompts cut a title (``max_title_tokens``).
    """

    columns: Mapping[str, str]
    untitled: int
    without_row: int
    shared: int
    tokens: np.ndarray
    tokenizer: str
    limit: int


@dataclass(frozen=True, eq=False)
class Description:
    """A dataset after its filters: U users, I items, R interactions.

    Attributes:
        passport: of its split, with repeats and ties.
        folder: that it was read from.
        per_user, per_item: number of interactions, IntArray[U] and IntArray[I].
        times: of the interactions as the file has them, FloatArray[R]; None without a column of times.
        tied: share of the interactions whose time another one of the same user has; None without times.
        repeats_kept: there are repeats, and they are kept.
        equal_rows: number of rows with the user, item and time of another row.
        cold_items: number of items without a training interaction.
        cold_targets: share of the test users whose target is such an item; None without test users.
        titles: None without titles.
        no_titles: why not; empty with titles.
        needs: of each family of models.
    """

    passport: Mapping[str, Any]
    folder: Path
    per_user: np.ndarray
    per_item: np.ndarray
    times: np.ndarray | None
    tied: float | None
    repeats_kept: bool
    equal_rows: int
    cold_items: int
    cold_targets: float | None
    titles: Titles | None
    no_titles: str
    needs: Sequence[Need]


def describe(dataset: str, config_files: Sequence[str] | None = None, cmd_line: Sequence[str] = ()) -> Description:
    """Read and split a dataset as a run does, and tokenise its titles. Nothing is trained but the builtin LM's tokenizer.

    Args:
        cmd_line: ``--key=value`` arguments, such as ``--data_path`` and ``--llm``.

    Raises:
        ValueError, FileNotFoundError: the dataset or the tokenizer cannot be read.
    """
    config = _of_the_split(dataset, config_files, cmd_line)
    init_seed(config["seed"], config["reproducibility"])
    data = create_dataset(config)
    whole, timed = data.interactions, data.time_field in data.inter_feat
    times = data.inter_feat[data.time_field].to_numpy() if timed else None
    repeated = equal_rows(data) if data.repeats_kept else data.equal_rows
    columns = data.field2type
    passport = passport_of(config, data)
    no_titles = lacks_titles(config) or ""
    domain = None if no_titles else of_dataset(config, data)
    titles = None if domain is None else _titles(_of_model("LoRACocktail", config), domain)
    asked = Asked(
        dataset=data,
        domain=domain,
        ordered=timed or bool(config["benchmark_filename"]),
        config_of=lambda model: _of_model(model, config),
        no_titles=bool(no_titles),
        columns=_header(config) or {name: kind.value for name, kind in columns.items()},
        title_tokens=0 if titles is None else int(titles.tokens.sum()),
    )
    return Description(
        passport=passport,
        folder=Path(data.dataset_path),
        per_user=np.bincount(whole.users, minlength=len(whole.user_ids))[1:],
        per_item=np.bincount(whole.items, minlength=len(whole.item_ids))[1:],
        times=times,
        tied=_tied_share(whole.tied) if timed else None,
        repeats_kept=data.repeats_kept,
        equal_rows=repeated,
        cold_items=int((data.histories.train_counts[1:] == 0).sum()),
        cold_targets=_cold_targets(data.histories),
        titles=titles,
        no_titles=no_titles,
        needs=needs(asked),
    )


def _of_the_split(dataset: str, config_files: Sequence[str] | None, cmd_line: Sequence[str]) -> LLMConfig:
    """A configuration that reads the dataset: the split does not depend on the model, nor on the scale of the times."""
    own: dict[str, Any] = {"normalize_all": False}
    config = LLMConfig("Pop", dataset, config_files, own, cmd_line)
    columns = _header(config)
    if forms.needs_time(config) and columns and config["TIME_FIELD"] not in columns:
        return LLMConfig("Pop", dataset, config_files, {**own, "eval_args": {"order": "RO"}}, cmd_line)
    return config


def _of_model(model: str, config: LLMConfig) -> LLMConfig:
    """The configuration of a model with what was given; a split that its family refuses does not matter here."""
    other = ("model", "dataset", "eval_args", "metrics", "valid_metric", "topk")  # metrics fit the family of eval_args
    given = {key: value for key, value in config.external_config_dict.items() if key not in other}
    return LLMConfig(model, config["dataset"], config_dict=as_literals(given))


def _header(config: LLMConfig) -> dict[str, str]:
    """Type of each column of the ``.inter`` file; empty if there is no such file, or not yet."""
    file = Path(config["data_path"]) / f"{config['dataset']}.inter"
    return dict(AtomicFile(file, AtomicFormat.of(config)).types) if file.is_file() else {}


def _titles(config: LLMConfig, domain: Domain) -> Titles:
    """The titles of a domain, in tokens of the backbone of a configuration."""
    items = domain.items
    backbone = assembly.backbone(config, [domain])
    tokenizer = backbone.tokenizer or untrained(config["builtin_lm"], [domain])[1]
    lengths: list[int] = []
    for start in range(1, len(items.names), _AT_ONCE):
        lengths += map(len, tokenise_as_text(tokenizer, items.names[start : start + _AT_ONCE]))
    keys = Counter(map(title_key, items.titles[1:]))
    file = AtomicFile(Path(config["data_path"]) / f"{config['dataset']}.item", AtomicFormat.of(config))
    return Titles(
        columns={key: name for key, name in chosen_columns(file, config).items() if name},
        untitled=items.untitled,
        without_row=len(items.names) - 1 - len(items.lines),
        shared=sum(number for number in keys.values() if number > 1),
        tokens=np.array(lengths, dtype=np.int64),
        tokenizer=backbone.name,
        limit=config["max_title_tokens"],
    )


def _tied_share(tied: np.ndarray) -> float:
    """The share of rows whose user and time another row has, from whether each has those of the row before: BoolArray[R]."""
    return float((tied | np.append(tied[1:], False)).mean()) if len(tied) else 0.0


def _cold_targets(histories: Histories) -> float | None:
    users = histories.evaluated("test").tolist()
    if not users:
        return None
    targets = np.array([histories.target(user, "test") for user in users])
    return float((histories.train_counts[targets] == 0).mean())
