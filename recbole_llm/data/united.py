"""Two datasets as one (``train_dataset``): atomic files without shared users or items."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.data.atomic_files import AtomicFileError
from recbole_llm.data.scenarios import SEPARATOR, TEXTS, token_prefix
from recbole_llm.store.files import DamagedError, atomic_folder, fingerprint, verify
from recbole_llm.store.locks import locked

logger = getLogger()


def unite(config: Any, parts: Mapping[str, Any]) -> tuple[str, str]:
    """Name and folder of atomic files with the interactions and texts of ``train_dataset`` and ``dataset``; written once.

    Tokens begin with the name of their dataset. The time is a number for each time in the user's history, which is all that
    leave-one-out needs; lines of equal times are in the order of ``tie_order``. Texts are read with the settings of each dataset.
    """
    name = "+".join(parts)
    files = {f"{name}.inter": _interactions(config, parts), f"{name}.item": _texts(config, parts)}
    folder = Path(config["checkpoint_dir"]) / "datasets" / f"{name}-{fingerprint(files)[:12]}"
    with locked(folder, "train_dataset"):
        with suppress(DamagedError):
            verify(folder)
            return name, str(folder)
        with atomic_folder(folder) as out:
            for file, lines in files.items():
                if lines:
                    (out / file).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return name, str(folder)


def _interactions(config: Any, parts: Mapping[str, Any]) -> list[str]:
    lines = [f"{config['USER_ID_FIELD']}:token\t{config['ITEM_ID_FIELD']}:token\t{config['TIME_FIELD']}:float"]
    for name, dataset in parts.items():
        prefix, histories = token_prefix(name), dataset.histories
        for user, items, moments in zip(histories.user_ids, histories.items, histories.moments, strict=True):
            moments = moments - moments[:1] + 1
            lines += [
                f"{prefix}{user}\t{prefix}{histories.item_ids[item]}\t{time}" for item, time in zip(items, moments, strict=True)
            ]
    return lines


def _texts(config: Any, parts: Mapping[str, Any]) -> list[str]:
    """Lines of the ``.item`` file; none if a dataset has no titles, which classical models do not need."""
    lines = [f"{config['ITEM_ID_FIELD']}:token\ttitle:token\tyear:token\tbrand:token\tcategory:token_seq\tdescription:token"]
    for name, dataset in parts.items():
        try:
            texts = dataset.item_texts
        except AtomicFileError:
            raise
        except (FileNotFoundError, ValueError) as error:
            logger.warning(f"train_dataset: {'+'.join(parts)} has no titles, because {name} has none: {error}")
            return []
        blank = [""] * len(texts.titles)
        columns = [texts.columns.get(key) for key in TEXTS if key != "title_field"]
        known = texts.known([name for name in columns if name])
        fields = [[own.get(name, "") for own in known] if name else blank for name in columns]
        if category := texts.columns.get("category_field"):  # whose values are separated, by a sign that none of them has
            values = [[value.replace(SEPARATOR, "/") for value in own] for own in texts.values(category)]
            fields[columns.index(category)] = [SEPARATOR.join(own) for own in values]
        rows = list(zip(dataset.histories.item_ids, texts.titles, *fields, strict=True))[1:]
        lines += [token_prefix(name) + "\t".join(row) for row in rows]
    return lines
