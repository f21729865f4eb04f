"""RecBole's models are built: what they need is checked, and the checkpoints that some start from are read safely."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from recbole_llm.classical.imported_checkpoint import read_checkpoint
from recbole_llm.classical.kgat import without_dgl
from recbole_llm.classical.popularity import with_right_counts
from recbole_llm.config.contents import PRETRAINED

NEEDS = {"KGIN": "torch_scatter", "MCCLK": "torch_scatter"}
"""The package that a model of RecBole imports and that this package does not require."""

_SIZES = {  # a number that the data limits: of these, counted with RecBole's padding
    "NCL": ("num_clusters", ("user_num", "item_num")),
    "SASRecCPR": ("reranker_CAN_NUM", ("item_num",)),
    "GRU4RecCPR": ("reranker_CAN_NUM", ("item_num",)),
}


def build(config: Any, dataset: Any) -> Any:
    """The model of a configuration with its initial weights, on its device.

    Raises:
        ModuleNotFoundError: the model imports a package that is not installed.
        FileNotFoundError: there is no file at the path of a checkpoint.
        ValueError: a setting does not fit the data; or a checkpoint is damaged, or does not have the weights of this model.
    """
    name = config["model"]
    if name in NEEDS and importlib.util.find_spec(package := NEEDS[name]) is None:
        raise ModuleNotFoundError(
            f"--model={name}: RecBole's model imports {package}, which is not installed; run: pip install --no-build-isolation "
            f"{package}, which compiles it for your torch, or choose another model",
            name=package,
        )
    key, counts = _SIZES.get(name, ("", ()))
    for count in counts:
        most, given = getattr(dataset, count), max(int(part) for part in str(config[key]).split(","))
        if given > most:
            raise ValueError(f"{key}: {given} is more than the {most - 1} {count[:4]}s of {config['dataset']}; lower it")
    graph = without_dgl(dataset, config.model_class) if name == "KGAT" else contextlib.nullcontext()
    try:
        with _safe_reading(config), graph:
            return with_right_counts(config.model_class(config, dataset).to(config["device"]), config["LABEL_FIELD"])
    except (TypeError, ValueError, AssertionError, NotImplementedError, RuntimeError, ZeroDivisionError) as error:
        settings = ", ".join(f"{key}={value}" for key, value in config.given_of_model().items())
        if not settings or type(error).__module__ != "builtins" or not config.model_class.__module__.startswith("recbole."):
            raise
        raise ValueError(f"{name} cannot be built with {settings} ({' '.join(str(error).split())})") from error
    except SystemExit:  # RecBole's CPR models end the process, as if all were well
        raise ValueError(f"loss_type: {config['loss_type']}: RecBole's {name} has no such loss; give --loss_type=CE") from None


@contextlib.contextmanager
def _safe_reading(config: Any) -> Iterator[None]:
    """Replace ``torch.load``, with which RecBole's constructors read checkpoints, by :func:`read_checkpoint`."""
    original, read = torch.load, list[str]()

    def load(file: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        key = next((key for key in PRETRAINED if key in config and config[key] == file), "")
        if not key:
            return original(file, *arguments, **options)
        if not file:
            raise ValueError(f"{key}: {config['model']} starts from a checkpoint here; give one, such as --{key}=saved/FILE.pth")
        read.append(f"{key}: {file}")
        return {"state_dict": read_checkpoint(file, key).state_dict}

    torch.load = load  # type: ignore[assignment]
    try:
        yield
    except (RuntimeError, KeyError) as error:  # of load_state_dict, or of a name that a state dict lacks
        if not read:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{', '.join(read)} does not fit {config['model']} with these settings; give one of the model that it starts from, "
            f"trained on the same data with the same sizes ({reason[:300]})"
        ) from error
    finally:
        torch.load = original
