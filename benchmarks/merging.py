"""Merging against other implementations, as ratios measured in one run: ``python benchmarks/merging.py``.

A random Llama (8 layers, 512 wide, 26 M parameters) with K LoRA adapters of rank 16 on every linear layer. One JSON
line per comparison. Times are CPU seconds of one thread; sides are timed alternately and medians are compared.

    step     one entropy-gradient step on the coefficients: through ``scaling``, against rebuilding W0 + sum_i w_i dW_i
             with full deltas (AdaMerging, FusionBench); for one coefficient per adapter and one per module
    memory   growth of the peak resident size over two such steps, each way in a process of its own (Linux)
    folded   inference with the merged adapter folded into the base, against a single adapter folded
    linear   seconds, and peak MiB beyond inputs and output, of the exact sum, of ties and of dare for 1, 2, 4 and 8
             adapters, with the exponents of their growth
    width    the same for two adapters of one square matrix of 1,024, 2,048 and 4,096, against summing dense deltas
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # messages of the profiler
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scoring import report, resident, seconds  # noqa: E402

from recbole_llm.llm.adapter_folders import Adapter, read_adapter  # noqa: E402
from recbole_llm.llm.lora import AdapterView, attach_lora, load_adapters, lora_modules, save_adapter  # noqa: E402
from recbole_llm.merging.arithmetic import all_modules, weighted_sum, write_adapter  # noqa: E402
from recbole_llm.merging.coefficients import MergeProblem  # noqa: E402
from recbole_llm.merging.objectives import token_entropies  # noqa: E402
from recbole_llm.merging.stage import resolve  # noqa: E402

VOCABULARY, LAYERS, BATCH, LENGTH, RANK = 1500, 8, 4, 128, 16


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, tie_word_embeddings=True, **sizes))
    return model.eval().requires_grad_(False)


def write_adapters(root: Path, count: int) -> dict[str, Path]:
    """``count`` adapters with random B, on disk."""
    model = build_model()
    for i in range(count):
        name = f"e{i}"
        model = attach_lora(model, name=name, r=RANK, lora_alpha=32, lora_dropout=0.0, seed=i)
        for layer in lora_modules(model).values():
            layer.lora_B[name].weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(i))
        save_adapter(model, name, root / name)
    return {f"e{i}": root / f"e{i}" for i in range(count)}


def through_scaling(folders: dict[str, Path]) -> Callable[[torch.Tensor], torch.Tensor]:
    """This package: weights ``[K]`` or ``[M, K]`` -> entropy, with coefficients in peft's scaling."""
    live = load_adapters(build_model(), folders)
    problem = MergeProblem(list(folders), list(lora_modules(live)), "module")

    def entropy(weights: torch.Tensor) -> torch.Tensor:
        view = AdapterView(live, problem.by_name(weights))
        return token_entropies(view(input_ids=IDS, logits_to_keep=1).logits).mean()

    return entropy


def by_rebuilding(folders: dict[str, Path]) -> Callable[[torch.Tensor], torch.Tensor]:
    """AdaMerging: stores the K full deltas and rebuilds every weight in every step."""
    model = build_model()
    adapters = [read_adapter(folder) for folder in folders.values()]
    deltas = {}
    for module in lora_modules(load_adapters(build_model(), {"e0": folders["e0"]})):
        pairs = [adapter.factors(module) for adapter in adapters]
        deltas[f"{module}.weight"] = torch.stack([b @ a for a, b in pairs])  # [K, D_out, D_in]
    base = dict(model.named_parameters())

    def entropy(weights: torch.Tensor) -> torch.Tensor:
        rows = weights.expand(len(deltas), -1)  # [M, K]
        rebuilt = {
            key: base[key] + sum(w * d for w, d in zip(row, delta, strict=True))
            for row, (key, delta) in zip(rows, deltas.items(), strict=True)
        }
        out = torch.func.functional_call(model, rebuilt, kwargs={"input_ids": IDS, "logits_to_keep": 1})
        return token_entropies(out.logits).mean()

    return entropy


WAYS = {"scaling": through_scaling, "rebuild": by_rebuilding}
IDS = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))  # [B, L]


