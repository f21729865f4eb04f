"""The evaluation of papers that rank by generated answers: how an answer is read, when it is a hit, and the metrics.

Two rules:

    exact      the answer is a list of titles, split at a separator; the rank of the target is the place of the first entry that
               equals its title (RecCocktail, MoLoRec, WeaveRec, TALLRec in their list-wise form)
    contained  the answer is a hit if it contains the target's title anywhere, upper and lower case alike (A-LLMRec)

Legend: N users, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recbole_llm.evaluation import metrics

PREFIX = "published_"
_WHOLE = {"published_max_new_tokens": None}
_NAMES = {"hr": "hit"}  # names of the papers that differ from RecBole's


@dataclass(frozen=True)
class PublishedProtocol:
    """How a paper evaluates generated answers.

    Attributes:
        paper: its name and number.
        metrics: with cutoffs, by the paper's names in lower case.
        max_new_tokens, repetition_penalty: of the paper's greedy decoding.
        settings: keys and values of the paper's prompt; differing values are allowed, and named in the log and the record.
        prompt_key: the key that names the prompt.
        exact: the rule, exact or contained.
    """

    paper: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    repetition_penalty: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt_key: str = "prompt"
    exact: bool = True

    @property
    def depth(self) -> int:
        """Entries of an answer that the metrics read."""
        return max(int(name.partition("@")[2]) for name in self.metrics)

    def differences(self, config: Any) -> list[str]:
        """Settings of the run that are not the paper's."""
        return [f"{key}: {config[key]!r} instead of {value!r}" for key, value in self.settings.items() if config[key] != value]

    def with_settings(self, config: Any) -> PublishedProtocol:
        """The protocol with the run's ``published_max_new_tokens``."""
        return replace(self, max_new_tokens=config["published_max_new_tokens"] or self.max_new_tokens)

    def completes(self, separator: str, titles: Sequence[str], continues: bool) -> Callable[[str], bool] | None:
        """Whether an answer, read so far, has all that the metrics read; None if they read all of it.

        Args:
            separator, titles: as in :func:`entries`, the titles of the whole catalogue.
            continues: answers continue a list, where a separator and not an end token ends a title.
        """
        if not self.exact and not continues:
            return None
        mark = separator.strip() or separator
        inside = max(title.count(mark) for title in titles)
        needed = self.depth * (1 + inside)
        return lambda text: text.count(mark) >= needed

    def places(self, answer: str, titles: Sequence[str], separator: str) -> list[int]:
        """The place of each of C titles in an answer, counting from 1; 0 if it is not there.

        Args:
            separator: between two titles of an answer; the contained rule does not read it.
        """
        return exact_places(answer, titles, separator, self.depth) if self.exact else contained(answer, titles)

    def results(self, ranks: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of ranks [N], and the half widths of their 95 % intervals, as ``published_<paper's name>``."""
        ours = {f"{PREFIX}{name}": in_recbole(name) for name in self.metrics}
        values, widths = metrics.metrics(ranks, ours.values()), metrics.half_widths(ranks, ours.values())
        return {name: values[own] for name, own in ours.items()}, {name: widths[own] for name, own in ours.items()}


def entries(answer: str, separator: str, titles: Sequence[str] = ()) -> list[str]:
    """The entries of a list of titles, without blanks around them.

    An empty entry has its place, too. A title of ``titles`` that contains the separator is one entry.
    """
    separator = separator.strip() or separator
    parts, wholes, found = answer.split(separator), {title for title in titles if separator in title}, []
    while parts:
        sizes = range(len(parts), 1, -1) if wholes else ()
        size = next((size for size in sizes if separator.join(parts[:size]).strip() in wholes), 1)
        found.append(separator.join(parts[:size]).strip())
        parts = parts[size:]
    return found


def exact_places(answer: str, titles: Sequence[str], separator: str, depth: int) -> list[int]:
    """The place of each title among the first ``depth`` entries of an answer, the first of several; 0 if no entry equals it."""
    listed = entries(answer, separator, titles)[:depth]
    return [listed.index(title) + 1 if title and title in listed else 0 for title in titles]


def quoted(answer: str) -> str:
    """The part of an answer that A-LLMRec's evaluation reads: in its first line, the text between the outer quotation marks.

    The text is in lower case. A line with fewer than two quotation marks is read whole.
    """
    line, *_ = answer.strip().lower().split("\n")
    first, last = line.find('"'), line.rfind('"')
    return line[first + 1 : last] if first < last else line


def contained(answer: str, titles: Sequence[str]) -> list[int]:
    """1 for each title that the answer contains anywhere, otherwise 0: "it" is in "titanic with it"."""
    text = quoted(answer)
    return [int(bool(title) and title.lower() in text) for title in titles]


def in_recbole(name: str) -> str:
    """RecBole's name of a paper's metric, with or without the prefix: ``published_hr@1`` -> ``hit@1``."""
    name = name.removeprefix(PREFIX)
    metric, at, k = name.partition("@")
    return f"{_NAMES.get(metric, metric)}{at}{k}"


RECCOCKTAIL = PublishedProtocol(
    paper="RecCocktail (arXiv 2502.08271)",
    metrics=("hr@1", "hr@3", "ndcg@1", "ndcg@3"),
    max_new_tokens=800,
    settings={"prompt": "reccocktail", "chat": True, "candidate_separator": "||", "top_k_target": 5, **_WHOLE},
)
WEAVEREC = replace(
    RECCOCKTAIL, paper="WeaveRec (arXiv 2510.26546)", metrics=("hr@1", "hr@3", "ndcg@1", "ndcg@3", "ndcg@5", "mrr@5")
)
ALLMREC = PublishedProtocol(
    paper="A-LLMRec (arXiv 2404.11343)",
    metrics=("hit@1",),
    max_new_tokens=512,
    repetition_penalty=1.5,
    settings={"soft_prompt": "allmrec", "title_quote": '"', "candidate_separator": ", ", **_WHOLE},
    prompt_key="soft_prompt",
    exact=False,
)
