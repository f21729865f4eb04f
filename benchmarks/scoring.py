"""Scoring strategies against what they replace, as ratios measured in one run: ``python benchmarks/scoring.py``.

A random Llama of 2 M parameters reads prompts of 300 tokens and scores 20 candidates of 10 tokens. One JSON line per
comparison. The sides are timed in turn, round after round, so that a noisy machine troubles both; medians are compared.
On a crowded machine use one thread and processor time: ``OMP_NUM_THREADS=1 python benchmarks/scoring.py --clock cpu``.

    shortcut   tree and prefix against naive, and the largest difference of their scores
    letter     candidates listed in the prompt, one label each, against naive over the full titles
    generate   greedy decoding of one answer per user, two users at a time, as A-LLMRec evaluates, against both; for these
               prompts and for those of the builtin LM (45 tokens, titles of 4)
    linear     tree's seconds for 1, 2 and 4 times the candidates, and the users
    memory     growth of the peak resident size from few to many users, each in a process of its own
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recbole_llm.backbone.scoring import Scorer  # noqa: E402

VOCABULARY, PROMPT, CANDIDATES, ANSWER = 1500, 300, 20, 10
NEW_TOKENS = (16, 212)  # a title, and an answer that does not end before the published max_length of 512
BUILTIN = (45, 4)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=6, max_position_embeddings=1024, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def draw(users: int, candidates: int = CANDIDATES, prompt: int = PROMPT, answer: int = ANSWER):
    tokens = torch.Generator().manual_seed(users)
    prompts = torch.randint(3, VOCABULARY, (users, prompt), generator=tokens).tolist()
    answers = torch.randint(3, VOCABULARY, (users, candidates, answer), generator=tokens).tolist()
    return prompts, answers


def seconds(sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each side; sides alternate within a round, the first round is a rehearsal."""
    times: dict[str, list[float]] = {name: [] for name in sides}
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


def shortcuts(model, users: int, *timing) -> None:
    prompts, answers = draw(users)
    labels = [[answer[:1] for answer in row] for row in answers]
    sides = {name: lambda name=name: Scorer(name)(model, prompts, labels if name == "letter" else answers)
             for name in ("naive", "prefix", "tree", "letter")}
    taken = seconds(sides, *timing)
    oracle = sides["naive"]()
    for name in ("prefix", "tree"):
        difference = float((sides[name]() - oracle).abs().max())
        report(name, times_naive=taken["naive"] / taken[name], users_per_s=users / taken[name], max_diff=difference)
    report("letter", times_naive=taken["naive"] / taken["letter"], users_per_s=users / taken["letter"])


def generation(model, users: int, new_tokens: int, lengths: tuple[int, int], *timing) -> None:
    prompts, answers = draw(users, CANDIDATES, *lengths)
    labels = [[answer[:1] for answer in row] for row in answers]

    def generate():
        for start in range(0, users, 2):
            ids = torch.tensor(prompts[start:start + 2])  # [2, L]
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
                           max_new_tokens=new_tokens, min_new_tokens=new_tokens, repetition_penalty=1.5)

    taken = seconds({"generate": generate, "tree": lambda: Scorer("tree")(model, prompts, answers),
                     "letter": lambda: Scorer("letter")(model, prompts, labels)}, *timing)
    report("generate", users_per_s=users / taken["generate"], tree_times=taken["generate"] / taken["tree"],
           letter_times=taken["generate"] / taken["letter"], prompt=lengths[0], answer=lengths[1], new_tokens=new_tokens)


def linearity(model, users: int, *timing) -> None:
    for what, sizes in (("candidates", [(users, CANDIDATES * k) for k in (1, 2, 4)]),
                        ("users", [(users * k, CANDIDATES) for k in (1, 2, 4)])):
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
    parser.add_argument("--memory-probe", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = build_model()
    with torch.no_grad():
        if options.memory_probe:
            Scorer("tree")(model, *draw(options.memory_probe))
            # not ru_maxrss, which starts at the parent's
            peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            print(int(peak.split()[1]) / 1024)
            return
        timing = options.rounds, CLOCKS[options.clock]
        report("setting", parameters=sum(p.numel() for p in model.parameters()), prompt=PROMPT, answer=ANSWER,
               candidates=CANDIDATES, clock=options.clock, threads=torch.get_num_threads(), torch=torch.__version__)
        shortcuts(model, options.users, *timing)
        for new_tokens in NEW_TOKENS:
            generation(model, options.users, new_tokens, (PROMPT, ANSWER), *timing)
        generation(model, options.users, NEW_TOKENS[0], BUILTIN, *timing)
        linearity(model, options.users, *timing)
    few, many = 4 * options.users, 32 * options.users
    before, after = peak_memory(few), peak_memory(many)
    report("memory", users=[few, many], peak_mb=[round(before), round(after)], growth=after / before)


if __name__ == "__main__":
    main()