def gradient(entropy: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    weights = torch.full(shape, 1 / shape[-1], requires_grad=True)
    return torch.autograd.grad(entropy(weights), weights)[0]


def step(folders: dict[str, Path], rounds: int) -> None:
    count = len(folders)
    entropies = {name: way(folders) for name, way in WAYS.items()}
    for granularity, shape in (("global", (count,)), ("module", (7 * LAYERS, count))):
        ours, theirs = (gradient(entropies[name], shape) for name in WAYS)
        sides = {name: lambda e=e, s=shape: gradient(e, s) for name, e in entropies.items()}
        took = seconds(sides, rounds, time.process_time)
        report(
            "step",
            granularity=granularity,
            adapters=count,
            scaling_s=took["scaling"],
            rebuild_s=took["rebuild"],
            speedup=took["rebuild"] / took["scaling"],
            gradient_difference=float((ours - theirs).norm() / theirs.norm()),
        )


def memory(root: Path, count: int) -> None:
    grown = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--memory-of", way, "--root", str(root), "--adapters", str(count)]
        grown[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    sizes = {f"{way}_mib": round(mib) for way, mib in grown.items()}
    report("memory", adapters=count, **sizes, ratio=grown["rebuild"] / grown["scaling"])


def memory_of(way: str, folders: dict[str, Path]) -> float:
    """MiB by which the peak grows from the bare model to two finished steps."""
    with torch.no_grad():
        build_model()(input_ids=IDS, logits_to_keep=1)  # allocates the buffers of libraries
    before = resident()
    entropy = WAYS[way](folders)
    for _ in range(2):
        gradient(entropy, (len(folders),))
    return (resident() - before) / 2**20


def folded(folders: dict[str, Path], root: Path, rounds: int) -> None:
    adapters = [read_adapter(folder) for folder in folders.values()]
    merged = weighted_sum(adapters, torch.full((len(adapters),), 1 / len(adapters)))
    write_adapter(merged, root / "merged", {})
    models = {
        name: load_adapters(build_model(), {"m": folder}).merge_and_unload()
        for name, folder in (("merged", root / "merged"), ("single", folders["e0"]))
    }
    with torch.no_grad():
        sides = {name: lambda m=m: m(input_ids=IDS) for name, m in models.items()}
        took = seconds(sides, 5 * rounds, time.process_time)
    times = {f"{name}_s": taken for name, taken in took.items()}
    report("folded", adapters=len(adapters), **times, ratio=took["merged"] / took["single"])


def linear(folders: dict[str, Path], rounds: int) -> None:
    counts, pattern = (1, 2, 4, 8), read_adapter(folders["e0"])
    adapters = [like(pattern, seed) for seed in range(max(counts))]
    mib = sum(tensor.nbytes for tensor in pattern.tensors.values()) / 2**20
    for method in ("sum", "ties", "dare"):
        sides = {n: lambda n=n, method=method: merged(method, adapters[:n]) for n in counts}
        report("linear", method=method, adapter_mib=round(mib, 1), **growth(sides, rounds))


def width(rounds: int) -> None:
    pairs = {size: [square(size, seed) for seed in range(2)] for size in (1024, 2048, 4096)}
    for method in ("sum", "ties", "dare", "dense"):
        sides = {size: lambda pair=pair, method=method: merged(method, pair) for size, pair in pairs.items()}
        report("width", method=method, adapters=2, rank=RANK, **growth(sides, rounds))


def merged(method: str, adapters: list[Adapter]) -> list[torch.Tensor]:
    if method == "dense":
        pairs = ([adapter.factors(module) for adapter in adapters] for module in adapters[0].modules)
        return [sum(0.5 * b @ a for a, b in pair) for pair in pairs]
    if method == "sum":
        return list(weighted_sum(adapters, torch.full((len(adapters),), 0.5)).tensors.values())
    problem = MergeProblem([a.name for a in adapters], all_modules(adapters), adapters=adapters)
    return list(resolve(method)(problem).merged.tensors.values())


def like(pattern: Adapter, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(t.shape, generator=generator) for key, t in pattern.tensors.items()}
    return Adapter(pattern.config, tensors, f"v{seed}")


def square(size: int, seed: int) -> Adapter:
    shapes = {"A": (RANK, size), "B": (size, RANK)}
    tensors = {f"base_model.model.wide.lora_{f}.weight": torch.empty(shape) for f, shape in shapes.items()}
    return like(Adapter({"r": RANK, "lora_alpha": 32, "target_modules": ["wide"]}, tensors, "wide"), seed)


def growth(sides: dict[int, Callable[[], list[torch.Tensor]]], rounds: int) -> dict[str, object]:
    """Seconds and MiB of each side, and the exponents between the first and the last."""
    measured = {
        "seconds": seconds(sides, rounds, time.process_time),
        "extra_mib": {size: extra_mib(side) for size, side in sides.items()},
    }
    few, many = min(sides), max(sides)
    found: dict[str, object] = {}
    for what, values in measured.items():
        found[what] = {size: float(f"{value:.3g}") for size, value in values.items()}
        found[f"{what}_exponent"] = math.log(values[many] / values[few]) / math.log(many / few)
    return found


def extra_mib(side: Callable[[], list[torch.Tensor]]) -> float:
    """Peak allocation by torch on the CPU while a side runs, without its result."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = sum(tensor.nbytes for tensor in side())
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        level += change.nbytes()
        peak = max(peak, level)
    return (peak - result) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        folders = {f"e{i}": options.root / f"e{i}" for i in range(options.adapters)}
        print(memory_of(options.memory_of, folders))
        return
    with tempfile.TemporaryDirectory() as root:
        folders = write_adapters(Path(root), options.adapters)
        step(folders, options.rounds)
        memory(Path(root), options.adapters)
        folded(folders, Path(root), options.rounds)
        linear(folders, options.rounds)
        width(20 * options.rounds)  # milliseconds each


if __name__ == "__main__":
    main()
