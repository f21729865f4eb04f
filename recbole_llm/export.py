"""``recbole-llm export``: the prompts of a model as JSONL for other trainers and inference engines, without training anything.

For each adapter that the model trains, a file of its training examples, with the sampling, the negatives and the prompts of the
first epochs of a training here; for each phase, the prompts of the evaluation users with their candidates and without the target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.conversations import LAYOUTS, Conversations, description
from recbole_llm.llm.causal_lm import load_tokenizer
from recbole_llm.model.ranker import LLMRanker
from recbole_llm.model.yes_no import YesNoParts
from recbole_llm.quick_start import Run, assemble
from recbole_llm.store.files import atomic_folder
from recbole_llm.store.stages import StageCache

logger = getLogger()


@dataclass
class _File:
    """What has been written to one file."""

    layout: str
    lines: int = 0
    inexact: int = 0
    about: dict[str, Any] = field(default_factory=dict)


def export(config: LLMConfig, out: Path, *, layout: str = "messages", passes: int = 1, ids: bool = False) -> list[str]:
    """Write the prompts of a model to a new folder; returns lines about the files.

    The folder holds ``<adapter>.train.jsonl`` and, where no evaluation users choose the weights, ``<adapter>.heldout.jsonl``,
    ``valid.jsonl`` and ``test.jsonl``, LLaMA-Factory's ``dataset_info.json``, and ``export.json``, which says what was exported.

    Args:
        layout: ``messages`` or ``alpaca``; whole histories (``lora_train_mode: sequence``) are documents in any case.
        passes: epochs to write. They differ in the sampled negatives, so more than one is useful if prompts list candidates.
        ids: also write the token ids, as ``input_ids`` and ``labels`` (-100 before the answer).

    Raises:
        ValueError: ``out`` exists, an unknown layout, a model that trains no adapter on texts, or the builtin LM is not trained.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"--layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if passes < 1:
        raise ValueError(f"--passes: {passes} must be at least 1")
    if out.exists():
        raise ValueError(f"--out: {out} exists and is not overwritten; choose another folder")
    run = assemble(config)
    model = run.model
    specs = model.trained(run.candidates) if isinstance(model, LLMRanker) else {}
    if not specs:
        raise ValueError(f"--model={config['model']}: it trains no adapter on prompts of text, so there is nothing to export")
    with atomic_folder(out) as folder:
        files = _Exporter(run, layout, passes, ids, folder).write()
    said = [f"{out / name}: {file.lines} lines, {file.lines - file.inexact} of them exact" for name, file in files.items()]
    return [*said, f"{out / 'dataset_info.json'}", f"{out / 'export.json'}"]


