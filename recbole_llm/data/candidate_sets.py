"""The candidate sets of a run: the evaluation users and their candidates; the same for every model.

======================  ============================================================================
``candidates.source``   where the candidates come from
======================  ============================================================================
``uniform``             sampled uniformly
``popularity``          sampled in proportion to the training interactions of an item
``retriever``           the retriever's top items; a target that is not among them counts as missed
``file``                the user's files
======================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data import forms, scenarios
from recbole_llm.data.candidate_files import candidate_path, load_or_draw, read_candidates
from recbole_llm.data.candidates import CandidateSet, draw, in_random_order
from recbole_llm.data.drawing import Catalogue, token_order
from recbole_llm.data.histories import Histories
from recbole_llm.data.items import title_key
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import fingerprint
from recbole_llm.store.stages import Stage

logger = getLogger()

_USERS = 2**16  # whose histories are sorted at once
_DRAWING_CODE = "recbole_llm.data.candidates"


class CandidateRetriever(Protocol):
    """What ``source: retriever`` needs of a retriever.

    Attributes:
        identity: name of the model and fingerprint of its stage, joined by a hyphen.
        stage: the stage that trains it. It must have run before the items of a set are first read.
    """

    @property
    def identity(self) -> str: ...

    @property
    def stage(self) -> Stage: ...

    def load(self, folder: Path) -> None:
        """Read the result of the stage."""

    def top(self, phase: str, number: int) -> Mapping[int, list[int]]:
        """Internal user id -> its ``number`` best items outside ``histories.excluded``, best first."""


def candidate_sets(config: Any, dataset: Any, retrieve: CandidateRetriever | None = None) -> dict[str, CandidateSet]:
    """The sets of the phases in ``config["candidate_phases"]``, reduced to ``config["eval_users"]`` users.

    With ``source: retriever``, ``items`` and ``sha256`` are resolved on first use; the retriever must be trained by then.

    Args:
        dataset: the dataset of this run, not yet split, or any of its splits.
        retrieve: the retriever; needed with ``source: retriever``.

    Raises:
        FileNotFoundError: ``source: file`` names a file that does not exist.
        ValueError: an unknown source, a file that does not fit the dataset, too few items or users, or a full ranking across
            the two catalogues of ``train_dataset``.
    """
    found, items = {}, _Items(dataset, weighted=config["candidates"]["source"] == "popularity")
    for phase in ("valid", "test"):
        if phase in config["candidate_phases"]:
            whole = _candidate_set(config, items, phase, retrieve)
            found[phase] = _sampled(whole, config["eval_users"], config["candidates"]["seed"])
        elif config["train_dataset"]:
            raise ValueError(
                f"eval_args: a full ranking at {phase} would put the items of {config['train_dataset']} and "
                f"{config['dataset']} in one list; train_dataset needs eval_args: {{'mode': 'candidates'}}"
            )
    return found


class _Items:
    """What the sets of all phases need of the items of a dataset, computed once; ``weighted``: they are drawn by popularity."""

    def __init__(self, dataset: Any, *, weighted: bool):
        self._dataset, self._weighted = dataset, weighted
        self.histories: Histories = dataset.histories

    @cached_property
    def order(self) -> list[int]:
        """:func:`~recbole_llm.data.drawing.token_order`."""
        return token_order(self.histories.item_ids)

    @cached_property
    def tokens(self) -> str:
        """Fingerprint of the item ids."""
        return fingerprint([self.histories.item_ids[item] for item in self.order])

    @cached_property
    def keys(self) -> list[str]:
        """Key of the title of each item, by internal id."""
        return [*map(title_key, self._dataset.catalogue_titles)]

    @cached_property
    def titles(self) -> str:
        """Fingerprint of the keys."""
        return fingerprint([self.keys[item] for item in self.order])

    @cached_property
    def weights(self) -> np.ndarray | None:
        """The training interactions of each item [I]; None for a uniform draw."""
        return self.histories.train_counts.astype(np.float64) if self._weighted else None

    @cached_property
    def catalogue(self) -> Catalogue:
        """From which negatives are drawn."""
        return Catalogue(self.keys, self.order, self.weights)


def _candidate_set(config: Any, known: _Items, phase: str, retrieve: CandidateRetriever | None) -> CandidateSet:
    settings, histories = config["candidates"], known.histories
    _check_one_target(config, histories, phase)
    users = torch.from_numpy(histories.evaluated(phase))  # [N]
    if not len(users):
        needed = "the four interactions that a split needs" if histories.held_out is None else f"a {phase} item and one before it"
        raise ValueError(f"candidates: no user of {config['dataset']} has {needed}")
    targets = torch.from_numpy(histories.targets(users.tolist(), phase))  # [N]
    source = settings["source"]
    if source == "file":
        return _logged(_from_file(settings["file"], phase, users, targets, histories), phase)
    if histories.scenario.new and source in ("retriever", "popularity"):
        raise ValueError(
            f"candidates: source {source} depends on training interactions, and the items that "
            f"{scenarios.active(config)} holds out have none; choose uniform, or file"
        )
    if source == "retriever":
        if retrieve is None:
            raise ValueError("candidates: source retriever needs a retriever, and none was given")
        return _retrieved(config, phase, users, targets, known, retrieve)
    if source not in ("uniform", "popularity"):
        raise ValueError(f"candidates: source {source!r} is unknown; choose uniform, popularity, retriever or file")
    return _logged(_drawn(config, phase, users, targets, known), phase)


def _check_one_target(config: Any, histories: Histories, phase: str) -> None:
    counts = histories.target_counts(phase)  # [U]
    if counts is None or histories.one_target(phase):
        return
    user = int(counts.argmax())
    raise ValueError(
        f"{forms.described(config)}: user {histories.user_ids[user]} has {counts[user]} {phase} interactions, and mode "
        "'candidates' needs one target for each user; give --eval_args=\"{'split': {'LS': 'valid_and_test'}, 'order': 'TO'}\" "
        "and one .inter file, or, for a model that ranks the catalogue, --eval_args=\"{'mode': 'full'}\""
    )


def _logged(found: CandidateSet, phase: str) -> CandidateSet:
    logger.info(f"candidates ({phase}): {len(found.users)} users x {found.items.size(1)}, SHA-256 {found.sha256[:12]}")
    return found


def ranked_users(config: Any, histories: Histories, phase: str) -> Tensor | None:
    """The users [N] whom a full ranking of a phase evaluates with ``eval_users``: those of drawn candidates; None: all."""
    if phase not in config["full_phases"] or config["eval_users"] is None:
        return None
    users = sorted(histories.evaluated(phase).tolist(), key=histories.user_ids.__getitem__)  # as in a candidate file
    return torch.tensor(users, dtype=torch.long)[_sample(len(users), config["eval_users"], config["candidates"]["seed"])]


def _sampled(candidates: CandidateSet, number: int | None, seed: int) -> CandidateSet:
    if number is None or number >= len(candidates.users):
        return candidates
    return candidates.subset(_sample(len(candidates.users), number, seed))


def _sample(everyone: int, number: int, seed: int) -> Tensor:
    """Places of a random sample of users; they depend on the seed and the order of the file alone."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(everyone)[:number]))


