"""Scoring strategies against what they replace, as ratios measured in one run: ``python benchmarks/scoring.py``.

A random Llama of 2 M parameters reads prompts of 300 tokens and scores 20 candidates of 10 tokens. One JSON line per
comparison. The sides are timed alternately and medians are compared, so that other load on the machine affects both.
On a busy machine use one thread and processor time: ``OMP_NUM_THREADS=1 python benchmarks/scoring.py --clock cpu``.

    shortcut   tree and prefix against naive, and the largest difference of their scores
    limit      tree on the shape of SmolLM2-135M (random weights, 49,152 words), against the token limit: a plain forward pass of
               the LM without lm_head over one row of as many tokens for each user (prompt and fed answer tokens), and lm_head
               on the positions that are read. share is limit / tree; share_without_head leaves lm_head out of the limit.
               `equal`: prompts of 300 tokens, answers of 10; `mixed`: of 200 to 400 and 3 to 17; `shared`: as equal, where
               prompts begin with the same 60 tokens, which the limit counts for each user
    label      candidates listed in the prompt, one label each, against naive over the full titles
    generate   greedy decoding of one answer per user, two users at a time, as A-LLMRec evaluates, against both; for these
               prompts and for those of the builtin LM (45 tokens, titles of 4)
    allmrec    ALLMRec's evaluation, from histories to scores, against A-LLMRec's published evaluation loop on the same LM,
               prompts and soft tokens; with answers that end after a title, and at the published max_length.
               times_limit is the ratio for a scorer that only reads the prompts, prompt_share its share of our time,
               max_diff the largest difference between the prompts that the two sides read
    linear     tree's seconds for 1, 2 and 4 times the candidates, and the users
    memory     growth of the peak resident size from few to many users, each in a process of its own
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allmrec import PublishedLoop, assemble  # noqa: E402
from token_limit import LAYERS, token_limits  # noqa: E402

from recbole_llm.data.prompts import Prompt  # noqa: E402
from recbole_llm.llm.scoring import Scorer  # noqa: E402

VOCABULARY, PROMPT, CANDIDATES, ANSWER = 1500, 300, 20, 10
MAX_LENGTH = 512  # of prompt and answer, as published
NEW_TOKENS = (16, MAX_LENGTH - PROMPT)  # a title, and an answer without an end
BUILTIN = (45, 4)
ALLMREC = {"published": (9, {}), "builtin": (4, {"llm": "builtin"})}  # prompt: tokens of a title, settings
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def draw(users: int, candidates: int = CANDIDATES, prompt: int = PROMPT, answer: int = ANSWER):
    tokens = torch.Generator().manual_seed(users)
    prompts = torch.randint(3, VOCABULARY, (users, prompt), generator=tokens).tolist()
    answers = torch.randint(3, VOCABULARY, (users, candidates, answer), generator=tokens).tolist()
    return [Prompt(ids) for ids in prompts], answers


def seconds(sides: Mapping[Any, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[Any, float]:
    """Median seconds of each side; sides alternate within a round, and the first round is a warm-up."""
    times: dict[Any, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(name: str, **figures: object) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"benchmark": name, **rounded}), flush=True)


def resident(name: str = "VmHWM") -> int:
    """Bytes of this process (Linux); ``getrusage`` instead begins with the parent's peak."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def shortcuts(model, users: int, *timing) -> None:
    prompts, answers = draw(users)
    labels = [[answer[:1] for answer in row] for row in answers]
    sides = {
        name: lambda name=name: Scorer(name)(model, prompts, labels if name == "label" else answers)
        for name in ("naive", "prefix", "tree", "label")
    }
    taken = seconds(sides, *timing)
    oracle = sides["naive"]()
    for name in ("prefix", "tree"):
        difference = float((sides[name]() - oracle).abs().max())
        report(name, times_naive=taken["naive"] / taken[name], users_per_s=users / taken[name], max_diff=difference)
    report("label", times_naive=taken["naive"] / taken["label"], users_per_s=users / taken["label"])


def generation(model, users: int, new_tokens: int, lengths: tuple[int, int], *timing) -> None:
    prompts, answers = draw(users, CANDIDATES, *lengths)
    labels = [[answer[:1] for answer in row] for row in answers]

    def generate():
        for start in range(0, users, 2):
            ids = torch.tensor([prompt.ids for prompt in prompts[start : start + 2]])  # [2, L]
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                repetition_penalty=1.5,
            )

    taken = seconds(
        {
            "generate": generate,
            "tree": lambda: Scorer("tree")(model, prompts, answers),
            "label": lambda: Scorer("label")(model, prompts, labels),
        },
        *timing,
    )
    report(
        "generate",
        users_per_s=users / taken["generate"],
        tree_times=taken["generate"] / taken["tree"],
        label_times=taken["generate"] / taken["label"],
        prompt=lengths[0],
        answer=lengths[1],
        new_tokens=new_tokens,
    )


