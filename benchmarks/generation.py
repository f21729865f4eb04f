"""The papers' generation loops against likelihood scoring, as ratios measured in one run: ``python benchmarks/generation.py``.

Both sides have the same LM, prompts and users. One JSON line per comparison; the sides are timed alternately and medians are
compared. On a busy machine use one thread and processor time: ``OMP_NUM_THREADS=1 python benchmarks/generation.py --clock cpu``.

    reccocktail  greedy decoding of one user at a time, to the end of the answer or 800 tokens (vLLM's batching is not measured)
    allmrec      greedy decoding of two users at a time with a repetition penalty of 1.5, to the end or 512 tokens
    ours         log P of all 20 candidates by ``tree``

By default the LM has the shape of SmolLM2-135M and random weights. Prompts have 450 tokens, as list-wise ones of ml-100k. Answers
are as long as one title, as five titles, and (``--limits``) as the papers allow. With ``--llm_path=FOLDER``, a chat model answers
list-wise prompts of ml-100k, and an answer ends where the model ends it, or after ``--most`` tokens.

``limit`` is the largest possible ratio, that of a scorer which only reads the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scoring import CLOCKS, report, seconds  # noqa: E402

from recbole_llm.data.prompts import Prompt  # noqa: E402
from recbole_llm.llm.scoring import Scorer  # noqa: E402

PROMPT, CANDIDATES, TITLE = 450, 20, 9
ANSWERS = {"one title": TITLE + 1, "five titles": 5 * (TITLE + 2)}
LOOPS = {"reccocktail": (1, 1.0, 800), "allmrec": (2, 1.5, 512)}  # users at a time, repetition penalty, longest answer


@dataclass(frozen=True)
class Task:
    """An LM, and its users' prompts and candidates."""

    lm: Any
    prompts: Sequence[Prompt]
    ours: Callable[[], object]
    ends: int | None = None  # the token that ends an answer; None: all answers are of the greatest length

    def generate(self, batch: int, penalty: float, most: int) -> list[int]:
        """Greedy answers to the prompts, ``batch`` of them at a time; returns their lengths."""
        lengths = []
        for start in range(0, len(self.prompts), batch):
            rows = [torch.tensor(prompt.ids) for prompt in self.prompts[start : start + batch]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
            found = self.lm.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                repetition_penalty=penalty,
                max_new_tokens=most,
                min_new_tokens=most if self.ends is None else None,
                eos_token_id=self.ends,
                pad_token_id=0,
            )[:, ids.size(1) :].tolist()
            lengths += [row.index(self.ends) + 1 if self.ends in row else len(row) for row in found]
        return lengths

    def read(self) -> None:
        """The prompts alone."""
        for prompt in self.prompts:
            self.lm(torch.tensor([prompt.ids]), use_cache=True, logits_to_keep=1)


def random_task(users: int) -> Task:
    """A random LM of SmolLM2-135M's shape and random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    lm = LlamaForCausalLM(config).eval().requires_grad_(False)
    prompts = [Prompt(ids) for ids in torch.randint(3, 49_152, (users, PROMPT)).tolist()]
    answers = torch.randint(3, 49_152, (users, CANDIDATES, TITLE)).tolist()
    return Task(lm, prompts, lambda: Scorer("tree", batch_tokens=2048)(lm, prompts, answers))


def real_task(path: str, users: int, folder: str) -> Task:
    """A chat model from a folder, and TALLRec's prompts for test users of ml-100k."""
    from recbole_llm import quick_start
    from recbole_llm.config import LLMConfig

    settings = {"llm_path": path, "chat": True, "checkpoint_dir": folder, "use_gpu": False, "max_prompt_tokens": 1536}
    run = quick_start.assemble(LLMConfig("TALLRec", "ml-100k", config_dict=settings))
    parts = run.model.parts
    causal = parts.backbone.load(run.trainer.cache)
    drawn, likelihood = parts.eval_users(run.candidates, "test").draw(users), parts.likelihood(causal)
    prompts = likelihood.prompts_of(drawn.histories, drawn.candidates)
    ours = lambda: likelihood(drawn.histories, drawn.candidates, drawn.users)  # noqa: E731
    return Task(causal.model, prompts, ours, int(causal.tokenizer.eos_token_id))


def compare(task: Task, loop: str, answer: str, most: int, *timing: Any) -> None:
    batch, penalty, _ = LOOPS[loop]
    lengths: list[int] = []

    def generate() -> None:
        lengths[:] = task.generate(batch, penalty, most)

    taken = seconds({"published": generate, "ours": task.ours, "prompts": task.read}, *timing)
    users = len(task.prompts)
    report(
        loop,
        answer=answer,
        new_tokens=statistics.mean(lengths),
        prompt=statistics.mean(map(len, task.prompts)),
        users_at_a_time=batch,
        published_users_per_s=users / taken["published"],
        users_per_s=users / taken["ours"],
        times_published=taken["published"] / taken["ours"],
        limit=taken["published"] / taken["prompts"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm_path", help="folder of a chat model; a random LM without it")
    parser.add_argument("--users", type=int, default=4, help="users per timed call")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per comparison")
    parser.add_argument("--limits", action="store_true", help="also answers of 800 and 512 tokens, which take minutes")
    parser.add_argument("--most", type=int, help="longest answer of --llm_path, if shorter than the paper's")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    timing = options.rounds, CLOCKS[options.clock]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        task = real_task(options.llm_path, options.users, folder) if options.llm_path else random_task(options.users)
        report("setting", users=options.users, clock=options.clock, threads=torch.get_num_threads(), torch=torch.__version__)
        for loop, (_, _, longest) in LOOPS.items():
            answers = {"its own end": min(longest, options.most or longest)} if options.llm_path else dict(ANSWERS)
            if options.limits and not options.llm_path:
                answers["the paper's limit"] = longest
            for answer, most in answers.items():
                compare(task, loop, answer, most, *timing)


if __name__ == "__main__":
    main()
