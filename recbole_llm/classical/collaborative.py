"""A classical RecBole model as a frozen, cached part of a run: item vectors and user states for a language model to read.
The retriever whose top N it re-ranks is one, too (``classical/retriever.py``).

Any RecBole model with item embeddings will do. It is trained once, as a stage, by the same trainer that would train it as
a baseline (on whole sequences where it is causal, by RecBole's own loop otherwise), on the same training split, and
stopped by RecBole's own full ranking of the validation items; or it is read from a checkpoint, without executing anything
in it. From then on it is frozen and stays in ``eval()``, whatever the model around it does.

Legend: B users, I items, L history items a model has room for, N those of the longest history asked about, H width of the
collaborative model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from inspect import signature
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm.classical.imported_checkpoint import read_checkpoint
from recbole_llm.classical.sequence import CAUSAL_MODELS, SequenceTraining, make_causal, sequence_states
from recbole_llm.classical.trainer import trainer_class
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.evaluation.ranks import gather_scores
from recbole_llm.store.files import save_tensors, sha256_file
from recbole_llm.store.stages import Stage, Work, count_trained

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories

logger = getLogger()

PREFIXES = 512
"""Prefixes that go through a model at once, where each has to be read by itself."""


class CollaborativeModel:
    """A trained RecBole model, frozen.

    Args:
        config: of the run it serves.
        name: of the RecBole model.
        values: keys for it, which win over those of a checkpoint.
        checkpoint: file of a trained model, saved by plain RecBole or by us; None trains one.

    Attributes:
        stage: what trains it, or takes over the checkpoint. Its result has to be there before anything is asked:
            :meth:`load`.
    """

    def __init__(self, config: Any, name: str, values: Mapping[str, Any] | None = None, checkpoint: str | Path | None = None):
        self.name = name
        self._checkpoint = checkpoint and Path(checkpoint).expanduser()
        values = {**(_checkpoint_settings(name, checkpoint) if checkpoint else {}), **(values or {})}
        self.config = config.for_model(name, {**values, "eval_args": {"mode": "full"}})
        data = create_dataset(self.config)
        self.histories = data.histories
        self.loaders = data_preparation(self.config, data)
        self.device = self.config["device"]
        self.model = self._fresh_model().requires_grad_(False).eval()
        self.stage = Stage(f"cf-{name}", self._depends(), self._import if checkpoint else self._train)

    @classmethod
    def of(cls, config: Any, histories: Histories, max_seq_length: int) -> CollaborativeModel:
        """The model that ``cf_model`` names, on the items of ``histories``.

        Raises:
            ValueError: it is on other items, or reads more of a history than ``max_seq_length``, which evaluation shows.
        """
        cf = cls(config, config["cf_model"], config["cf_config"], config["cf_checkpoint"])
        if cf.histories.item_ids != histories.item_ids:
            raise ValueError(f"cf_config: {cf.name} must be trained on the same items; leave filters to the run's own keys")
        longest = getattr(cf.model, "max_seq_length", 0)
        if longest > max_seq_length:
            raise ValueError(
                f"MAX_ITEM_LIST_LENGTH: {cf.name} reads {longest} items of a history, and this run cuts them to "
                f"{max_seq_length} when it evaluates; give --MAX_ITEM_LIST_LENGTH={longest}"
            )
        return cf

    @property
    def is_sequential(self) -> bool:
        """Whether the model reads histories."""
        return isinstance(self.model, SequentialRecommender)

    def _depends(self) -> dict[str, Any]:
        depends = {"config": self.config.recbole_fingerprint, "histories": self.histories.fingerprint}
        return depends | ({"checkpoint": sha256_file(self._checkpoint)} if self._checkpoint else {})

    def _fresh_model(self) -> Any:
        return self.config.model_class(self.config, self.loaders[0]._dataset).to(self.device)

    # -- its stage -----------------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> None:
        """Read the stage's result."""
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        if issubclass(self._trainer_class, SequenceTraining):
            make_causal(self.model)  # it is read as it was trained
        self.model.requires_grad_(False).eval()
        vars(self).pop("item_table", None)  # of the weights before

    @cached_property
    def _trainer_class(self) -> type[Any]:
        return trainer_class(self.config)

    def _train(self, work: Work) -> None:
        self.config["checkpoint_dir"] = str(work.scratch)
        self.model = self._fresh_model()  # from the stage's own seed, whatever was drawn before
        trainer = self._trainer_class(self.config, self.model)
        train, valid, _ = self.loaders
        count_trained(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        score, _ = trainer.fit(train, valid, show_progress=self.config["show_progress"])
        trainer.load_best()
        logger.info(f"cf-{self.name}: best validation {self.config['valid_metric']} {score:.4f} under full ranking")
        save_tensors(work.out / "model.safetensors", self.model.state_dict())

    def _import(self, work: Work) -> None:
        found = read_checkpoint(str(self._checkpoint)).state_dict
        try:
            self.model.load_state_dict(found)
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ValueError(
                f"cf_checkpoint: {self._checkpoint} does not fit {self.name} on {self.config['dataset']} ({reason}). Give the "
                f"dataset and filters that it was trained with, and --cf_model and --cf_config as they were"
            ) from error
        logger.info(f"cf-{self.name}: imported from {self._checkpoint}")
        save_tensors(work.out / "model.safetensors", found)

    # -- what it knows -------------------------------------------------------------------------------------------------

    @cached_property
    def item_table(self) -> Tensor:
        """Item vectors [I, H], read once: LightGCN's are a walk over the whole graph."""
        return _read(_ITEMS, self.model)[: self.model.n_items].detach()

    @cached_property
    def state_width(self) -> int:
        """H of :meth:`sequence_states`.

        Raises:
            ValueError: the model has no states that could be read.
        """
        return self.sequence_states([[1]])[0].shape[-1]

    @torch.no_grad()
    def user_states(self, users: Sequence[int], histories: Sequence[Sequence[int]]) -> Tensor:
        """User states [B, H]: of a sequential model after each history, of any other the user's own vector.

        A user without history has no state in a sequential model and gets zeros.
        """
        if not self.is_sequential:
            return _read(_USERS, self.model)[torch.tensor(users, device=self.device)]
        asked = self._interaction(users, histories)
        items, lengths = asked[self.model.ITEM_SEQ], asked[self.model.ITEM_SEQ_LEN]  # [B, L], [B]
        known = items[:, :1].ne(0)  # [B, 1]
        return _read_states(self.model, items.where(known, 1), lengths) * known  # [B, H]

    @torch.no_grad()
    def sequence_states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Its state at every item of each history, and where there is an item: [B, N, H] and, as bool, [B, N].

        N is the longest history of the call and at least 1; a sequential model reads no more than its ``max_seq_length``
        most recent items. A causal model's state at an item is its user state after it, BERT4Rec's has seen the items
        behind it too; any other sequential model reads each prefix by itself. A model that is not sequential has the
        item's own vector there. Padding, on the right, is zeros, and changes no state.

        Raises:
            ValueError: the model has no states that could be read.
        """
        if not self.is_sequential:
            return self.item_states(histories)
        items = _padded(histories, min(_longest(histories), self.model.max_seq_length)).to(self.device)  # [B, N]
        known = items.ne(0)  # [B, N]
        items[:, 0].clamp_(min=1)  # an empty history is read as item 1: no model knows a length of 0
        return _read_positions(self.model, items).where(known[..., None], 0), known  # [B, N, H]

    def item_states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The items' own vectors in the place of :meth:`sequence_states`."""
        items = _padded(histories, _longest(histories)).to(self.device)  # [B, N]
        known = items.ne(0)  # [B, N]
        return self.item_table[items].where(known[..., None], 0), known  # [B, N, H]

    @torch.no_grad()
    def candidate_scores(self, users: Sequence[int], histories: Sequence[Sequence[int]], candidates: Tensor) -> Tensor:
        """Its own scores [B, C] of candidates [B, C]."""
        asked = self._interaction(users, histories)
        return gather_scores(self.model, asked, candidates.to(self.device), self.config["ITEM_ID_FIELD"])

    @torch.no_grad()
    def scores(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue for a RecBole interaction, cut to as much history as the model has room for."""
        histories: list[list[int]] = [[]] * len(interaction)
        if self.is_sequential:
            items, lengths = interaction[self.model.ITEM_SEQ].tolist(), interaction[self.model.ITEM_SEQ_LEN].tolist()
            histories = [row[:length] for row, length in zip(items, lengths, strict=True)]
        catalogue = torch.arange(self.model.n_items).expand(len(interaction), -1)  # [B, I]
        return self.candidate_scores(interaction[self.config["USER_ID_FIELD"]].tolist(), histories, catalogue)

    def _interaction(self, users: Sequence[int], histories: Sequence[Sequence[int]]) -> Interaction:
        """What RecBole would hand to the model: the last ``MAX_ITEM_LIST_LENGTH`` items, padded on the right."""
        fields = {self.config["USER_ID_FIELD"]: torch.tensor(users)}
        if self.is_sequential:
            items = _padded(histories, self.model.max_seq_length)  # [B, L]
            # an empty history is read as one padding item: a length of 0 has no last position
            fields |= {self.model.ITEM_SEQ: items, self.model.ITEM_SEQ_LEN: items.ne(0).sum(1).clamp(min=1)}
        return Interaction(fields).to(self.device)


# -- where RecBole's models keep what they know: all others name it as most do, or are refused --------------------------


def _bert4rec_states(model: Any, items: Tensor, lengths: Tensor) -> Tensor:
    """States [B, H] at the mask that stands for the next item."""
    masked = model.reconstruct_test_data(items, lengths)  # [B, L], the oldest column dropped
    return model.gather_indexes(model(masked), lengths - 1)


_STATES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "NextItNet": lambda model, items, _: model(items),
    "BERT4Rec": _bert4rec_states,
}
_ITEMS: dict[str, Callable[[Any], Tensor]] = {
    "NeuMF": lambda model: torch.cat([model.item_mf_embedding.weight, model.item_mlp_embedding.weight], 1),
    "LightGCN": lambda model: model()[1],
    "": lambda model: model.item_embedding.weight,
}
_USERS: dict[str, Callable[[Any], Tensor]] = {
    "NeuMF": lambda model: torch.cat([model.user_mf_embedding.weight, model.user_mlp_embedding.weight], 1),
    "LightGCN": lambda model: model()[0],
    "": lambda model: model.user_embedding.weight,
}


_CHOOSE = "choose SASRec, GRU4Rec, NextItNet, BERT4Rec, BPR, NeuMF or LightGCN, or add it to classical/collaborative.py"


def _read(places: Mapping[str, Callable[[Any], Tensor]], model: Any) -> Tensor:
    name = type(model).__name__
    try:
        return places.get(name, places[""])(model)
    except AttributeError as error:
        raise ValueError(f"cf_model: {name} keeps no vectors that could be read ({error}); {_CHOOSE}") from error


def _read_states(model: Any, items: Tensor, lengths: Tensor) -> Tensor:
    """States [B, H] after histories items [B, L] of lengths [B]."""
    name = type(model).__name__
    if name in _STATES:
        return _STATES[name](model, items, lengths)
    read = [*signature(model.forward).parameters]
    if read != ["item_seq", "item_seq_len"]:
        raise ValueError(f"cf_model: {name} reads {', '.join(read)}, not a history alone; {_CHOOSE}")
    return model(items, lengths)


def _read_positions(model: Any, items: Tensor) -> Tensor:
    """States [B, N, H] at each item of histories items [B, N], none of them empty; of no use at padding."""
    name = type(model).__name__
    if name == "BERT4Rec":
        return model(items)
    # RecBole's own NextItNet reads the last column of the padded history, so that no other column is a state of it
    if name in CAUSAL_MODELS and (name != "NextItNet" or "forward" in vars(model)):
        return sequence_states(model, items, items.ne(0).sum(1))
    return _read_prefixes(model, items)


def _read_prefixes(model: Any, items: Tensor) -> Tensor:
    """States [B, N, H] of a model that has one state for a whole history: P prefixes, each a history of its own.

    They are padded to the model's full length, on which a state may depend.
    """
    known = items.ne(0)  # [B, N]
    rows, ends = known.nonzero(as_tuple=True)  # [P], [P]
    columns = torch.arange(items.shape[1], device=items.device)  # [N]
    prefixes = items[rows].where(columns <= ends[:, None], 0)  # [P, N]
    prefixes = pad(prefixes, (0, model.max_seq_length - items.shape[1]))  # [P, L]
    parts = zip(prefixes.split(PREFIXES), (ends + 1).split(PREFIXES), strict=True)
    found = torch.cat([_read_states(model, part, lengths) for part, lengths in parts])  # [P, H]
    states = found.new_zeros(*items.shape, found.shape[1])  # [B, N, H]
    states[known] = found
    return states


def _longest(histories: Sequence[Sequence[int]]) -> int:
    return max([1, *map(len, histories)])


def _padded(histories: Sequence[Sequence[int]], width: int) -> Tensor:
    """The last ``width`` items of each history [B, width], padded on the right with 0."""
    items = torch.zeros(len(histories), width, dtype=torch.long)  # [B, width]
    for row, history in zip(items, histories, strict=True):
        recent = torch.tensor(list(history[-width:]), dtype=torch.long)
        row[: len(recent)] = recent
    return items


def _checkpoint_settings(name: str, checkpoint: str | Path) -> dict[str, Any]:
    """The hyper-parameters that a checkpoint was trained with, as far as it tells: its sizes need not be given again.

    Plain RecBole has no ``train_mode``: its models are read as its own loop trains them.
    """
    import recbole

    file = files(recbole) / "properties" / "model" / f"{name}.yaml"
    known = {"MAX_ITEM_LIST_LENGTH", "train_mode", *(yaml.safe_load(file.read_text()) or {})} if file.is_file() else set()
    return {"train_mode": "prefix"} | {key: v for key, v in read_checkpoint(checkpoint).config.items() if key in known}
