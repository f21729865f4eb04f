"""LoRA training against the matrix products that it needs: ``python benchmarks/finetuning.py``.

A Llama of SmolLM2-135M's shape with random weights (no file is needed) learns rows of 128 to 256 tokens, nearly all of which are
answers, with a LoRA of rank 16 on all linear layers and dropout. One JSON line per comparison. The sides are timed alternately
and medians are compared, so that other load on the machine affects both.
On a busy machine use one thread and processor time: ``OMP_NUM_THREADS=1 python benchmarks/finetuning.py --clock cpu``.

    limit      GFLOP/s of the products with the frozen weights alone: each layer's forward product and that for the gradient of
               its input, on matrices of the sizes that occur
    training   an optimiser step as the package computes it: real tokens per second, the GFLOP/s of those products, and their
               share of the limit (share); with_adapter: likewise with the products of the adapter, which have rank 16.
               times_transformers: against the same rows in batches of the same number of rows, in the order in which they
               come, with peft's own dropout and the loss of ``transformers``
    parts      the shares of the step that dropout and the adapter take, measured without them, and the share of the limit that
               passes through the frozen LM alone reach
"""

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scoring import CLOCKS, report, seconds  # noqa: E402

from recbole_llm.data.prompts import Example, Prompt  # noqa: E402
from recbole_llm.llm.forward import lm_loss  # noqa: E402
from recbole_llm.llm.lora import attach_lora, lora_modules  # noqa: E402
from recbole_llm.llm.micro_batches import parts  # noqa: E402
from recbole_llm.training.loop import LoopOptions, Part, TrainingLoop, weighted

SHAPES = {  # of SmolLM2-135M, and one for trying the benchmark
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152),
    "tiny": dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, vocab_size=500),
}
PROMPT, LENGTHS, DROPOUT, PAD = 8, (128, 256), 0.05, 0


def build(shape: str, layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = SHAPES[shape] | {"num_hidden_layers": layers, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)


def draw(rows: int, vocabulary: int) -> list[Example]:
    drawn = random.Random(0)
    lengths = [drawn.randint(*LENGTHS) for _ in range(rows)]
    ids = [[drawn.randrange(3, vocabulary) for _ in range(length)] for length in lengths]
    return [Example.of(Prompt(row[:PROMPT]), row[PROMPT:]) for row in ids]


def training(model, examples: list[Example], tokens: int) -> Callable[[], object]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(_: int) -> Iterator[Part]:
        for batch, share in parts(examples, tokens):
            yield weighted(share, lm_loss, model, batch)

    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0)
    loop = TrainingLoop("benchmark", parameters, optimizer, loss, 10**9, options=LoopOptions(show_progress=False))
    return loop._step


def plain(model, examples: list[Example], rows: int) -> None:
    """The same step with peft's dropout, batches in order, a mask, and all logits."""
    with replaced(model, lambda: nn.Dropout(DROPOUT)):
        for i in range(0, len(examples), rows):
            batch = examples[i : i + rows]
            longest = max(len(example.row) for example in batch)
            ids = torch.tensor([[*one.row.ids, *[PAD] * (longest - len(one.row))] for one in batch])
            mask = torch.tensor([[1] * len(one.row) + [0] * (longest - len(one.row)) for one in batch])
            answers = torch.tensor([[*one.mask, *[0] * (longest - len(one.row))] for one in batch])
            labels = ids.masked_fill(answers == 0, -100)
            (model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss).backward()
    model.zero_grad()


@contextmanager
def replaced(model, dropout: Callable[[], nn.Module]) -> Iterator[None]:
    """The LoRA layers with another dropout."""
    layers = list(lora_modules(model).values())
    before = [layer.lora_dropout["bench"] for layer in layers]
    for layer in layers:
        layer.lora_dropout["bench"] = dropout()
    yield
    for layer, own in zip(layers, before, strict=True):
        layer.lora_dropout["bench"] = own


def without(model, step: Callable[[], object]) -> None:
    with replaced(model, nn.Identity):
        step()


