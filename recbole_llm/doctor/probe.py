"""A program of its own: import the modules that are named, one after the other, and say what happens and what devices there are.

It is run as a file, ``python probe.py torch peft ...``, so that a module that ends the process does not end the doctor. A line of
its output is a JSON object: ``{"importing": NAME}``, ``{"failed": NAME, "why": TEXT}``, at the end ``{"devices": {...}}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence


def say(**what: object) -> None:
    """Print one line at once: the next import may be the last."""
    print(json.dumps(what), flush=True)


def has_bf16() -> bool:
    """Whether the CPU has instructions for products in bfloat16 (AVX512-BF16 or AMX), as torch sees it."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public; absent from some builds
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def devices() -> dict[str, object]:
    """What torch computes with: threads, whether the CPU has bfloat16, and name, memory (bytes), bfloat16 of each accelerator."""
    import torch

    found: dict[str, object] = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "accelerators": []}
    found["bf16"] = has_bf16()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        found["accelerators"] = [[card.name, card.total_memory, torch.cuda.is_bf16_supported()] for card in cards]
    return found


def main(names: Sequence[str]) -> None:
    """Import the named modules."""
    for name in names:
        say(importing=name)
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever a broken package raises
            say(failed=name, why=f"{type(error).__name__}: {error}")
    try:
        say(devices=devices())
    except Exception as error:
        say(no_devices=f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(0)  # some libraries wait for their threads at the end


if __name__ == "__main__":
    main(sys.argv[1:])
