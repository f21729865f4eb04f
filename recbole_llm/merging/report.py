"""How a merge is shown: the coefficients by module (rows are layers, columns kinds of modules), and the report of a lattice."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.evaluation.plots import heat_map, picture
from recbole_llm.merging.arithmetic import MERGE_FILE

REPORT_FILE = "merge_report.json"


def merge_record(adapter: Path, measured: Path | None) -> dict[str, Any] | None:
    """``merge.json`` of an adapter, with the report in the folder of its stage, if it is ``measured``; None of one not merged."""
    if not (adapter / MERGE_FILE).is_file():
        return None
    found: dict[str, Any] = json.loads((adapter / MERGE_FILE).read_text())
    return found if measured is None else {**found, "report": json.loads((measured / REPORT_FILE).read_text())}


def draw_merge(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Plot a merge's record into a run folder; returns lines for the log."""
    lines = draw_coefficients(folder / "coefficients.png", record["weights"], record["method"])
    if (report := record.get("report")) is not None:
        lines += [*report_lines(report), draw_lattice(folder / "merge_report.png", report)]
    return lines


def draw_coefficients(file: Path, weights: Mapping[str, Any], method: str) -> list[str]:
    """Plot weights ``module -> adapter -> weight``; returns a line for the log. Global weights are not plotted."""
    if not isinstance(next(iter(weights.values())), dict):
        return []
    places = {module: _place(module) for module in weights}
    layers, kinds = (list(dict.fromkeys(part)) for part in zip(*places.values(), strict=True))
    names = list(dict.fromkeys(name for row in weights.values() for name in row))
    values = np.full((len(layers), len(names) * len(kinds)), np.nan)
    for module, (layer, kind) in places.items():
        for name, weight in weights[module].items():
            values[layers.index(layer), names.index(name) * len(kinds) + kinds.index(kind)] = weight
    heat_map(
        file,
        values,
        rows=layers,
        columns=[f"{name}: {kind}" for name in names for kind in kinds],
        title=f"Coefficients by module, merge: {method}",
        row_label="layer",
        column_label="adapter: module",
    )
    return [f"coefficients by module: {file}"]


def draw_lattice(file: Path, report: Mapping[str, Any]) -> str:
    """Plot the entropies and the validation metric over the lattice of a report; returns a line for the log.

    The axis is the weight of the first adapter, or, of more than two, the rank of the point by its metric.
    """
    points, names = report["lattice"]["points"], list(report["adapters"])
    if len(names) == 2:
        axis, label = [point["weights"][names[0]] for point in points], f"weight of {names[0]} (the rest: {names[1]})"
    else:
        ranked = sorted(range(len(points)), key=lambda i: points[i]["score"])
        axis, label = [ranked.index(i) for i in range(len(points))], f"points of {len(names)} adapters, by {report['metric']}"
    metric, order = report["metric"], np.argsort(axis, kind="stable")
    places, points = np.array(axis, dtype=float)[order], [points[i] for i in order]
    entropies = {
        "first_tokens_entropy": ("-o", f"entropy of the first {report['first_tokens']} tokens"),
        "candidate_entropy": ("--s", "entropy of the candidates"),
    }
    with picture(file, (7, 4.5)) as figure:
        left = figure.subplots()
        right, shown = left.twinx(), []
        for key, (style, name) in entropies.items():
            shown += left.plot(places, [point[key] for point in points], style, color="tab:blue", markersize=4, label=name)
        shown += right.plot(places, [point["score"] for point in points], "-D", color="tab:red", markersize=4, label=metric)
        low, high = zip(*(point["interval"] or [np.nan] * 2 for point in points), strict=True)
        right.fill_between(places, low, high, color="tab:red", alpha=0.15, linewidth=0)
        left.set(title=f"Merges of {report['users']} validation users", xlabel=label, ylabel="entropy (nats)")
        right.set_ylabel(metric)
        left.legend(handles=shown, loc="best", fontsize=8)
    return f"entropy and {metric} over the weights: {file}"


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """A report's two entropies and its adapters, for the log."""
    metric, users = report["metric"], report["users"]
    found = [
        f"merge report, {name} of {users} users over {len(report['lattice']['points'])} points: rank correlation with {metric} "
        f"{_text(part['rank_correlation'])}, regret of its least point {_text(part['regret'])}"
        for name, part in report["lattice"]["criteria"].items()
        if name in ("first_tokens_entropy", "candidate_entropy")
    ]
    for name, part in report["adapters"].items():
        after = part["calibrated"]
        found.append(
            f"merge report, {name}: hit@1 {part['hit@1']:.3f}, mean largest probability {part['max_probability']:.3f}, entropy "
            f"{part['entropy']:.3f}, calibration error {part['calibration_error']:.3f}; at its temperature of "
            f"{part['temperature']:.3g} {after['max_probability']:.3f}, {after['entropy']:.3f}, {after['calibration_error']:.3f}"
        )
    return found


def _text(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "undefined"
    low, high = estimate["interval"] or (float("nan"), float("nan"))
    return f"{estimate['value']:.3f} [{low:.3f}, {high:.3f}]"


def _place(module: str) -> tuple[str, str]:
    """Layer and kind of a module: ``model.layers.3.self_attn.q_proj`` -> 3, q_proj."""
    match = re.search(r"\.(\d+)\.(.+)$", module)
    return (match[1], match[2].rsplit(".", 1)[-1]) if match else ("", module)
