"""Products of float32 matrices on this CPU by torch's default library and by oneDNN: ``python benchmarks/float32.py``.

The shapes are those of a layer of SmolLM2-135M for 2,048 tokens. Errors are relative (Frobenius norm), against float64. Times
are the least of several rounds, both ways in turn; the figure is their ratio.
"""

import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recbole_llm.training.float32 import onednn_is_exact  # noqa: E402

SHAPES = {"attention": (2048, 576, 576), "feed-forward, up": (2048, 576, 1536), "feed-forward, down": (2048, 1536, 576)}
ROUNDS = 10


def main() -> None:
    rows = []
    for name, (n, inner, out) in SHAPES.items():
        x, w = torch.randn(n, inner), torch.randn(out, inner)
        exact = x.double() @ w.double().T
        times: dict[str, list[float]] = {"highest": [], "medium": []}
        errors = {}
        for _ in range(ROUNDS):
            for value, measured in times.items():
                torch.set_float32_matmul_precision(value)
                started = time.perf_counter()
                y = x @ w.T
                measured.append(time.perf_counter() - started)
                errors[value] = float((y - exact).norm() / exact.norm())
        default, onednn = min(times["highest"]), min(times["medium"])
        rows.append([name, f"{default / onednn:.2f}", f"{errors['highest']:.1e}", f"{errors['medium']:.1e}"])
    print(tabulate(rows, headers=["product", "oneDNN is faster by", "error, default", "error, oneDNN"], disable_numparse=True))
    used = "yes" if onednn_is_exact() else "no"
    print(f"used by runs with an LM of 256 or more dimensions: {used}; threads: {torch.get_num_threads()}")


if __name__ == "__main__":
    main()
