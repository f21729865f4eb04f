"""Float32 by two libraries, and bfloat16, on this CPU: ``python benchmarks/precision.py``. One JSON line per comparison.

    product    the shapes of a layer of SmolLM2-135M for 2,048 tokens: by torch's default library, by oneDNN, and in bfloat16.
               Errors are relative (Frobenius norm), against float64
    scoring    a Llama of SmolLM2-135M's shape with random weights scores 20 candidates of 10 tokens after a
               prompt of 300, by `tree`
    training   an optimiser step of that LM's LoRA of rank 16, as in ``finetuning.py``; the LoRA is in float32 either way

Sides are timed alternately and medians are compared; ``times`` is the speed as a multiple of that of float32 by oneDNN.
On a busy machine use one thread and processor time: ``OMP_NUM_THREADS=1 python benchmarks/precision.py --clock cpu``.
"""

import argparse
import copy
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetuning import DROPOUT, SHAPES, build, draw, training  # noqa: E402
from scoring import CLOCKS, report, seconds  # noqa: E402

from recbole_llm.data.prompts import Prompt  # noqa: E402
from recbole_llm.doctor.probe import has_bf16  # noqa: E402
from recbole_llm.llm.causal_lm import read_slices  # noqa: E402
from recbole_llm.llm.lora import attach_lora  # noqa: E402
from recbole_llm.llm.scoring import Scorer  # noqa: E402
from recbole_llm.training.float32 import onednn_is_exact  # noqa: E402

PRODUCTS = {"attention": (2048, 576, 576), "feed-forward, up": (2048, 576, 1536), "feed-forward, down": (2048, 1536, 576)}
USERS, PROMPT, CANDIDATES, ANSWER = 4, 300, 20, 10


def product(x: Tensor, w: Tensor, precision: str) -> Tensor:
    torch.set_float32_matmul_precision(precision)
    return nn.functional.linear(x, w)


def products(rounds: int, clock: str) -> None:
    for name, (rows, inner, out) in PRODUCTS.items():
        x, w = torch.randn(rows, inner), torch.randn(out, inner)
        sides = {
            "default": partial(product, x, w, "highest"),
            "onednn": partial(product, x, w, "medium"),
            "bfloat16": partial(product, x.bfloat16(), w.bfloat16(), "medium"),
        }
        exact = x.double() @ w.double().T
        errors = {side: float((run().double() - exact).norm() / exact.norm()) for side, run in sides.items()}
        taken = seconds(sides, rounds, CLOCKS[clock])
        report(
            "product",
            of=name,
            times={side: taken["onednn"] / taken[side] for side in ("default", "bfloat16")},
            errors={side: f"{error:.1e}" for side, error in errors.items()},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per comparison")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    exact = onednn_is_exact()
    report("setting", threads=torch.get_num_threads(), clock=options.clock, onednn_is_exact=exact, has_bf16=has_bf16())
    products(options.rounds, options.clock)

    torch.set_float32_matmul_precision("medium" if exact else "highest")
    full = build(options.shape, options.layers)
    models = {"float32": full, "bfloat16": copy.deepcopy(full).bfloat16()}
    for model in models.values():
        read_slices(model)  # as in a run
    vocabulary = SHAPES[options.shape]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (USERS, PROMPT + CANDIDATES * ANSWER), generator=generator).tolist()
    prompts = [Prompt(row[:PROMPT]) for row in ids]
    answers = [[row[start : start + ANSWER] for start in range(PROMPT, len(row), ANSWER)] for row in ids]
    sides = {name: partial(Scorer(batch_tokens=2048), model.eval(), prompts, answers) for name, model in models.items()}
    taken = seconds(sides, options.rounds, CLOCKS[options.clock])
    tokens = sum(map(len, ids))
    report("scoring", tokens_per_s={name: tokens / taken[name] for name in models}, times=taken["float32"] / taken["bfloat16"])

    examples = draw(8, vocabulary)
    sides = {}
    for name, model in models.items():
        adapted = attach_lora(model, name="bench", r=16, lora_alpha=32, lora_dropout=DROPOUT, seed=0).train()
        sides[name] = training(adapted, examples, 1024)
    taken = seconds(sides, options.rounds, CLOCKS[options.clock])
    tokens = sum(len(example.row) for example in examples)
    report("training", tokens_per_s={name: tokens / taken[name] for name in models}, times=taken["float32"] / taken["bfloat16"])


if __name__ == "__main__":
    main()