class _Exporter:
    """Writes the files of one model."""

    def __init__(self, run: Run, layout: str, passes: int, ids: bool, folder: Path):
        self._run, self._layout, self._passes, self._ids, self._folder = run, layout, passes, ids, folder
        self._model: LLMRanker = run.model
        self._parts = run.model.parts
        self._tokenizer = _tokenizer(run)
        self._texts = Conversations(self._tokenizer, self._parts.prompts)
        self._files: dict[str, _File] = {}

    def write(self) -> dict[str, _File]:
        for name, spec in self._model.trained(self._run.candidates).items():
            if name in self._model.given.given:
                logger.info(f"export: the adapter {name!r} is given and not trained, so it has no training prompts")
                continue
            stem = "-".join(name.split())
            training, held_out = self._model.adapter_training.examples(spec)
            encode = self._model.adapter_training.encoder(spec, self._tokenizer)
            rngs = (np.random.default_rng([self._parts.seed, e, i]) for e in range(self._passes) for i in range(len(training)))
            about = {"adapter": name, "domains": [domain.name for domain in spec.sources], "passes": self._passes}
            self._write(f"{stem}.train.jsonl", self._examples(map(encode, training * self._passes, rngs)), about)
            if held_out:
                rngs = (np.random.default_rng([self._parts.seed, i]) for i in range(len(held_out)))
                about = {"adapter": name, "held out from": f"{stem}.train.jsonl"}
                self._write(f"{stem}.heldout.jsonl", self._examples(map(encode, held_out, rngs)), about)
        for phase, candidates in self._run.candidates.items():
            if self._run.config["candidates"]["source"] == "retriever":
                logger.info(f"export: the candidates of {phase} need a trained retriever, so {phase}.jsonl is not written")
                continue
            self._write(f"{phase}.jsonl", self._prompts(phase, candidates), {"phase": phase}, trains=False)
        self._describe()
        return self._files

    @property
    def _documents(self) -> bool:
        return self._parts.examples.whole_histories

    def _examples(self, examples: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for row, mask in examples:
            labels = [token if target else -100 for token, target in zip(row.ids, mask, strict=True)]
            ids = {"input_ids": row.ids, "labels": labels} if self._ids else {}
            if self._documents:
                text, exact = self._texts.document(row.ids)
                yield {"text": text, "exact": exact, **ids}
            else:
                start = self._answer_start(row.ids, mask)
                yield self._texts.of(row.ids[:start], row.ids[start:]).line(self._layout) | ids

    def _answer_start(self, row: list[int], mask: list[int]) -> int:
        """The answer is the rest of the row; Yes and No are found by their tokens, since questions may be trained on as well."""
        if not isinstance(self._parts, YesNoParts):
            return mask.index(1)
        prompts = self._parts.builder(self._tokenizer)
        return next(len(row) - len(end) for end in (prompts.yes, prompts.no) if row[-len(end) :] == end)

    def _prompts(self, phase: str, candidates: CandidateSet) -> Iterator[dict[str, Any]]:
        """Prompts without an answer, with the titles and ids of the candidates in their order; a question has one candidate."""
        builder, histories = self._parts.builder(self._tokenizer), self._parts.histories
        dataset, names = self._run.test._dataset, self._parts.domain.items.names
        item_ids = dataset.field2id_token[dataset.iid_field]
        for user, items in zip(candidates.users.tolist(), candidates.items.tolist(), strict=True):
            history = histories.before(user, phase).tolist()
            if isinstance(self._parts, YesNoParts):
                question = builder.prompt(history, self._parts.disliked[user])
                asked = [((question + builder.target(item)).ids, [item]) for item in items]
            else:
                asked = [(builder.prompt(history, items).ids, items)]
            for ids, listed in asked:
                yield self._texts.of(ids).line(self._layout, answered=False) | {
                    "user": histories.user_ids[user],
                    "candidates": [names[item] for item in listed],
                    "items": [str(item_ids[item]) for item in listed],
                    **({"input_ids": ids} if self._ids else {}),
                }

    def _write(self, name: str, lines: Iterable[dict[str, Any]], about: dict[str, Any], *, trains: bool = True) -> None:
        file = self._files[name] = _File("text" if trains and self._documents else self._layout, about=about)
        with open(self._folder / name, "w", encoding="utf-8") as stream:
            for line in lines:
                file.lines += 1
                file.inexact += not line["exact"]
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        if file.inexact:
            logger.warning(
                f"export: {name}: tokenising the texts of {file.inexact} of {file.lines} lines gives other tokens than in "
                "training here, where titles are tokenised one by one; --ids writes the token ids too"
            )

    def _describe(self) -> None:
        prompts, tokenizer = self._parts.prompts, self._tokenizer
        trained = {name: file for name, file in self._files.items() if ".train." in name or ".heldout." in name}
        info = {name.removesuffix(".jsonl").replace(".", "-"): description(name, file.layout) for name, file in trained.items()}
        (self._folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
        if self._documents:
            form = "documents: every title is a target; LLaMA-Factory: stage: pt"
        elif prompts.chat:
            form = "chat: render through the tokenizer's chat template; LLaMA-Factory: stage: sft, no template"
        else:
            form = "bare text: tokenise as it stands, without special tokens; LLaMA-Factory: stage: sft, template: empty"
        if isinstance(self._parts, YesNoParts) and self._parts.train_on_inputs:
            form += "; the loss is that of prompt and answer, LLaMA-Factory: train_on_prompt: true"
        if prompts.is_continuation:
            form += "; the answer continues the list of titles and ends with its separator"
        content = {
            "model": self._run.config["model"],
            "dataset": self._run.config["dataset"],
            "backbone": self._parts.backbone.name,
            "backbone_fingerprint": self._parts.backbone.fingerprint,
            "form": form,
            "prompts": prompts.as_dict(),
            "end_of_text": tokenizer.eos_token,
            "training": self._model.adapter_training.config.as_dict(),
            "files": {name: asdict(file) for name, file in self._files.items()},
        }
        (self._folder / "export.json").write_text(json.dumps(content, indent=1, default=str))


def _tokenizer(run: Run) -> Any:
    """The backbone's tokenizer; that of the builtin LM must have been trained by an earlier run."""
    backbone = run.model.parts.backbone
    if backbone.tokenizer is not None:
        return backbone.tokenizer
    cache: StageCache = run.trainer.cache
    (stage,) = backbone.stages
    if not cache.is_cached(stage):
        raise ValueError(
            "llm_path: the builtin LM has not been trained with these settings, and its tokenizer decides what a prompt holds; "
            "run the model once, or give --llm_path or --llm"
        )
    return load_tokenizer(cache.folder(stage))
