"""Rules of merging against the better single adapter: ``python benchmarks/merge_rules.py RECORD [RECORD ...]``.

Each record is that of a run whose rows are rules of merging, as in ``properties/leaderboard/merge-rules-*.yaml``. The table has
a line for each row and a column for each record: the mean of a metric less that of the single adapter that is better on the
same test users, with the 95 % bootstrap interval of the paired differences. The better adapter is known only after the test, so
a rule that always finds it has 0. With ``--out``, the columns of other pairs that the page already has are kept.
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
from recbole_llm.store.files import atomic_write  # noqa: E402

Columns = dict[str, dict[str, str]]  # pair -> row -> cell


def by_user(record: dict[str, Any], row: str, metric: str) -> np.ndarray:
    """The metric of each user of a row, [N], in the order of the user tokens."""
    ranks = ranks_of(record, row)
    return np.array([metrics.metrics([ranks[user]], [metric])[metric] for user in sorted(ranks)])


def singles(record: dict[str, Any]) -> list[str]:
    """The adapters that were merged."""
    return [source["name"] for source in record["merge"]["sources"]]


def pair(record: dict[str, Any]) -> str:
    """The data set, the backbone, and whether all targets are new items."""
    items = ", new items" if record["config"].get("new_items") else ""
    return f"{record['dataset']}{items}, {record['backbone']}"


def rule(record: dict[str, Any]) -> str:
    """The rule of the model's own row."""
    published = record["merge"]["method"] == "entropy" and record["config"]["merge_start"] == "uniform"
    return "published entropy" if published else str(record["merge"]["method"])


def joined(records: list[dict[str, Any]], metric: str) -> dict[str, dict[str, np.ndarray]]:
    """Pair -> row -> the metric of each user [N]; runs of the same adapters and users are one pair."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for record in records:
        rows = {rule(record) if row == record["model"] else row: by_user(record, row, metric) for row in record["ranks"]}
        known = found.setdefault(pair(record), {})
        for row in {*known} & {*rows}.intersection(singles(record)):
            if not np.array_equal(known[row], rows[row]):
                raise ValueError(f"{pair(record)}: the records have other adapters or users ({row}); give those of one board")
        known |= {row: values for row, values in rows.items() if row not in known}
    return found


def differences(rows: dict[str, np.ndarray], adapters: list[str]) -> dict[str, tuple[float, float, float]]:
    """Row -> its mean less that of the better single adapter, and the interval of the difference."""
    better = rows[max(adapters, key=lambda row: rows[row].mean())]
    return {row: (float((own - better).mean()), *interval(own - better)) for row, own in rows.items()}


def columns(records: list[dict[str, Any]], metric: str) -> Columns:
    """The columns; their first cells are the number of users and the metric of both adapters, the better one first."""
    found, adapters = {}, {pair(record): singles(record) for record in records}
    for name, rows in joined(records, metric).items():
        means = [float(rows[row].mean()) for row in adapters[name]]
        heads = str(len(next(iter(rows.values())))), f"{max(means):.4f}", f"{min(means):.4f}"
        found[name] = dict(zip(_heads(metric), heads, strict=True))
        for row, (mean, low, high) in differences(rows, adapters[name]).items():
            found[name][row] = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    return found


def read_columns(page: str, metric: str) -> Columns:
    """The columns of the table of a page.

    Raises:
        ValueError: the page has no such table of this metric.
    """
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    if [line[0] for line in lines[2:5]] != _heads(metric):
        raise ValueError(f"the page has no table of {metric}; give another --out")
    rows = {row: dict(zip(lines[0][1:-1], cells, strict=False)) for row, *cells in lines[2:]}
    return {name: {row: cells[name] for row, cells in rows.items() if cells[name]} for name in lines[0][1:-1]}


def table(found: Columns, metric: str) -> str:
    """The table as Markdown; the last column counts the pairs in which the interval lies below 0, contains it, lies above it."""
    lines = []
    for row in dict.fromkeys(row for cells in found.values() for row in cells):
        cells, counts = [column.get(row, "") for column in found.values()], ""
        if row not in _heads(metric):
            ends = [[float(end) for end in cell.partition("[")[2].strip("]").split(",")] for cell in cells if cell]
            below, above = sum(high < 0 for _, high in ends), sum(low > 0 for low, _ in ends)
            counts = f"{below}, {len(ends) - below - above}, {above}"
        lines.append([row, *cells, counts])
    return str(tabulate(lines, headers=["", *found, "below, neither, above"], tablefmt="github", disable_numparse=True))


def _heads(metric: str) -> list[str]:
    return ["test users", f"better adapter, {metric}", f"other adapter, {metric}"]


def page(found: Columns, metric: str) -> str:
    """A page with the table; the boards' files say how the runs are repeated."""
    return f"""# Rules of merging

This page is written by `python benchmarks/merge_rules.py RECORD ... --out=docs/results/merge-rules.md` from run records; nothing
in it is typed by hand. The runs are those of the boards `properties/leaderboard/merge-rules-*.yaml` and, for the pretrained LLM,
of `recbole-llm replicate reccocktail-ml-100k reccocktail-amazon-beauty reccocktail-amazon-beauty-new-items`.

Each cell is the mean {metric} of a row less that of the single adapter that is better on the same test users, with the 95 %
bootstrap interval of the paired differences. That adapter is known only after the test, so a rule that always finds it has 0. The
last column counts the pairs in which the interval lies below 0, contains it, and lies above it. One interval in twenty
misses the true value. On the pretrained LLM, `auto` compares the points of its lattice alone, without steps of Adam; on
amazon-beauty that LLM is in bfloat16. For the rules see [Merging adapters](../merging.md).

{table(found, metric)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--metric", default="ndcg@10", help="in lower case, such as hit@1 (default: ndcg@10)")
    parser.add_argument("--out", type=Path, help="write a page")
    given = parser.parse_args()
    found = columns([read_record(path) for path in given.records], given.metric)
    if given.out is None:
        print(table(found, given.metric))
    else:
        kept = read_columns(given.out.read_text(encoding="utf-8"), given.metric) if given.out.is_file() else {}
        atomic_write(given.out, page(kept | found, given.metric))


if __name__ == "__main__":
    main()