def _from_file(files: dict[str, str] | None, phase: str, users: Tensor, targets: Tensor, histories: Histories) -> CandidateSet:
    if not files or phase not in files:
        raise ValueError(f"candidates: source file needs file: {{'valid': PATH, 'test': PATH}}, not {files}")
    found = read_candidates(Path(files[phase]), histories.user_ids, histories.item_ids)
    covered = torch.isin(users, found.users)
    if not covered.any():
        raise ValueError(f"candidates: {files[phase]} has no user of this dataset's {phase} split")
    found.lookup(users[covered], targets[covered])  # raises if the file has other targets
    return found


def _drawn(config: Any, phase: str, users: Tensor, targets: Tensor, known: _Items) -> CandidateSet:
    """Negatives exclude only the items known at that phase, so no test label affects validation; with repeats kept, nothing."""
    histories = known.histories
    number, seed, scenario = config["candidates"]["num_negatives"], config["candidates"]["seed"], histories.scenario
    new_number = int(number * scenario.new_share) if phase == "test" else 0

    def draw_items() -> Tensor:
        own = users.tolist()
        excluded = [np.empty(0, dtype=np.int64)] * len(own) if histories.repeats_kept else histories.all_before(own, phase)
        return draw(
            known.catalogue,
            [histories.user_ids[user] for user in own],
            targets.numpy(),
            excluded,
            histories.item_ids,
            number=number,
            seed=seed,
            split=phase,
            new=scenario.new,
            new_number=new_number,
        )

    drawn_from = {
        "titles": known.titles,
        "popularity": "" if known.weights is None else fingerprint(known.weights[known.order].tolist()),
        "held-out items": fingerprint([sorted(histories.item_ids[item] for item in scenario.new), new_number]),
    }
    return _stored(config, phase, users, targets, known, draw_items, drawn_from)