def allmrec(lm, users: int, prompt: str, *timing) -> None:
    title, settings = ALLMREC[prompt]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        model = assemble(lm, Path(folder), max(users, 50), title, **settings)  # enough for every item to occur
        batch = model.eval_users.draw(users)
        scored = partial(model.likelihood, batch.histories, batch.candidates, batch.users)
        read = prompt_calls(model.lm, scored)
        seen, theirs = prompts_of(read), prompts_of(prompt_calls(model.lm, lambda: PublishedLoop(model, 1)(*batch)))
        difference = max(nearest(row, theirs) for row in seen)
        if len(seen) != len(theirs) or difference > 1e-4:
            raise AssertionError(f"{prompt}: both sides must read the same prompts, but they differ by {difference}")
        lengths = [len(row) for row in seen]
        lasting = {"title": title + 1, "max_length": MAX_LENGTH - max(lengths)}
        sides = {name: partial(PublishedLoop(model, new_tokens), *batch) for name, new_tokens in lasting.items()}
        sides |= {"ours": scored, "prompts": lambda: [model.lm(**call) for call in read]}
        taken = seconds(sides, *timing)
    for name, new_tokens in lasting.items():
        report(
            "allmrec",
            prompts=prompt,
            answer_ends=name,
            times_published=taken[name] / taken["ours"],
            times_limit=taken[name] / taken["prompts"],
            users_per_s=users / taken["ours"],
            published_users_per_s=users / taken[name],
            prompt_share=taken["prompts"] / taken["ours"],
            prompt=statistics.mean(lengths),
            new_tokens=new_tokens,
            max_diff=difference,
        )


def prompt_calls(lm, run: Callable[[], object]) -> list[dict]:
    """The arguments of each call of ``lm`` with embeddings during ``run``."""
    calls: list[dict] = []

    def note(_, __, arguments):
        if arguments.get("inputs_embeds") is not None:
            calls.append({key: value for key, value in arguments.items() if key != "past_key_values"})

    hook = lm.register_forward_pre_hook(note, with_kwargs=True)
    run()
    hook.remove()
    return calls


def prompts_of(calls: list[dict]) -> list[torch.Tensor]:
    """The rows [L, D] of such calls, without padding."""
    rows = []
    for call in calls:
        inputs, mask = call["inputs_embeds"], call.get("attention_mask")  # [B, L, D]; generate drops a mask of ones
        rows += list(inputs) if mask is None else [row[real.bool()] for row, real in zip(inputs, mask, strict=True)]
    return rows


def nearest(row: torch.Tensor, rows: list[torch.Tensor]) -> float:
    """Largest difference of ``row`` [L, D] from the most similar of ``rows``; infinite if all have other lengths."""
    return min((float((row - other).abs().max()) for other in rows if len(other) == len(row)), default=float("inf"))


def linearity(model, users: int, *timing) -> None:
    for what, sizes in (
        ("candidates", [(users, CANDIDATES * k) for k in (1, 2, 4)]),
        ("users", [(users * k, CANDIDATES) for k in (1, 2, 4)]),
    ):
        data = {f"{size}": draw(*size) for size in sizes}
        taken = seconds({name: lambda pair=pair: Scorer("tree")(model, *pair) for name, pair in data.items()}, *timing)
        first, *rest = taken.values()
        report("linear", grows=what, sizes=[1, 2, 4], seconds_relative=[1.0, *(round(t / first, 2) for t in rest)])


def peak_memory(users: int) -> float:
    """Peak resident MB of a fresh process that scores ``users``."""
    command = [sys.executable, __file__, "--memory-probe", str(users)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8, help="users per timed call")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per comparison")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of SmolLM2's shape in `limit`")
    parser.add_argument("--only", choices=("limit",), help="this comparison alone")
    parser.add_argument("--memory-probe", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = build_model()
    with torch.no_grad():
        if options.memory_probe:
            Scorer("tree")(model, *draw(options.memory_probe))
            print(resident() / 2**20)
            return
        timing = options.rounds, CLOCKS[options.clock]
        report(
            "setting",
            parameters=sum(p.numel() for p in model.parameters()),
            prompt=PROMPT,
            answer=ANSWER,
            candidates=CANDIDATES,
            clock=options.clock,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        for figures in token_limits(options.users, options.layers, CANDIDATES, lambda sides: seconds(sides, *timing)):
            report("limit", **figures)
        if options.only:
            return
        shortcuts(model, options.users, *timing)
        for new_tokens in NEW_TOKENS:
            generation(model, options.users, new_tokens, (PROMPT, ANSWER), *timing)
        generation(model, options.users, NEW_TOKENS[0], BUILTIN, *timing)
        for prompt in ALLMREC:
            allmrec(model, options.users, prompt, *timing)
        linearity(model, options.users, *timing)
    few, many = 4 * options.users, 32 * options.users
    before, after = peak_memory(few), peak_memory(many)
    report("memory", users=[few, many], peak_mb=[round(before), round(after)], growth=after / before)


if __name__ == "__main__":
    main()
