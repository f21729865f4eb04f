"""Rules of merging against the better single adapter: ``python benchmarks/merge_rules.py RECORD [RECORD ...]``.

Each record is that of a run whose rows are rules of merging, as in ``properties/leaderboard/merge-rules-*.yaml``. The table has
a line for each row and a column for each record: the mean difference of a metric to the single adapter that is better on the
same test users, with the 95 % bootstrap interval of the paired differences. The better adapter is known only after the test, so
a rule that always finds it has 0.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recbole_llm.evaluation import metrics  # noqa: E402
from recbole_llm.evaluation.record_files import ranks_of, read_record  # noqa: E402
from recbole_llm.evaluation.significance import interval  # noqa: E402


def by_user(record: dict[str, Any], row: str, metric: str) -> np.ndarray:
    """The metric of each user of a row, [N], in the order of the user tokens."""
    ranks = ranks_of(record, row)
    return np.array([metrics.metrics([ranks[user]], [metric])[metric] for user in sorted(ranks)])


def singles(record: dict[str, Any]) -> list[str]:
    """The adapters that were merged."""
    return [source["name"] for source in record["merge"]["sources"]]


def differences(record: dict[str, Any], metric: str) -> dict[str, tuple[float, float, float]]:
    """Row -> mean difference to the better single adapter, and its interval."""
    values = {row: by_user(record, row, metric) for row in record["ranks"]}
    better = values[max(singles(record), key=lambda row: values[row].mean())]
    return {row: (float((own - better).mean()), *interval(own - better)) for row, own in values.items()}


def table(records: list[dict[str, Any]], metric: str) -> str:
    """The table as Markdown; the first lines are the better adapter's own metric and the number of users."""
    heads = [f"{record['dataset']}, {record['backbone']}" for record in records]
    found = [differences(record, metric) for record in records]
    rows = list(dict.fromkeys(row for part in found for row in part))
    lines = [["test users", *(len(record["ranks"][record["model"]]) for record in records)]]
    for name in ("better", "other"):
        means = [sorted(float(by_user(r, row, metric).mean()) for row in singles(r)) for r in records]
        lines.append([f"{name} adapter, {metric}", *(f"{mean[-1 if name == 'better' else 0]:.4f}" for mean in means)])
    for row in rows:
        cells = [part.get(row) for part in found]
        labels = {record["model"]: record["merge"]["method"] for record in records}
        lines.append([labels.get(row, row), *("" if c is None else f"{c[0]:+.4f} [{c[1]:+.4f}, {c[2]:+.4f}]" for c in cells)])
    return str(tabulate(lines, headers=["", *heads], tablefmt="github", disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--metric", default="ndcg@10", help="in lower case, such as hit@1 (default: ndcg@10)")
    given = parser.parse_args()
    print(table([read_record(path) for path in given.records], given.metric))


if __name__ == "__main__":
    main()
