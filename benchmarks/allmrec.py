"""ALLMRec on a catalogue of random words, and the published evaluation loop on the same model, for ``scoring.py``.

All weights and codes are random, which does not affect the cost. Every word is one token, so that a prompt tokenised as one
text, as published, has the same ids as a prompt of tokenised parts, as in this package.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WORDS = ["".join(syllables) for syllables in itertools.product(("ba", "de", "ki", "lo", "mu", "na", "po", "ri"), repeat=3)]
USER, HISTORY, CANDIDATE = MARKERS = ("[UserRep]", "[HistoryEmb]", "[CandidateEmb]")
ITEMS = 500


@dataclass(frozen=True)
class Untrained:
    """Results of stages: one folder with the random weights of a collaborative model and other tensors."""

    root: Path

    def folder(self, stage: Any) -> Path:
        return self.root

    @classmethod
    def of(cls, model: Any, root: Path, **tensors: dict[str, torch.Tensor]) -> Untrained:
        """Write the collaborative model and a file of tensors for each keyword."""
        root.mkdir(parents=True)
        for name, content in {"model": model.cf.model.state_dict(), **tensors}.items():
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, root / f"{name}.safetensors")
        return cls(root)


@dataclass(frozen=True)
class Assembled:
    """An ALLMRec with its LM and soft tokens, and the test users."""

    parts: Any
    lm: Any
    tokenizer: Any
    soft: Any
    likelihood: Any
    eval_users: Any


def assemble(lm, folder: Path, users: int, title: int, **settings) -> Assembled:
    """An ALLMRec on ``lm`` as in a run, in an empty folder, with titles of about ``title`` tokens."""
    from transformers.utils.logging import disable_progress_bar

    from recbole_llm import quick_start
    from recbole_llm.config import LLMConfig

    disable_progress_bar()
    titles, histories = _draw(users, title)
    write_dataset(folder / "words", titles, histories)
    settings |= {"data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "llm_path": str(folder / "lm")}
    config = LLMConfig("ALLMRec", "words", config_dict={**settings, "use_gpu": False, "show_progress": False})
    lm.save_pretrained(folder / "lm")
    _tokenizer(titles, config, lm.config.vocab_size).save_pretrained(folder / "lm")
    run = quick_start.assemble(config)
    model, parts = run.model, run.model.parts
    shape = len(parts.domain.items.names), config["joint_size"]
    codes = {kind: torch.rand(shape, generator=torch.Generator().manual_seed(0)) for kind in ("joint", "text")}
    results = Untrained.of(model, folder / "results", codes=codes)
    causal = parts.backbone.load(results)
    soft = model.projection.soft_tokens(results, causal).requires_grad_(False)
    eval_users = parts.eval_users(run.candidates, "test")
    return Assembled(parts, causal.model, causal.tokenizer, soft, model.projection.likelihood(causal, soft), eval_users)


def _draw(users: int, title: int) -> tuple[list[str], list[list[int]]]:
    draw = random.Random(0)
    spread = title // 4
    titles = [" ".join(draw.choices(WORDS, k=title + draw.randint(-spread, spread))) for _ in range(ITEMS)]
    return titles, [draw.sample(range(ITEMS), draw.randint(25, 50)) for _ in range(users)]


def write_dataset(folder: Path, titles: list[str], histories: list[list[int]]) -> None:
    """The atomic files of a dataset "words", with a title for each item and a history of items for each user."""
    items = [f"{item}\t{title}\n" for item, title in enumerate(titles)]
    rows = [f"{user}\t{item}\t{time}\n" for user, history in enumerate(histories) for time, item in enumerate(history)]
    folder.mkdir()
    (folder / "words.item").write_text("".join(["item_id:token\ttitle:token_seq\n", *items]))
    (folder / "words.inter").write_text("".join(["user_id:token\titem_id:token\ttimestamp:float\n", *rows]))


def _tokenizer(titles: list[str], config, vocab_size: int):
    """Tokens for each word with and without a leading space, as in byte-level vocabularies, and for punctuation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    templates = [*config["prompts"].values(), *(config[key] for key in ("user_text", "history_separator", "candidate_separator"))]
    literals = [*re.split(r"\{\w*\}", "{}".join(templates)), f" {config['noun']} {config['verb']}", "a"]
    words = {word for title in titles for word in title.split(" ")}
    specials = ["<pad>", "<s>", "</s>", "<unk>", *MARKERS]
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=specials)
    tokenizer.train_from_iterator([*literals, *sorted(words), *(f" {word}" for word in sorted(words))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(MARKERS),
        clean_up_tokenization_spaces=False,
    )


class PublishedLoop:
    """Two users at a time: state, prompt text, tokens, soft tokens one by one, greedy ``generate``, a comparison of strings.

    It shares all weights, the template and the codes of the items with ``model``. Answers have ``new_tokens`` tokens, since a
    random LM does not end them.
    """

    def __init__(self, model: Assembled, new_tokens: int):
        self.soft, self.new_tokens, self.domain = model.soft, new_tokens, model.parts.domain
        self.lm, self.tokenizer, self.names = model.lm, model.tokenizer, model.parts.domain.items.names
        self.settings, self.codes = model.parts.prompts, model.soft._codes  # [I, Z]
        self.markers = self.tokenizer.convert_tokens_to_ids(MARKERS)

    def __call__(self, users, histories, candidates, targets) -> list[bool]:
        """Whether each user's answer contains the target."""
        hits = []
        for start in range(0, len(users), 2):
            two = slice(start, start + 2)
            answers = self._answers(users[two], histories[two], candidates[two].tolist())
            hits += [self.names[item] in answer for item, answer in zip(targets[two].tolist(), answers, strict=True)]
        return hits

    def _answers(self, users, histories, candidates) -> list[str]:
        states = self.soft.project_user(self.soft._cf.user_states(users, histories))  # [2, D]
        recent = [history[-self.settings.max_history :] for history in histories]
        texts = [self._text(*lists) for lists in zip(recent, candidates, strict=True)]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = self.lm.get_input_embeddings()(tokens.input_ids)  # [2, L, D]
        for row, (state, *lists) in enumerate(zip(states, recent, candidates, strict=True)):
            vectors = [state[None], *(self.soft.project_item(self.codes[items]) for items in lists)]  # 3 x [N, D]
            for marker, some in zip(self.markers, vectors, strict=True):
                places = (tokens.input_ids[row] == marker).nonzero().flatten().tolist()
                for place, vector in zip(places, some, strict=False):  # a prompt of the history alone has no candidates
                    inputs[row, place] = vector
        found = self.lm.generate(
            inputs_embeds=inputs,
            attention_mask=tokens.attention_mask,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            repetition_penalty=1.5,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)

    def _text(self, history: list[int], candidates: list[int]) -> str:
        parts = (("history", history, HISTORY), ("candidate", candidates, CANDIDATE))
        told, listed = (
            getattr(self.settings, f"{name}_separator").join(f"{self.names[item]}{marker}" for item in items)
            for name, items, marker in parts
        )
        if self.settings.is_continuation:
            told += self.settings.history_separator
        words = {"noun": self.domain.noun, "verb": self.domain.verb}
        # the last blank belongs to the answer
        return self.settings.template.format(user=USER, history=told, candidates=listed, **words).removesuffix(" ")