def bare(model, examples: list[Example], tokens: int) -> None:
    """Forward and backward pass through the frozen LM alone, to its input."""
    with model.disable_adapter():
        base = model.get_base_model()
        soft = torch.zeros(1, base.config.hidden_size, requires_grad=True)
        rows = [example._replace(row=Prompt(example.row.ids, {0: 0})) for example in examples]
        for batch, share in parts(rows, tokens):
            (share * lm_loss(base, batch, soft=soft)).backward()


def products(model, sizes: list[tuple[int, int]], *, adapter: bool = False) -> Callable[[], object]:
    """The products with the frozen weights for parts of so many padded tokens, so many of which are answers.

    adapter: those of the adapter too: two forward, and two for each gradient.
    """
    base, layers = model.get_base_model(), lora_modules(model).values()
    weights = [layer.get_base_layer().weight for layer in layers]
    down = [layer.lora_A["bench"].weight.detach() if adapter else None for layer in layers]
    up = [layer.lora_B["bench"].weight.detach() if adapter else None for layer in layers]
    head, most = base.get_output_embeddings().weight, max(tokens for tokens, _ in sizes)
    widest = max(max(weight.shape) for weight in (*weights, head) if weight is not head)
    wide, logits = torch.randn(most * widest), torch.randn(most, len(head))

    def run() -> None:
        for tokens, answers in sizes:
            for weight, a, b in zip(weights, down, up, strict=True):
                out, inner = weight.shape
                x, slope = wide[: tokens * inner].view(tokens, inner), wide[: tokens * out].view(tokens, out)
                nn.functional.linear(x, weight)
                slope @ weight
                if a is not None and b is not None:
                    low, under = nn.functional.linear(x, a), slope @ b
                    nn.functional.linear(low, b)
                    under @ a, under.T @ x, slope.T @ low
            for start in range(0, answers, 256):
                some = min(256, answers - start)
                nn.functional.linear(wide[: some * head.shape[1]].view(some, -1), head)
                logits[:some] @ head

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8, help="training examples of an optimiser step")
    parser.add_argument("--tokens", type=int, default=1024, help="padded tokens of a part (train_batch_tokens)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per comparison")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = attach_lora(
        build(options.shape, options.layers), name="bench", r=16, lora_alpha=32, lora_dropout=DROPOUT, seed=0
    ).train()
    examples = draw(options.rows, SHAPES[options.shape]["vocab_size"])
    cut = [batch for batch, _ in parts(examples, options.tokens)]
    sizes = [(len(batch) * (max(len(one.row) for one in batch) - 1), sum(sum(one.mask) for one in batch)) for batch in cut]
    real = sum(len(example.row) for example in examples)
    head = model.get_base_model().get_output_embeddings().weight.numel()
    layers = sum(layer.get_base_layer().weight.numel() for layer in lora_modules(model).values())
    gflop = 4e-9 * sum(tokens * layers + answers * head for tokens, answers in sizes)
    report(
        "setting",
        parameters=layers + head,
        rows=options.rows,
        real_tokens=real,
        padded_tokens=[tokens for tokens, _ in sizes],
        clock=options.clock,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    step = training(model, examples, options.tokens)
    sides = {
        "products": products(model, sizes),
        "with adapter": products(model, sizes, adapter=True),
        "training": step,
        "transformers": partial(plain, model, examples, max(map(len, cut))),
        "no dropout": partial(without, model, step),
        "no adapter": partial(bare, model, examples, options.tokens),
    }
    taken = seconds(sides, options.rounds, CLOCKS[options.clock])
    report("limit", gflop_per_s=gflop / taken["products"], tokens_per_s=real / taken["products"])
    report(
        "training",
        tokens_per_s=real / taken["training"],
        gflop_per_s=gflop / taken["training"],
        share=taken["products"] / taken["training"],
        with_adapter=taken["with adapter"] / taken["training"],
        times_transformers=taken["transformers"] / taken["training"],
    )
    whole = taken["training"]
    dropout, adapter = whole - taken["no dropout"], taken["no dropout"] - taken["no adapter"]
    report(
        "parts", dropout=dropout / whole, adapter=adapter / whole, share_without_adapter=taken["products"] / taken["no adapter"]
    )


if __name__ == "__main__":
    main()