def _retrieved(
    config: Any, phase: str, users: Tensor, targets: Tensor, known: _Items, retrieve: CandidateRetriever
) -> CandidateSet:
    """The retriever's top ``num_negatives + 1`` items of each user, shuffled by the seed."""
    number, seed, histories = config["candidates"]["num_negatives"], config["candidates"]["seed"], known.histories
    order = torch.tensor(sorted(range(len(users)), key=lambda row: histories.user_ids[int(users[row])]))  # [N], as in the file
    in_file = users[order], targets[order]  # [N], [N]

    def draw_items() -> Tensor:
        top = retrieve.top(phase, number + 1)
        return in_random_order([top[user] for user in users.tolist()], seed)  # [N, C]

    def resolve() -> tuple[Tensor, str]:
        origin = {"retriever": retrieve.identity}
        found = _logged(_stored(config, phase, users, targets, known, draw_items, origin, retrieve.identity), phase)
        items = found.lookup(*in_file)  # [N, C]
        recall = (items == in_file[1][:, None]).any(1).float().mean()
        logger.info(f"candidates ({phase}): retriever recall@{number + 1} is {recall:.1%}, the upper bound of any re-ranker")
        return items, found.sha256

    code = code_fingerprint(_DRAWING_CODE)
    pairs = [ids.tolist() for ids in in_file]
    identity = fingerprint([retrieve.identity, code, phase, number, seed, *pairs, *["repeats"] * histories.repeats_kept])
    return CandidateSet(*in_file, identity, resolve)


def _stored(
    config: Any,
    phase: str,
    users: Tensor,
    targets: Tensor,
    known: _Items,
    draw_items: Callable[[], Tensor],
    drawn_from: Mapping[str, str],
    retriever: str = "",
) -> CandidateSet:
    """The set in the file of this source. Its dependencies are compared by token, so internal ids do not matter."""
    histories = known.histories
    source, number, seed = (config["candidates"][key] for key in ("source", "num_negatives", "seed"))
    dataset, scenario, folder = config["dataset"], histories.scenario.label, Path(config["checkpoint_dir"]) / "candidates"
    if retriever:
        name, _, digest = retriever.rpartition("-")
        source = f"{name}-{digest[:8]}-"
    path = candidate_path(folder, dataset=dataset, split=phase, source=source, number=number, seed=seed, scenario=scenario)
    drawn_from = {
        "settings": fingerprint([source, number, seed, phase, scenario]),
        "item ids": known.tokens,
        "histories": _histories_fingerprint(users.tolist(), histories, phase, known.order),
        **({"repeats": "kept"} if histories.repeats_kept else {}),
        **drawn_from,
        "code of the draw": code_fingerprint(_DRAWING_CODE),
    }
    user_ids, item_ids = histories.user_ids, histories.item_ids
    return load_or_draw(path, users, targets, user_ids, item_ids, draw_items, drawn_from, target_required=not retriever)


def _histories_fingerprint(users: Iterable[int], histories: Histories, phase: str, order: list[int]) -> str:
    """SHA-256 of users, targets and the set of each user's items before the target."""
    place = np.zeros(len(order) + 1, dtype=np.int64)
    place[order] = np.arange(1, len(order) + 1)
    digest, number = sha256(), len(place)
    ids = histories.user_ids
    ranked = sorted(users, key=ids.__getitem__)
    for start in range(0, len(ranked), _USERS):
        part = ranked[start : start + _USERS]
        before, targets = histories.all_before(part, phase), place[histories.targets(part, phase)].tolist()
        rows = np.repeat(np.arange(len(part)), [*map(len, before)])
        known = np.sort(rows * number + place[np.concatenate(before)])  # of all rows, by row
        known = known[np.diff(known, prepend=-1) > 0]
        ends = np.searchsorted(known, np.arange(1, len(part) + 1) * number).tolist()
        content, pieces = (known % number).astype("<i8").tobytes(), list[bytes]()
        for user, target, begin, end in zip(part, targets, [0, *ends], ends, strict=False):
            pieces += [f"{ids[user]}\t{target}\t{end - begin}\n".encode(), content[8 * begin : 8 * end]]
        digest.update(b"".join(pieces))
    return digest.hexdigest()
