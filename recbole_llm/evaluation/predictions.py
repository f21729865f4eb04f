"""``predictions.parquet`` of a run (``save_predictions``): what each row of its table ranked for each test user, best first.

=========  ==================================================================================
column     content
=========  ==================================================================================
``row``    the row of the results: the model, or a row beside it
``user``   token of the user
``rank``   1 is best; equal scores in the order of the protocol (:mod:`recbole_llm.evaluation.ranks`)
``item``   token of the item
``score``  float32, as the model gave it
=========  ==================================================================================

Of drawn candidates the file has all, of a full ranking the best ``predictions_topk``. ``--model=Imported`` reads it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recbole.utils import ModelType
from torch import Tensor

from recbole_llm.evaluation.record_files import read_record
from recbole_llm.store.files import DamagedError, atomic_file

logger = getLogger()

FILE = "predictions.parquet"
ROW, USER, RANK, ITEM, SCORE = "row", "user", "rank", "item", "score"
_SCHEMA = pa.schema([(ROW, pa.string()), (USER, pa.string()), (RANK, pa.int32()), (ITEM, pa.string()), (SCORE, pa.float32())])
_SAME = ("code", "inputs", "ranks", "results")  # of two records, if their predictions are the same
_GROUP = 2**18  # lines that are collected before they are written, so that memory does not grow with the number of users


class PredictionWriter:
    """Writes rankings batch by batch; made by :func:`saved`.

    Attributes:
        topk: how many items of a full ranking are written.
    """

    def __init__(self, file: pq.ParquetWriter, users: Sequence[str], items: Sequence[str], topk: int):
        self._file, self.topk, self._row = file, topk, ""
        self._users, self._items = (pa.array(list(map(str, tokens)), pa.string()) for tokens in (users, items))
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._lines = 0

    def start(self, row: str) -> None:
        """Begin with a row of the results, by name."""
        self.flush()
        self._row = row

    def add(self, users: Tensor, items: Tensor, scores: Tensor) -> None:
        """Add the ranking of a batch: users [B], items [B, C] in the order of ties, and their scores [B, C].

        An item whose score is minus infinity is not ranked and not written.
        """
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # [B, C]
        owners = users.to(order.device)[:, None].expand_as(order)
        places = torch.arange(1, order.size(1) + 1, device=order.device).expand_as(order)
        parts = owners, places, items.to(order.device).gather(1, order), scores.gather(1, order).float()
        ranked = parts[-1] > -torch.inf
        self._waiting.append(tuple(part[ranked].cpu().numpy() for part in parts))
        self._lines += int(ranked.sum())
        if self._lines >= _GROUP:
            self.flush()

    def add_catalogue(self, users: Tensor, scores: Tensor, untied: Tensor) -> None:
        """Add the best items of users [B] by scores [B, I] of the catalogue, which ``untied`` [B, I] brings in order."""
        number = min(self.topk, scores.size(1))
        items = untied.topk(number, dim=1).indices  # [B, K], best first
        self.add(users, items, scores.gather(1, items))

    def flush(self) -> None:
        """Write the buffered rows."""
        if self._waiting:
            users, ranks, items, scores = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            row, tokens = pa.repeat(self._row, len(users)), (self._users.take(pa.array(users)), self._items.take(pa.array(items)))
            columns = [row, tokens[0], pa.array(ranks.astype(np.int32)), tokens[1], pa.array(scores)]
            self._file.write_table(pa.Table.from_arrays(columns, schema=self._file.schema))
        self._waiting, self._lines = [], 0


def check(config: Any, test_data: Any) -> None:
    """Refuse ``save_predictions``, before anything is trained, where a user has no ranking of their own.

    Raises:
        ValueError: names the key to change.
    """
    if not config["save_predictions"]:
        return
    mode = config["eval_args"]["mode"]["test"]
    if mode != "full":
        raise ValueError(
            f"save_predictions: eval_args mode {mode!r} at test gives no ranking of a user that can be written; set "
            "eval_args: {'mode': 'candidates'} or {'mode': 'full'}, or remove save_predictions"
        )
    users = test_data._dataset.inter_feat[config["USER_ID_FIELD"]]
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and len(users.unique()) < len(users):
        raise ValueError(
            f"save_predictions: {config['model']} ranks the items anew for each test interaction, and users have several; set "
            "eval_args: {'split': {'LS': 'valid_and_test'}}, or remove save_predictions"
        )


@contextlib.contextmanager
def saved(config: Any, test_data: Any) -> Iterator[PredictionWriter | None]:
    """Yield the writer of the file beside the run record, which appears when the block ends without an error.

    Without ``save_predictions`` it is None.
    """
    path = config.record_file.with_name(FILE)
    if not config["save_predictions"]:
        yield None
        return
    tokens = test_data._dataset.field2id_token
    about = {"model": config["model"], "dataset": config["dataset"], "fingerprint": config.fingerprint}
    schema = _SCHEMA.with_metadata({f"recbole_llm.{key}": value for key, value in about.items()})
    topk = config["predictions_topk"] or max(config["topk"])
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as file:
        writer = PredictionWriter(file, tokens[config["USER_ID_FIELD"]], tokens[config["ITEM_ID_FIELD"]], topk)
        yield writer
        writer.flush()


def beside(config: Any, content: Mapping[str, Any]) -> str | None:
    """The name of the file beside a record that is about to be written with this content; None if there is none.

    A file that an earlier call has saved stays if its record has the same code, files and ranks, and is removed if not.
    """
    path = config.record_file.with_name(FILE)
    if config["save_predictions"] or not path.is_file():
        return FILE if config["save_predictions"] else None
    with contextlib.suppress(FileNotFoundError, DamagedError):
        earlier = read_record(config.record_file, config.fingerprint)
        if all(earlier.get(key) == content.get(key) for key in _SAME):
            return FILE
    path.unlink()
    logger.warning(
        f"{path} is removed: it is of an earlier run, whose code, data or ranks are others; give --save_predictions=True to "
        "save those of this run"
    )
    return None
