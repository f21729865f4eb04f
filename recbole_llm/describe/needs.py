"""What each family of models needs of a dataset, and whether it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm.data import domains
from recbole_llm.data.domains import Domain
from recbole_llm.data.items import text_fields

_TIMES = "times"
_TITLES = "times, titles"


@dataclass(frozen=True)
class Need:
    """A family of models and what it needs.

    Attributes:
        models: some of RecBole's, or all of ours.
        needs: in words.
        missing: what the dataset lacks, with the remedy; empty if the models run.
        found: what they would read.
    """

    models: Sequence[str]
    needs: str
    missing: str = ""
    found: str = ""


@dataclass(frozen=True)
class Asked:
    """A dataset that has been read, and what is known about it.

    Attributes:
        dataset: RecBole's, extended.
        domain: the same, of which views are cut; None without titles.
        ordered: a user's interactions have an order.
        config_of: the configuration of a model on this dataset, from its name.
        no_titles: there are no titles.
        columns: of the ``.inter`` file.
        title_tokens: tokens of all titles together.
    """

    dataset: Any
    domain: Domain | None
    ordered: bool
    config_of: Callable[[str], Any]
    no_titles: bool
    columns: Mapping[str, str]
    title_tokens: int

    @property
    def no_texts(self) -> str:
        """What the models that read titles lack."""
        return "no titles, see above" if self.no_titles else ""

    @property
    def no_order(self) -> str:
        """What the models that read histories lack."""
        return (
            "" if self.ordered else f"no column {self.dataset.time_field} in .inter; name one of its columns, --TIME_FIELD=COLUMN"
        )

    @property
    def no_history_of_titles(self) -> str:
        """What the models that read titles of a history lack."""
        return "; ".join(filter(None, (self.no_texts, self.no_order)))


def needs(asked: Asked) -> list[Need]:
    """The needs of all families, in the order of how much they need."""
    return [
        Need(("Pop", "BPR", "LightGCN"), "users and items", found=_drawn(asked)),
        _sequential(asked),
        Need(("RecentPop", "TransitionGraph", "RepeatRule"), _TIMES, asked.no_order),
        _labelled(asked),
        _knowledge(asked),
        Need(("NearestTitles", "TALLRec", "LlamaRec", "Cascade"), _TITLES, asked.no_history_of_titles),
        _views(asked, ("LoRACocktail", "MoLoRec"), "general_datasets"),
        _views(asked, ("WeaveRec",), "source_datasets"),
        _texts(asked, ("AlphaRec",), asked.no_texts, "titles; further texts help"),
        _texts(asked, ("NearestTexts", "ALLMRec"), asked.no_history_of_titles, f"{_TITLES}; further texts help"),
        _catalogue(asked),
    ]


def _drawn(asked: Asked) -> str:
    return "" if asked.ordered else "without times, give --eval_args=\"{'order': 'RO'}\" (a random split)"


def _sequential(asked: Asked) -> Need:
    config = asked.config_of("SASRec")
    limit, found = config["MAX_ITEM_LIST_LENGTH"], ""
    longer = sum(len(items) > limit for items in asked.dataset.histories.items)
    if longer:
        found = f"of {longer:,} users the last {limit} items (MAX_ITEM_LIST_LENGTH)"
    return Need(("SASRec", "GRU4Rec", "BERT4Rec"), _TIMES, asked.no_order, found)


def _labelled(asked: Asked) -> Need:
    config = asked.config_of("Pop")
    rating, label = config["RATING_FIELD"], config["LABEL_FIELD"]
    found = f"the column {label}" if label in asked.columns else ""
    if not found and asked.columns.get(rating) == "float":
        found = f"the column {rating}, made a label by --threshold=\"{{'{rating}': 4}}\""
    absent = f"no column {label} (LABEL_FIELD) or {rating} (RATING_FIELD) in .inter"
    missing = "" if found else f"{absent}; items drawn at random can stand for negative labels"
    return Need(("FM", "DeepFM", "DCN"), "labels, or ratings", missing, found)


def _knowledge(asked: Asked) -> Need:
    files = [Path(asked.dataset.dataset_path) / f"{asked.dataset.dataset_name}.{suffix}" for suffix in ("kg", "link")]
    absent = ", ".join(file.name for file in files if not file.is_file())
    return Need(("KGAT", "CKE"), "the files .kg and .link", absent and f"there is no {absent}")


def _views(asked: Asked, models: Sequence[str], key: str) -> Need:
    what = f"{_TITLES}; categories, or {key}"
    if asked.domain is None or not asked.ordered:
        return Need(models, what, asked.no_history_of_titles)
    config = asked.config_of(models[0])
    if given := config[key]:
        return Need(models, what, found=f"{key}: {', '.join(given)}")
    field = config["domain_field"] or asked.domain.items.columns.get("category_field")
    limits = {"at_least": config["domain_min_users"], "at_most": config["domain_max_views"]}
    try:
        views = domains.views(asked.domain, field, **limits, key=key)
    except ValueError as error:
        return Need(models, what, str(error))
    shown = ", ".join(f"{view.name.partition('/')[2]} ({len(view.histories):,} users)" for view in views)
    return Need(models, what, found=f"views by {field}: {shown}")


def _texts(asked: Asked, models: Sequence[str], missing: str, what: str) -> Need:
    if missing:
        return Need(models, what, missing)
    config = asked.config_of(models[-1])
    fields = text_fields(config, asked.dataset.item_texts, described=models[-1] == "ALLMRec")
    return Need(models, what, found=f"titles and {', '.join(fields)}" if fields else "titles alone")


def _catalogue(asked: Asked) -> Need:
    what = f"{_TITLES}; reads all items in each epoch"
    items = asked.dataset.item_num - 1
    found = "" if asked.no_history_of_titles else f"{items:,} items, {asked.title_tokens:,} tokens of titles"
    return Need(("Laser",), what, asked.no_history_of_titles, found)
