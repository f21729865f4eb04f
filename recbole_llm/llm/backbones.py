"""The backbone of a run: the builtin LM, trained as a kept stage, or any causal LM by folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.data.domains import Domain
from recbole_llm.llm.causal_lm import fingerprint, load_causal_lm
from recbole_llm.store.stages import StageCache


@dataclass(frozen=True)
class Backbone:
    """A frozen causal LM with its tokenizer; ``name`` is what tables show, ``fingerprint`` what stages depend on."""

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str


def load_backbone(config: Any, domains: Sequence[Domain], cache: StageCache) -> Backbone:
    """The LM that ``config`` names; the builtin one is trained on ``domains`` first, unless it is kept.

    A run that takes up another (``init_from``) has the builtin LM of that one.

    Raises:
        ValueError: the other run has none; names ``init_from`` and the remedy.
    """
    path, name = config["llm_path"], None
    if path == "builtin" and config.init_run:
        path = config.init_run.stage("builtin-lm")
    elif path == "builtin":
        from recbole_llm.llm.builtin_lm import builtin_stage

        stage = builtin_stage(
            config["builtin_lm"],
            domains,
            config["seed"],
            save_every=config["save_every_seconds"],
            show_progress=config["show_progress"],
        )
        path = cache.run(stage)
    loaded = load_causal_lm(
        path,
        revision=config["llm_revision"],
        dtype=config["dtype"],
        device=config["device"],
        device_map=config["device_map"],
        attn_implementation=config["attn_implementation"],
        load_in_4bit=config["load_in_4bit"],
    )
    if config["llm_path"] == "builtin":
        name = f"builtin {sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M"
    identity = fingerprint(path, loaded.revision or config["llm_revision"])
    return Backbone(loaded.model, loaded.tokenizer, name or loaded.name, f"{identity}/{config['dtype']}")
