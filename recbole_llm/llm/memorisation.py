"""What an LM knows of a catalogue before any training.

Two measurements on the LM without adapters, after the heading of a list of titles:

*titles*    whether a real title is more likely than a made-up title of as many words, which are taken from other titles
*lines*     after ten lines of the dataset's own ``.item`` file, whether the title on the next line is more likely than titles
            further down

An LM that never saw the dataset prefers real titles as far as they are ordinary language or well known, and ranks the next line
at chance. One that was trained on the file knows the next line (Di Palma et al., "Do LLMs Memorize Recommendation Datasets? A
Preliminary Study on MovieLens-1M", SIGIR 2025, arXiv 2505.10212, ask for rows of ml-1m by their number).

Legend: N titles or lines, C candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.prompts import Prompt
from recbole_llm.data.tokens import TextTokens
from recbole_llm.llm.causal_lm import CausalLM
from recbole_llm.llm.scoring import Scorer

TITLES, LINES = 200, 100  # at most
SHOWN = 10  # lines before the one that is ranked
OTHERS, NEAR = 19, 100  # titles that it is compared with, from so many lines that follow


@dataclass(frozen=True)
class Catalogue:
    """The titles of a dataset.

    Attributes:
        noun: what an item is, in the singular.
        names: titles by internal item id, with ``""`` at entry 0.
        lines: internal ids in the order of the ``.item`` file.
        max_title_tokens: longer titles are cut.
    """

    noun: str
    names: Sequence[str]
    lines: Sequence[int]
    max_title_tokens: int


def memorisation(causal: CausalLM, scorer: Scorer, catalogue: Catalogue, seed: int) -> dict[str, Any]:
    """The measurements, with half widths of their 95 % intervals; None where the catalogue is too small.

    ``titles``: share of N real titles that are more likely than the one put together, and the mean difference in nats.
    ``lines``: share of N lines at which the next line is the most likely one of its C candidates, ``chance``, which is 1 / C, and
    ``words``, the share at which it has more words of the ten lines than any other one: what a sorted file tells without an LM.
    """
    rng = np.random.default_rng(seed)
    return {"titles": _titles(causal, scorer, catalogue, rng), "lines": _lines(causal, scorer, catalogue, rng)}


def _titles(causal: CausalLM, scorer: Scorer, catalogue: Catalogue, rng: np.random.Generator) -> dict[str, Any] | None:
    pairs = recombined([name for name in catalogue.names if name], rng)
    if not pairs:
        return None
    chosen = [pairs[i] for i in np.sort(rng.permutation(len(pairs))[:TITLES])]
    text = TextTokens(causal.tokenizer, [title for pair in chosen for title in pair], catalogue.max_title_tokens)
    heading, rows = _heading(text, catalogue), _ended(text)
    answers = [[rows[2 * i], rows[2 * i + 1]] for i in range(len(chosen))]
    scores = scorer(causal.model, [Prompt(heading)] * len(chosen), answers).cpu().double()  # [N, 2]
    differences = (scores[:, 0] - scores[:, 1]).numpy()  # [N]
    return {**_share(differences > 0), "chance": 0.5, "difference": float(differences.mean())}


def _lines(causal: CausalLM, scorer: Scorer, catalogue: Catalogue, rng: np.random.Generator) -> dict[str, Any] | None:
    lines = list(catalogue.lines)
    places = np.arange(SHOWN, len(lines) - OTHERS)  # of the line that is ranked
    if not len(places):
        return None
    text = TextTokens(causal.tokenizer, catalogue.names, catalogue.max_title_tokens)
    heading, rows = _heading(text, catalogue), _ended(text)
    prompts, answers, shared = [], [], []
    for place in np.sort(rng.permutation(places)[:LINES]).tolist():
        following = rng.permutation(np.arange(place + 1, min(place + 1 + NEAR, len(lines))))[:OTHERS].tolist()
        shown, listed = lines[place - SHOWN : place], [lines[place], *(lines[other] for other in following)]
        prompts.append(Prompt([*heading, *(token for item in shown for token in rows[item])]))
        answers.append([rows[item] for item in listed])
        before = {word for item in shown for word in catalogue.names[item].split()}
        shared.append([len(before.intersection(catalogue.names[item].split())) for item in listed])
    scores: Tensor = scorer(causal.model, prompts, answers).cpu()  # [N, C]; the next line comes first
    words = torch.tensor(shared)  # [N, C]
    return {**_share(_first(scores)), "chance": 1 / (OTHERS + 1), "words": float(_first(words).mean())}


def _first(scores: Tensor) -> np.ndarray:
    """Where [N] the first of C candidates has the highest of the scores [N, C], and no other one has it."""
    return (scores[:, :1] > scores[:, 1:]).all(1).numpy()


def recombined(titles: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Real titles with ones of other words: (real, put together).

    Among titles of the same number of words, at least two, the words of each place are permuted, so that both sides consist of
    the same words. Those that give a real title are left out.
    """
    known, groups = set(titles), defaultdict(list)
    for title in dict.fromkeys(titles):
        words = title.split()
        if len(words) > 1:
            groups[len(words)].append(words)
    pairs = []
    for rows in groups.values():
        columns = [[rows[i][place] for i in rng.permutation(len(rows))] for place in range(len(rows[0]))]
        pairs += [(" ".join(real), " ".join(words)) for real, *words in zip(rows, *columns, strict=True)]
    return [(real, made) for real, made in pairs if made not in known]


def _heading(text: TextTokens, catalogue: Catalogue) -> list[int]:
    return text.begin(f"A list of {catalogue.noun}s:\n", True)


def _ended(text: TextTokens) -> list[list[int]]:
    """Each title with the end of its line."""
    end = text.literal("\n")
    return [[*row, *end] for row in text.titles(False)]


def _share(hits: np.ndarray) -> dict[str, Any]:
    """Their number, their mean, and the half width of its 95 % interval (normal, or if all are equal the rule of three)."""
    width = 1.96 * hits.std() / np.sqrt(len(hits)) or min(1.0, 3 / len(hits))
    return {"number": len(hits), "share": float(hits.mean()), "half_width_95": float(width)}
