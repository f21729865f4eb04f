"""The model card of a shared run: README.md with the measured table as ``model-index``, as the Hugging Face hub reads it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.evaluation.training_curves import PICTURE
from recbole_llm.share.base_models import BaseModel
from recbole_llm.store.shared_runs import PASSPORT, SETTINGS

_SPECIAL = "\\`*_[]<>|#"


def card(
    record: Mapping[str, Any],
    bases: Sequence[BaseModel],
    adapters: Mapping[str, str],
    *,
    name: str,
    licence: str | None,
    left_out: Sequence[str],
    picture: bool,
) -> str:
    """The text of README.md, with its metadata.

    Args:
        record: as it is shared.
        adapters: folder of each PEFT adapter, by its name.
        name: how the run is given to ``--run``.
        licence: of what is shared, an identifier of the hub; None: that of the base models, if they agree.
        left_out: what is not shared.
        picture: whether there are curves of the training.
    """
    from huggingface_hub import ModelCardData

    model, dataset = str(record["model"]), str(record["dataset"])
    known = {base.licence for base in bases}
    licence = licence or (known.pop() if len(known) == 1 else None)
    data = ModelCardData(
        model_name=" ".join(f"{model} on {dataset}".split()),
        base_model=[base.name for base in bases if base.on_hub] or None,
        library_name="peft" if adapters else "recbole-llm",
        license=licence,
        tags=["recbole-llm", "recommender-system", "sequential-recommendation", model.lower()],
        eval_results=_results(record),
    )
    parts = [
        f"# {_text(model)} on {_text(dataset)}",
        f"A run of [RecBole-LLM](https://pypi.org/project/recbole-llm/) {_text(str(record['versions']['recbole_llm']))}, "
        f"written {_text(str(record['written']))[:10]}.",
        "## Results",
        _protocol(record),
        _table(record),
        *([_merge(record["merge"])] if record.get("merge") else []),
        *([f"![Curves of the training]({PICTURE})"] if picture else []),
        "## Use",
        _use(record, bases, name),
        *([_adapters(record, adapters, bases, name)] if adapters else []),
        "## What it was trained on",
        _data(record),
        "## Base models and licences",
        _licences(record, bases, licence),
        "## What is not shared",
        "\n".join(f"- {line}" for line in left_out),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _results(record: Mapping[str, Any]) -> list[Any]:
    """One result for each metric of the model, and for each of the other rows, named by it."""
    from huggingface_hub import EvalResult

    dataset = " ".join(str(record["dataset"]).split())
    return [
        EvalResult(
            task_type="other",
            task_name="recommendation: rank the next item",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            dataset_config=_protocol(record),
            metric_type=metric.partition("@")[0],
            metric_name=metric if place == 0 else f"{metric}, row {' '.join(row.split())}",
            metric_value=value,
        )
        for place, (row, values) in enumerate(record["results"].items())
        for metric, value in values.items()
    ]


def _protocol(record: Mapping[str, Any]) -> str:
    users = max(map(len, record["ranks"].values()), default=0)
    sha = record["candidates_sha256"].get("test")
    seen = f"{users:,} test users, one target each" if users else "test users with several targets"
    if sha is None:
        return f"{seen}, ranked in the whole catalogue"
    number = record["config"]["candidates"]["num_negatives"]
    return f"{seen}, ranked among {number} other items (candidates SHA-256 {sha[:12]})"


def _table(record: Mapping[str, Any]) -> str:
    metrics = list(next(iter(record["results"].values())))
    lines = ["| row | " + " | ".join(map(_text, metrics)) + " |", "|---" * (len(metrics) + 1) + "|"]
    for row, values in record["results"].items():
        widths = record["half_width_95"].get(row, {})
        cells = [f"{values[m]:.4f}" + (f" ± {widths[m]:.3f}" if m in widths else "") for m in metrics]
        lines.append(f"| {_text(row)} | " + " | ".join(cells) + " |")
    note = "± is half of the 95 % interval over users."
    return "\n".join([*lines, "", note])


def _merge(merge: Mapping[str, Any]) -> str:
    """How adapters were merged; weights by module are in ``merge.json`` of the merged folder."""
    weights = merge.get("weights") or {}
    one = weights and all(isinstance(weight, int | float) for weight in weights.values())
    listed = ", ".join(f"{_text(name)} {weight:.4g}" for name, weight in weights.items()) if one else "by module, in `merge.json`"
    return f"The model is a merge of adapters by {_text(str(merge.get('method')))}: {listed}."


def _use(record: Mapping[str, Any], bases: Sequence[BaseModel], name: str) -> str:
    missing = [base.key for base in bases if not base.on_hub and not _installed(record, base)]
    keys, arguments = ("".join(form.format(key) for key in missing) for form in (" --{}=FOLDER", ", {}='FOLDER'"))
    return (
        f"You need the same dataset, `{_code(str(record['dataset']))}`, in `--data_path`, whose items the vectors belong to. "
        f"It is compared with `{PASSPORT}`, and a difference is named.\n\n"
        f"    recbole-llm recommend --run={shlex.quote(_code(name))}{keys} --user=ID --top=10\n\n"
        "```python\nimport recbole_llm\n\n"
        f"recommender = recbole_llm.load({_code(name)!r}{arguments})\n```\n\n"
        f"Nothing is executed and nothing is unpickled. All settings are in `{SETTINGS}`."
    )


def _installed(record: Mapping[str, Any], base: BaseModel) -> bool:
    """Whether the base model is in a package, which the setting names."""
    return str(record["config"].get(base.key, "")).startswith("package:")


def _adapters(record: Mapping[str, Any], adapters: Mapping[str, str], bases: Sequence[BaseModel], name: str) -> str:
    base = next((_named(record, base) for base in bases if base.key == "llm_path"), "the LM in the stage builtin-lm")
    lines = "\n".join(f"| {_text(adapter)} | `{_code(folder)}` |" for adapter, folder in adapters.items())
    first, repository = next(iter(adapters.values())), name.removeprefix("hub:")
    return (
        f"The adapters are ordinary PEFT folders for {base}:\n\n| adapter | folder |\n|---|---|\n{lines}\n\n"
        "```python\nfrom peft import PeftModel  # lm: that LM, as transformers loads it\n\n"
        f"model = PeftModel.from_pretrained(lm, {_code(repository)!r}, subfolder={_code(first)!r})\n```"
    )


def _data(record: Mapping[str, Any]) -> str:
    passport = record["passport"]
    counts = passport["counts"]
    sizes = ", ".join(f"{counts[name]:,} {name}" for name in ("users", "items", "interactions"))
    return f"`{_code(str(record['dataset']))}` after its filters: {sizes}. {_text(str(passport['verdict']))[:300]}."


def _named(record: Mapping[str, Any], base: BaseModel) -> str:
    """The name of a base model, and that in tables if it is another one, such as that of a file in a package."""
    shown = str(record.get("backbone") or "").partition(",")[0]
    also = base.key == "llm_path" and not base.on_hub and shown not in ("", base.name)
    return _text(f"{base.name} ({shown})" if also else base.name)


def _licences(record: Mapping[str, Any], bases: Sequence[BaseModel], licence: str | None) -> str:
    lines = [
        f"- {base.part}: {_named(record, base)}, licence {_text(base.licence) if base.licence else 'not found; see its page'}"
        for base in bases
    ]
    lines.append(f"- what is shared here: {_text(licence) if licence else 'no licence is given'}")
    return "\n".join(lines or ["- none"])


def _text(text: str) -> str:
    """Text in Markdown as it is."""
    return "".join(f"\\{sign}" if sign in _SPECIAL else sign for sign in " ".join(text.split()))


def _code(text: str) -> str:
    """Text between backquotes."""
    return " ".join(text.replace("`", "'").split())
