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

from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data import scenarios
from recbole_llm.data.candidate_files import candidate_path, load_or_draw, read_candidates
from recbole_llm.data.candidates import CandidateSet, draw, in_random_order
from recbole_llm.data.eval_phases import CatalogueItems, EvalPhase, histories_fingerprint
from recbole_llm.data.histories import Histories
from recbole_llm.store.code import code_fingerprint
from recbole_llm.store.files import fingerprint
from recbole_llm.store.stages import Stage

logger = getLogger()

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
    found, items = {}, CatalogueItems(dataset, weighted=config["candidates"]["source"] == "popularity")
    for phase in ("valid", "test"):
        if phase in config["candidate_phases"]:
            whole = _candidate_set(EvalPhase.of(config, items, phase), retrieve)
            found[phase] = _sampled(whole, config["eval_users"], config["candidates"]["seed"])
        elif config["train_dataset"]:
            raise ValueError(
                f"eval_args: a full ranking at {phase} would put the items of {config['train_dataset']} and "
                f"{config['dataset']} in one list; train_dataset needs eval_args: {{'mode': 'candidates'}}"
            )
    return found


def _candidate_set(phase: EvalPhase, retrieve: CandidateRetriever | None) -> CandidateSet:
    source = phase.source
    if source == "file":
        return _logged(_from_file(phase), phase.name)
    if phase.histories.scenario.new and source in ("retriever", "popularity"):
        raise ValueError(
            f"candidates: source {source} depends on training interactions, and the items that "
            f"{scenarios.active(phase.config)} holds out have none; choose uniform, or file"
        )
    if source == "retriever":
        if retrieve is None:
            raise ValueError("candidates: source retriever needs a retriever, and none was given")
        return _retrieved(phase, retrieve)
    if source not in ("uniform", "popularity"):
        raise ValueError(f"candidates: source {source!r} is unknown; choose uniform, popularity, retriever or file")
    return _logged(_drawn(phase), phase.name)


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


def _from_file(phase: EvalPhase) -> CandidateSet:
    files: dict[str, str] | None = phase.config["candidates"]["file"]
    if not files or phase.name not in files:
        raise ValueError(f"candidates: source file needs file: {{'valid': PATH, 'test': PATH}}, not {files}")
    found = read_candidates(Path(files[phase.name]), phase.histories.user_ids, phase.histories.item_ids)
    covered = torch.isin(phase.users, found.users)
    if not covered.any():
        raise ValueError(f"candidates: {files[phase.name]} has no user of this dataset's {phase.name} split")
    found.lookup(phase.users[covered], phase.targets[covered])  # raises if the file has other targets
    # early stopping and merging draw from all lines of a set, so those of other users and of another phase's targets are left out
    pairs = [
        users * len(phase.histories.item_ids) + targets
        for users, targets in ((found.users, found.targets), (phase.users, phase.targets))
    ]
    evaluated = torch.isin(*pairs)  # [N]
    return found if evaluated.all() else found.subset(evaluated.nonzero().flatten())


def _drawn(phase: EvalPhase) -> CandidateSet:
    """Negatives exclude only the items known at that phase, so no test label affects validation; with repeats kept, nothing."""
    items, histories = phase.items, phase.histories
    scenario = histories.scenario
    new_number = int(phase.number * scenario.new_share) if phase.name == "test" else 0

    def draw_items() -> Tensor:
        own, nothing = phase.users.tolist(), np.empty(0, dtype=np.int64)
        return draw(
            items.catalogue,
            [histories.user_ids[user] for user in own],
            phase.targets.numpy(),
            [nothing] * len(own) if histories.repeats_kept else histories.all_before(own, phase.name),
            histories.item_ids,
            number=phase.number,
            seed=phase.seed,
            split=phase.name,
            new=scenario.new,
            new_number=new_number,
        )

    drawn_from = {
        "titles": items.titles,
        "popularity": "" if items.weights is None else fingerprint(items.weights[items.order].tolist()),
        "held-out items": fingerprint([sorted(histories.item_ids[item] for item in scenario.new), new_number]),
    }
    return _stored(phase, draw_items, drawn_from)


def _retrieved(phase: EvalPhase, retrieve: CandidateRetriever) -> CandidateSet:
    """The retriever's top ``num_negatives + 1`` items of each user, shuffled by the seed."""
    number, seed, histories = phase.number, phase.seed, phase.histories
    order = torch.tensor(sorted(range(len(phase.users)), key=lambda row: histories.user_ids[int(phase.users[row])]))  # [N]
    in_file = phase.users[order], phase.targets[order]  # [N], [N], in the order of the file

    def draw_items() -> Tensor:
        top = retrieve.top(phase.name, number + 1)
        return in_random_order([top[user] for user in phase.users.tolist()], seed)  # [N, C]

    def resolve() -> tuple[Tensor, str]:
        found = _logged(_stored(phase, draw_items, {"retriever": retrieve.identity}, retriever=retrieve.identity), phase.name)
        items = found.lookup(*in_file)  # [N, C]
        recall = (items == in_file[1][:, None]).any(1).float().mean()
        logger.info(f"candidates ({phase.name}): retriever recall@{number + 1} is {recall:.1%}, the upper bound of any re-ranker")
        return items, found.sha256

    code = code_fingerprint(_DRAWING_CODE)
    pairs = [ids.tolist() for ids in in_file]
    identity = fingerprint([retrieve.identity, code, phase.name, number, seed, *pairs, *["repeats"] * histories.repeats_kept])
    return CandidateSet(*in_file, identity, resolve)


def _stored(
    phase: EvalPhase, draw_items: Callable[[], Tensor], drawn_from: Mapping[str, str], *, retriever: str = ""
) -> CandidateSet:
    """The set in the file of this source. Its dependencies are compared by token, so internal ids do not matter.

    Args:
        draw_items: returns the candidates [N, C] of ``phase.users``.
        drawn_from: fingerprints of what only this source depends on, by the names that the log uses.
        retriever: identity of the model whose items they are, which may lack the target.
    """
    histories, number, seed, source = phase.histories, phase.number, phase.seed, phase.source
    dataset, scenario = phase.config["dataset"], histories.scenario.label
    if retriever:
        name, _, digest = retriever.rpartition("-")
        source = f"{name}-{digest[:8]}-"
    folder = Path(phase.config["checkpoint_dir"]) / "candidates"
    path = candidate_path(folder, dataset=dataset, split=phase.name, source=source, number=number, seed=seed, scenario=scenario)
    drawn_from = {
        "settings": fingerprint([source, number, seed, phase.name, scenario]),
        "item ids": phase.items.tokens,
        "histories": histories_fingerprint(phase.users.tolist(), histories, phase.name, phase.items.order),
        **({"repeats": "kept"} if histories.repeats_kept else {}),
        **drawn_from,
        "code of the draw": code_fingerprint(_DRAWING_CODE),
    }
    pairs, ids = (phase.users, phase.targets), (histories.user_ids, histories.item_ids)
    return load_or_draw(path, *pairs, *ids, draw_items, drawn_from, target_required=not retriever)
