"""The candidate protocol of a run: which users are evaluated, on which candidates; the same for every model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data import scenarios
from recbole_llm.data.candidates import CandidateSet, candidate_path, draw, load_or_draw, read_candidates
from recbole_llm.data.histories import Histories

logger = getLogger()


def attach_candidates(config: Any, dataset: Any, train_data: Any, valid_data: Any, test_data: Any) -> None:
    """Give both evaluation loaders their ``candidates`` (None in RecBole's own modes), drawn or read from disk.

    The training dataset, which is what a model is built from, gets them by phase.

    Raises:
        ValueError: a full ranking across the two catalogues of ``train_dataset``; or as :func:`candidate_set`.
    """
    train_data._dataset.candidates = {}
    for phase, loader in (("valid", valid_data), ("test", test_data)):
        loader.candidates = None
        if config["train_dataset"] and phase not in config["candidate_phases"]:
            raise ValueError(
                f"eval_args: a full ranking at {phase} would put the items of {config['train_dataset']} and "
                f"{config['dataset']} in one list; train_dataset needs eval_args: {{'mode': 'candidates'}}"
            )
        if phase in config["candidate_phases"]:
            found = candidate_set(config, dataset, phase)
            logger.info(f"candidates ({phase}): {len(found.users)} users x {found.items.size(1)}, SHA-256 {found.sha256}")
            loader.candidates = _sampled(found, config["eval_users"], config["candidates"]["seed"])
            train_data._dataset.candidates[phase] = loader.candidates


def candidate_set(config: Any, dataset: Any, phase: str) -> CandidateSet:
    """The candidates of one phase, by ``config["candidates"]``.

    Raises:
        ValueError: an unknown source, or a file that is missing or does not fit the dataset.
    """
    settings, histories = config["candidates"], dataset.histories
    users = torch.from_numpy(histories.evaluated(phase))  # [N]
    if not len(users):
        raise ValueError(f"candidates: no user of {config['dataset']} has the four interactions that a split needs")
    targets = torch.tensor([histories.target(user, phase) for user in users.tolist()])  # [N]
    source = settings["source"]
    if source == "file":
        return _from_file(settings["file"], phase, users, targets, histories)
    if histories.scenario.new and source in ("retriever", "popularity"):
        raise ValueError(
            f"candidates: source {source} draws by what training knows, which is nothing of the items that "
            f"{scenarios.active(config)} holds out; choose uniform, or file"
        )
    number, seed = settings["num_negatives"], settings["seed"]
    folder = Path(config["checkpoint_dir"]) / "candidates"
    if source == "retriever":
        return _retrieved(config, folder, phase, users, targets, histories)
    if source not in ("uniform", "popularity"):
        raise ValueError(f"candidates: source {source!r} is unknown; choose uniform, popularity, retriever or file")
    path = _path(config, folder, phase, source, histories)
    draw_items = partial(_draw, users, targets, histories, dataset.catalogue_titles, phase, source, number, seed)
    return load_or_draw(path, users, targets, histories.user_ids, histories.item_ids, draw_items)


def _draw(
    users: Tensor, targets: Tensor, histories: Histories, titles: list[str], phase: str, source: str, number: int, seed: int
) -> Tensor:
    """LongTensor[N, number + 1]; what is excluded is what is known at that phase: no test label touches validation."""
    known = [histories.before(user, phase) for user in users.tolist()]
    weights = histories.train_counts.astype(np.float64) if source == "popularity" else None
    names = [histories.user_ids[user] for user in users.tolist()]
    scenario = histories.scenario
    new_number = int(number * scenario.new_share) if phase == "test" else 0
    return draw(
        names,
        targets.tolist(),
        known,
        titles,
        histories.item_ids,
        number=number,
        seed=seed,
        split=phase,
        weights=weights,
        new=scenario.new,
        new_number=new_number,
    )


def _path(config: Any, folder: Path, phase: str, source: str, histories: Histories) -> Path:
    number, seed = config["candidates"]["num_negatives"], config["candidates"]["seed"]
    return candidate_path(
        folder,
        dataset=config["dataset"],
        split=phase,
        source=source,
        number=number,
        seed=seed,
        scenario=histories.scenario.label,
    )


def _retrieved(config: Any, folder: Path, phase: str, users: Tensor, targets: Tensor, histories: Histories) -> CandidateSet:
    """The retriever's top ``number + 1`` of each user, in an order drawn by the seed; a target that is not there is missed."""
    from recbole_llm.classical.collaborative import Retriever
    from recbole_llm.store.stages import StageCache

    number, seed = config["candidates"]["num_negatives"], config["candidates"]["seed"]
    retriever = Retriever(config, StageCache(folder.parent / "stages", seed=config["seed"]))
    source = f"{retriever.config['model']}-{retriever.stage.fingerprint[:8]}-"
    path = _path(config, folder, phase, source, histories)

    def top() -> Tensor:
        found = retriever.top(phase, number + 1)
        rng = np.random.default_rng(seed)  # the retriever's order would give its ranking away to a list-wise prompt
        return torch.tensor([rng.permutation(found[user]).tolist() for user in users.tolist()])  # [N, C]

    drawn = load_or_draw(path, users, targets, histories.user_ids, histories.item_ids, top, target_required=False)
    inside = (drawn.items == drawn.targets[:, None]).any(1).float().mean()
    logger.info(f"candidates ({phase}): {inside:.1%} of the targets are among the top {number + 1}; no re-ranker can hit more")
    return drawn


def _from_file(files: dict[str, str] | None, phase: str, users: Tensor, targets: Tensor, histories: Histories) -> CandidateSet:
    if not files or phase not in files:
        raise ValueError(f"candidates: source file needs file: {{'valid': PATH, 'test': PATH}}, not {files}")
    found = read_candidates(Path(files[phase]), histories.user_ids, histories.item_ids)
    covered = torch.isin(users, found.users)
    if not covered.any():
        raise ValueError(f"candidates: {files[phase]} has no user of this dataset's {phase} split")
    found.lookup(users[covered], targets[covered])  # raises where the file means other targets
    return found


def _sampled(candidates: CandidateSet, number: int | None, seed: int) -> CandidateSet:
    """A seeded choice of users; the same for every model, since it depends on the file alone."""
    if number is None or number >= len(candidates.users):
        return candidates
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(candidates.users))[:number]))
    return replace(candidates, users=candidates.users[chosen], targets=candidates.targets[chosen], items=candidates.items[chosen])
