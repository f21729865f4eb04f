"""What all LLM models share: a frozen backbone, prompts over one dataset, stages whose results are kept, controls.

Two contracts stand on it: ``model/ranker.py`` scores candidates by the likelihood of their titles, ``model/encoder.py`` gives
users and items one vector each. A model says which stages it has (:meth:`LLMRecommender.plan`) and how it takes up what the
last of them left (:meth:`LLMRecommender.load`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType

from recbole_llm.classical.collaborative import CollaborativeModel
from recbole_llm.data import domains
from recbole_llm.data.domains import Domain
from recbole_llm.data.prompts import PromptBuilder
from recbole_llm.llm.backbones import load_backbone
from recbole_llm.store.stages import Stage, StageCache


class LLMRecommender(SequentialRecommender):
    """Base of all our models.

    Class attributes tell what a model needs and can do; docs and contract tests are made from them.
    """

    input_type = InputType.POINTWISE
    uses_item_text = True
    uses_cf_model = False
    scores_unseen_items = True
    scores_full_catalogue = False

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.cache = StageCache(Path(config["checkpoint_dir"]) / "stages", seed=config["seed"])
        self.domain = domains.of_dataset(config, dataset)
        self.histories = dataset.histories
        backbone = load_backbone(config, self._read_domains(config), self.cache)
        self.backbone_name, self.backbone_fingerprint = backbone.name, backbone.fingerprint
        self.lm: Any = backbone.model
        self.tokenizer = backbone.tokenizer
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        self.prompt_settings: dict[str, Any] = self._prompt_settings(config)
        self.valid_users = config["valid_users"]
        self.seed = config["seed"]
        self.save_every = config["save_every_seconds"]
        self.show_progress = config["show_progress"]
        self.answering = type(self).__name__
        self.stages_fingerprint: str | None = None
        self.trained_parameters: int | None = None  # by all stages of the answer, not by those of controls; not the backbone's

    def __str__(self) -> str:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        return f"{type(self).__name__} on {self.backbone_name}: {trained:,} of {whole:,} parameters are trained"

    def _read_domains(self, config: Any) -> Sequence[Domain]:
        """Whose training data the builtin LM reads."""
        return [self.domain]

    @property
    def _on_cpu(self) -> bool:
        return self.lm.get_input_embeddings().weight.device.type == "cpu"

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _prompt_settings(self, config: Any) -> dict[str, Any]:
        """How prompts are built, as :class:`PromptBuilder` names it; stages depend on all of it."""
        return {
            "template": template(config, config["prompt"]),
            "system": config["system"],
            "history_separator": config["history_separator"],
            "chat": config["chat"],
            "max_history": config["max_history"],
            "max_title_tokens": config["max_title_tokens"],
            "max_prompt_tokens": config["max_prompt_tokens"],
        }

    def _prompt_builder(self, domain: Domain, settings: dict[str, Any] | None = None) -> PromptBuilder:
        settings = settings or self.prompt_settings
        return PromptBuilder(self.tokenizer, domain.items.names, noun=domain.noun, verb=domain.verb, **settings)

    def _histories_of(self, interaction: Any) -> list[list[int]]:
        items, lengths = interaction[self.ITEM_SEQ].tolist(), interaction[self.ITEM_SEQ_LEN].tolist()
        return [row[:length] for row, length in zip(items, lengths, strict=True)]

    # -- collaborative model -------------------------------------------------------------------------------------------

    def _collaborative(self, config: Any) -> CollaborativeModel:
        """The model that ``cf_model`` names, on the same items."""
        cf = CollaborativeModel(config, config["cf_model"], config["cf_config"], config["cf_checkpoint"])
        if cf.histories.item_ids != self.histories.item_ids:
            raise ValueError(f"cf_config: {cf.name} must be trained on the same items; leave filters to the run's own keys")
        longest = getattr(cf.model, "max_seq_length", 0)
        if longest > self.max_seq_length:
            raise ValueError(
                f"MAX_ITEM_LIST_LENGTH: {cf.name} reads {longest} items of a history, and this run cuts them to "
                f"{self.max_seq_length} when it evaluates; give --MAX_ITEM_LIST_LENGTH={longest}"
            )
        return cf

    # -- stages --------------------------------------------------------------------------------------------------------

    def plan(self) -> Stage:
        """The last stage of the model; it names the stages before it as its inputs."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Take up the result of the last stage, kept in ``folder``."""
        raise NotImplementedError

    def run_stages(self) -> None:
        """Train or find every stage, then take up the last one's result."""
        stage = self.plan()
        self.load(self.cache.run(stage))
        self.stages_fingerprint = stage.fingerprint
        self.trained_parameters = self.cache.trained(stage)

    # -- controls ------------------------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        """What is always reported beside the model, by name: a context in which the model answers as that control."""
        return {}

    @contextlib.contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        before, self.answering = self.answering, name
        try:
            yield
        finally:
            self.answering = before

    @property
    def answer_fingerprint(self) -> str | None:
        """What the scores depend on besides the candidates; None before the stages have run."""
        raise NotImplementedError


def template(config: Any, name: str) -> str:
    """A template of ``prompts`` by name."""
    if name not in config["prompts"]:
        raise ValueError(f"prompt: {name} is not a key of `prompts` ({', '.join(config['prompts'])})")
    return config["prompts"][name]


def text_fields(config: Any) -> list[str]:
    """Columns of the .item file that are read beside the title: ``text_fields``, or all that the dataset names."""
    given = config["text_fields"]
    return [config[key] for key in ("year_field", "brand_field", "category_field") if config[key]] if given is None else given
