"""A classical RecBole model as a frozen part of a run: it provides item vectors and user states, or candidates.

It is either trained once, as a stage, or imported from a checkpoint. Training uses the trainer and the split of a baseline, with
early stopping by full ranking of the validation items. Afterwards the model is frozen and stays in ``eval()``.

Legend: B users, I items, L maximum history length of the model, N longest history of a call, H width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import init_seed
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm import registry
from recbole_llm.classical import building, kgat
from recbole_llm.classical.imported_checkpoint import ImportedCheckpoint, read_checkpoint
from recbole_llm.classical.inner_config import check_split, inner_config
from recbole_llm.classical.sequence import CAUSAL_MODELS, SequenceTraining, make_causal, sequence_states
from recbole_llm.classical.train_modes import trainer_class
from recbole_llm.classical.trial import training_cost
from recbole_llm.config.property_files import read_yaml
from recbole_llm.data.loading import create_dataset, data_preparation
from recbole_llm.evaluation.candidate_scores import CandidateScores
from recbole_llm.store.costs import Cost
from recbole_llm.store.files import save_tensors, sha256_file
from recbole_llm.store.random_state import preserved_random_state
from recbole_llm.store.stages import Stage, Work, count_trained

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories

logger = getLogger()

_DRAW_UNSAVED = {"RippleNet", "NNCF"}  # draw in their constructors what no checkpoint has: ripple sets, neighbours
PREFIXES = 512
"""Prefixes in a forward pass of a model that reads each prefix by itself."""


class CollaborativeModel:
    """A trained RecBole model, frozen. Any model with item embeddings is supported.

    Args:
        config: of the run.
        name: of the RecBole model.
        values: settings of the model, with precedence over those of a checkpoint.
        checkpoint: file of a trained model, saved by RecBole or this package; None trains one.

    Attributes:
        stage: trains the model or imports the checkpoint. :meth:`load` its result before any other method.
    """

    KEYS: tuple[str, ...] = ("cf_model", "cf_config", "cf_checkpoint")  # of the run: name, values and checkpoint

    def __init__(self, config: Any, name: str, values: Mapping[str, Any] | None = None, checkpoint: str | Path | None = None):
        self.name, self._given = name, [*(values or {})]
        self._checkpoint = checkpoint and Path(checkpoint).expanduser()
        trained = self._checkpointed().settings(name) if checkpoint else {}
        self.config = inner_config(config, name, {**trained, **(values or {})}, self.KEYS)
        data = create_dataset(self.config)
        self.histories = data.histories
        self.loaders = data_preparation(self.config, data)
        self.device = self.config["device"]
        self.model = self._fresh_model().requires_grad_(False).eval()
        depends = {"config": self.config.recbole_fingerprint, "histories": self.histories.fingerprint}
        depends |= {"checkpoint": sha256_file(self._checkpoint)} if self._checkpoint else {}
        depends |= self._further(values or {})
        build = self._import if checkpoint else self._train
        own = self.config.model_class.__module__
        code = () if own.startswith("recbole.") else (own,)  # of a model of the user
        self.stage = Stage(f"cf-{name}", depends, build, code=code, cost=self._cost, role=self.KEYS[0])

    def _further(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What else its training depends on: settings without a default of RecBole, and the other columns that it loads."""
        file = registry.own_property_file(self.config.model_class)
        own = {**(read_yaml(file) if file else {}), **values}
        others = {key: value for key, value in own.items() if key not in self.config.known_to_recbole}
        every = ["item", "user", "kg", "link", "net", *(self.config["additional_feat_suffix"] or ())]
        chosen = self.config["load_col"]  # ~: all columns of all tables
        tables = every if chosen is None else [suffix for suffix in chosen if suffix != "inter"]
        histories = {self.config[field] for field in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")}
        if chosen is None or not {*chosen["inter"]} <= histories:  # such as ratings, of which labels are made
            tables += [f"{part}.inter" for part in self.config["benchmark_filename"] or ()] or ["inter"]
        files = {suffix: Path(self.config["data_path"]) / f"{self.config['dataset']}.{suffix}" for suffix in tables}
        hashes = {suffix: sha256_file(path) for suffix, path in files.items() if path.is_file()}
        return {key: found for key, found in (("settings", others), ("tables", hashes)) if found}

    @classmethod
    def of(cls, config: Any, histories: Histories, max_seq_length: int) -> Self:
        """The model that the first of :attr:`KEYS` names, on the items of ``histories``.

        Raises:
            ValueError: as :meth:`check` and :meth:`check_length`.
        """
        cf = cls(config, *(config[key] for key in cls.KEYS))
        cf.check(histories)
        cf.check_length(max_seq_length)
        return cf

    def check(self, histories: Histories) -> None:
        """Refuse other data than those of the run, as :func:`check_split`."""
        check_split(histories, self.histories, self.name, self._given, self.KEYS[1])

    def check_length(self, limit: int) -> None:
        """Refuse a model that reads more of a history than ``limit`` items, all that the rows of the run have.

        Raises:
            ValueError: names the key of the run.
        """
        longest = getattr(self.model, "max_seq_length", 0)
        if longest > limit:
            raise ValueError(
                f"MAX_ITEM_LIST_LENGTH: {self.name} reads {longest} items of a history, but this run cuts histories to "
                f"{limit}; give --MAX_ITEM_LIST_LENGTH={longest}"
            )

    @property
    def is_sequential(self) -> bool:
        """Whether the model reads histories."""
        return isinstance(self.model, SequentialRecommender)

    def _fresh_model(self) -> Any:
        return building.build(self.config, self.loaders[0]._dataset)

    # -- stage ---------------------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> None:
        """Read the stage's result."""
        if self.name in _DRAW_UNSAVED:
            with preserved_random_state():
                init_seed(self.config["seed"], True)  # as in training
                self.model = self._fresh_model()
        found, weights = load_file(folder / "model.safetensors"), self.model.state_dict()
        self.model.load_other_parameter({name: found.pop(name).to(self.device) for name in [*found] if name not in weights})
        self.model.load_state_dict(found)
        kgat.attend(self.model)
        if issubclass(self._trainer_class, SequenceTraining):
            make_causal(self.model)  # as in training
        self.model.requires_grad_(False).eval()
        for name in (
            "restore_user_e",
            "restore_item_e",
            "restore_entity_e",
        ):  # vectors that RecBole's graph models keep when they rank
            if hasattr(self.model, name):
                setattr(self.model, name, None)
        for name in ("item_table", "_scores"):  # computed from the previous weights
            vars(self).pop(name, None)

    @cached_property
    def _trainer_class(self) -> type[Any]:
        return trainer_class(self.config)

    def _train(self, work: Work) -> None:
        self.config["checkpoint_dir"] = str(work.scratch)
        init_seed(self.config["seed"], True)  # its own, if its settings have one
        self.model = self._fresh_model()
        trainer = self._trainer_class(self.config, self.model)
        train, valid, _ = self.loaders
        trainer.scratch = work.scratch if trainer.is_resumable else None
        count_trained(trainer.model.parameters())
        score, _ = trainer.fit(train, valid, show_progress=self.config["show_progress"])
        trainer.load_best()
        logger.info(f"cf-{self.name}: best validation {self.config['valid_metric']} {score:.4f} under full ranking")
        # beside its weights, Pop has its counts, and KGCN the neighbours that it has drawn; not vectors of the last ranking
        others = {n: v for n, v in self.model.other_parameter().items() if isinstance(v, Tensor) and not n.startswith("restore_")}
        save_tensors(work.out / "model.safetensors", others | self.model.state_dict())

    def _cost(self) -> Cost:
        if self._checkpoint:
            return Cost(note=f"imported from {self._checkpoint}")
        train, valid, _ = self.loaders
        return training_cost(self.config, lambda: (self._fresh_model(), 0.0), self._trainer_class, train, valid)

    def _checkpointed(self) -> ImportedCheckpoint:
        return read_checkpoint(str(self._checkpoint), self.KEYS[2])

    def _import(self, work: Work) -> None:
        if self.name in _DRAW_UNSAVED:
            raise ValueError(
                f"{self.KEYS[2]}: {self._checkpoint}: {self.name} scores by what it has drawn beside its weights, which no "
                f"checkpoint gives; remove {self.KEYS[2]}, so that it is trained here"
            )
        found, own = self._checkpointed(), self.model.other_parameter()
        others = {name: value for name, value in found.others.items() if name in own}  # Pop's counts, KGCN's neighbours
        try:
            self.model.load_state_dict(found.state_dict)
            for name, value in others.items():
                if isinstance(own[name], Tensor) and own[name].shape != value.shape:
                    sizes = " and ".join(str([*one.shape]) for one in (value, own[name]))
                    raise RuntimeError(f"\n{name}: size mismatch, {sizes}")  # noqa: TRY301 (as torch says it of weights)
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ValueError(
                f"{self.KEYS[2]}: {self._checkpoint} does not fit {self.name} on {self.config['dataset']} ({reason}). Give the "
                f"dataset and filters that it was trained with, and --{self.KEYS[0]} and --{self.KEYS[1]} as they were"
            ) from error
        logger.info(f"cf-{self.name}: imported from {self._checkpoint}")
        save_tensors(work.out / "model.safetensors", others | found.state_dict)

    # -- vectors and scores --------------------------------------------------------------------------------------------

    @cached_property
    def item_table(self) -> Tensor:
        """Item vectors [I, H]."""
        return _read(_ITEMS, self.model)[: self.model.n_items].detach()

    @cached_property
    def state_width(self) -> int:
        """H of :meth:`sequence_states`. Raises the same error."""
        return self.sequence_states([[1]])[0].shape[-1]

    @torch.no_grad()
    def user_states(self, users: Sequence[int], histories: Sequence[Sequence[int]]) -> Tensor:
        """User states [B, H]: a sequential model's after each history, zeros if it is empty; any other's user vectors."""
        if not self.is_sequential:
            return _read(_USERS, self.model)[torch.tensor(users, device=self.device)]
        interaction = self._interaction(users, histories)
        items, lengths = interaction[self.model.ITEM_SEQ], interaction[self.model.ITEM_SEQ_LEN]  # [B, L], [B]
        known = items[:, :1].ne(0)  # [B, 1]
        return _read_states(self.model, items.where(known, 1), lengths) * known  # [B, H]

    @torch.no_grad()
    def sequence_states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """States [B, N, H] at every item of each history, and where there is an item, [B, N] bool; zeros at padding.

        N is at least 1; a sequential model reads its ``max_seq_length`` most recent items. A causal model's state at an
        item is its user state after it; BERT4Rec's depends on later items too; any other sequential model reads each
        prefix by itself. A model that is not sequential has the item's vector instead. Padding is on the right.

        Raises:
            ValueError: the states of the model cannot be read.
        """
        if not self.is_sequential:
            return self.item_states(histories)
        items = padded(histories, min(_longest(histories), self.model.max_seq_length)).to(self.device)  # [B, N]
        known = items.ne(0)  # [B, N]
        items[:, 0].clamp_(min=1)  # an empty history is read as item 1, since no model supports length 0
        return _read_positions(self.model, items).where(known[..., None], 0), known  # [B, N, H]

    def item_states(self, histories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """As :meth:`sequence_states`, with the items' vectors as states."""
        items = padded(histories, _longest(histories)).to(self.device)  # [B, N]
        known = items.ne(0)  # [B, N]
        return self.item_table[items].where(known[..., None], 0), known  # [B, N, H]

    @torch.no_grad()
    def candidate_scores(self, users: Sequence[int], histories: Sequence[Sequence[int]], candidates: Tensor) -> Tensor:
        """The model's scores [B, C] of candidates [B, C]."""
        interaction = self._interaction(users, histories)
        return self._scores(interaction, candidates.to(self.device))

    @cached_property
    def _scores(self) -> CandidateScores:
        return CandidateScores(self.model, self.config["ITEM_ID_FIELD"])

    @torch.no_grad()
    def scores(self, interaction: Any) -> Tensor:
        """Scores [B, I] of the whole catalogue for a RecBole interaction, with histories cut to the model's length."""
        histories: list[list[int]] = [[]] * len(interaction)
        if self.is_sequential:
            items, lengths = interaction[self.model.ITEM_SEQ].tolist(), interaction[self.model.ITEM_SEQ_LEN].tolist()
            histories = [row[:length] for row, length in zip(items, lengths, strict=True)]
        catalogue = torch.arange(len(self.histories.item_ids)).expand(len(interaction), -1)  # [B, I]
        return self.candidate_scores(interaction[self.config["USER_ID_FIELD"]].tolist(), histories, catalogue)

    def _interaction(self, users: Sequence[int], histories: Sequence[Sequence[int]]) -> Interaction:
        """The input of a RecBole model: the last ``MAX_ITEM_LIST_LENGTH`` items, padded on the right."""
        fields = {self.config["USER_ID_FIELD"]: torch.tensor(users)}
        if self.is_sequential:
            items = padded(histories, self.model.max_seq_length)  # [B, L]
            # an empty history is read as one padding item, since length 0 has no last position
            fields |= {self.model.ITEM_SEQ: items, self.model.ITEM_SEQ_LEN: items.ne(0).sum(1).clamp(min=1)}
        return Interaction(fields).to(self.device)


# -- vectors of RecBole's models; "graph" stands for LightGCN, NGCF, SGL and others, "" for all that are not listed --------

_ITEMS: dict[str, Callable[[Any], Tensor]] = {
    "NeuMF": lambda model: torch.cat([model.item_mf_embedding.weight, model.item_mlp_embedding.weight], 1),
    "graph": lambda model: _convolved(model, "restore_item_e"),
    "": lambda model: model.item_embedding.weight,
}
_USERS: dict[str, Callable[[Any], Tensor]] = {
    "NeuMF": lambda model: torch.cat([model.user_mf_embedding.weight, model.user_mlp_embedding.weight], 1),
    "graph": lambda model: _convolved(model, "restore_user_e"),
    "": lambda model: model.user_embedding.weight,
}


_CHOOSE = "choose SASRec, GRU4Rec, NextItNet, BERT4Rec, BPR, NeuMF or LightGCN, or add it to classical/collaborative.py"


def _read(places: Mapping[str, Callable[[Any], Tensor]], model: Any) -> Tensor:
    name = type(model).__name__
    try:
        return places.get(name, places["graph" if hasattr(model, "restore_item_e") else ""])(model)
    except AttributeError as error:
        raise ValueError(f"cf_model: {name} has no vectors that can be read ({error}); {_CHOOSE}") from error


def _convolved(model: Any, name: str) -> Tensor:
    """The vectors that a graph model computes of the whole graph when it ranks, and keeps."""
    if getattr(model, name) is None:
        model.full_sort_predict({model.USER_ID: torch.zeros(1, dtype=torch.long, device=model.device)})
    found: Tensor = getattr(model, name)
    return found


def _read_states(model: Any, items: Tensor, lengths: Tensor) -> Tensor:
    """States [B, H] after histories items [B, L] of lengths [B]."""
    name = type(model).__name__
    if name == "NextItNet":
        return model(items)
    if name == "BERT4Rec":  # the state at the mask for the next item
        masked = model.reconstruct_test_data(items, lengths)  # [B, L], without the oldest column
        return model.gather_indexes(model(masked), lengths - 1)
    read = [*signature(model.forward).parameters]
    if read != ["item_seq", "item_seq_len"]:
        raise ValueError(f"cf_model: {name} reads {', '.join(read)}, not a history alone; {_CHOOSE}")
    return model(items, lengths)


def _read_positions(model: Any, items: Tensor) -> Tensor:
    """States [B, N, H] at each item of histories items [B, N], none of them empty; undefined at padding."""
    name = type(model).__name__
    if name == "BERT4Rec":
        return model(items)
    # RecBole's NextItNet, unless prepared by make_causal, reads the last column of the padded history only
    if name in CAUSAL_MODELS and (name != "NextItNet" or "forward" in vars(model)):
        return sequence_states(model, items, items.ne(0).sum(1))
    known = items.ne(0)  # [B, N]; any other model reads each of the P prefixes as a history
    rows, ends = known.nonzero(as_tuple=True)  # [P], [P]
    columns = torch.arange(items.shape[1], device=items.device)  # [N]
    prefixes = items[rows].where(columns <= ends[:, None], 0)  # [P, N]
    prefixes = pad(prefixes, (0, model.max_seq_length - items.shape[1]))  # [P, L]; states may depend on the padded length
    parts = zip(prefixes.split(PREFIXES), (ends + 1).split(PREFIXES), strict=True)
    found = torch.cat([_read_states(model, part, lengths) for part, lengths in parts])  # [P, H]
    states = found.new_zeros(*items.shape, found.shape[1])  # [B, N, H]
    states[known] = found
    return states


def _longest(histories: Sequence[Sequence[int]]) -> int:
    return max([1, *map(len, histories)])


def padded(histories: Sequence[Sequence[int]], width: int) -> Tensor:
    """The last ``width`` items of each history [B, width], padded on the right with 0."""
    items = torch.zeros(len(histories), width, dtype=torch.long)  # [B, width]
    for row, history in zip(items, histories, strict=True):
        recent = torch.tensor(list(history[-width:]), dtype=torch.long)
        row[: len(recent)] = recent
    return items
