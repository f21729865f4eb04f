"""Hostile results and models: run records and other JSON, adapters, checkpoints, chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from faults.strategies import Kind, bytes_like, fragments, objects_like, values, written
from faults.world import World


def records(world: World) -> Kind:
    from recbole_llm.evaluation.record_files import read_record
    from recbole_llm.leaderboard.per_user import per_user
    from recbole_llm.store.json_files import CHECKSUM, sealed
    from recbole_llm.store.runs import SavedRun

    saved = world.folder / "of-records" / "saved"
    done = world.run(world.arguments("Pop", saved), saved.parent)
    (sound,) = saved.glob("runs/*/record.json") if not done.code else [Path(done.text)]
    content = json.loads(sound.read_text())
    del content[CHECKSUM]
    file = world.folder / "hostile" / "record.json"

    def read(given: Any) -> None:
        data, seal = given
        written(
            file, (sealed(data) if seal and isinstance(data, dict) else json.dumps(data)) if not isinstance(data, bytes) else data
        )
        found = read_record(file)
        per_user(found, "Pop", "hit@1")
        run = SavedRun.read(file)
        for stage in run.record["stages"]:
            run.stage(stage)

    made = st.tuples(objects_like(content), st.booleans())
    return st.one_of(made, st.tuples(bytes_like(sound.read_bytes()), st.just(False))), read


def json_files(world: World) -> Kind:
    from recbole_llm.leaderboard.table import from_json
    from recbole_llm.llm.reading import Reading
    from recbole_llm.replication.results import read_results
    from recbole_llm.store.files import verify
    from recbole_llm.store.json_files import read_object, read_sealed

    folder = world.folder / "hostile json"
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '"a"',
        '"boards"',
        '"form"',
        '"tables"',
        ":",
        ",",
        "1",
        "NaN",
        "-Infinity",
        "null",
        "\\ud800",
        "[" * 5000,
    ]

    def manifest(file: Path) -> None:
        written(folder / "MANIFEST.json", file.read_bytes())
        verify(folder)

    readers: list[Callable[[Path], Any]] = [
        read_object,
        read_sealed,
        read_results,
        manifest,
        lambda file: Reading.of(read_sealed(file)),
    ]
    readers.append(lambda file: from_json(file.read_text(encoding="utf-8", errors="replace")))
    documents = st.one_of(values.map(lambda made: json.dumps(made, default=str)), fragments(*pieces), st.binary(max_size=60))

    def read(given: tuple[int, Any]) -> None:
        readers[given[0]](written(folder / "file.json", given[1]))

    return st.tuples(st.integers(0, len(readers) - 1), documents), read


def adapters(world: World) -> Kind:
    import torch

    from recbole_llm.llm.adapter_fit import check_base, check_fit
    from recbole_llm.llm.adapter_folders import CONFIG_FILE, WEIGHTS_FILE, check_changes, read_adapter
    from recbole_llm.llm.causal_lm import load_causal_lm, load_config
    from recbole_llm.llm.lora import attach_lora, save_adapter

    sound, folder = world.folder / "adapter", world.folder / "hostile adapter"
    model = attach_lora(
        load_causal_lm(Path(world.settings["llm_path"])).model,
        **{"name": "own", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"], "seed": 0},
    )
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:  # zero before training, and an adapter that changes nothing is refused
            torch.nn.init.ones_(parameter)
    save_adapter(model, "own", sound)
    config, weights = json.loads((sound / CONFIG_FILE).read_text()), (sound / WEIGHTS_FILE).read_bytes()
    base = load_config(Path(world.settings["llm_path"]))

    def read(given: tuple[Any, bytes]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        written(folder / CONFIG_FILE, given[0] if isinstance(given[0], bytes) else json.dumps(given[0], default=str))
        written(folder / WEIGHTS_FILE, given[1])
        adapter = read_adapter(folder)
        for module in adapter.modules:
            adapter.factors(module)
        check_changes(adapter, folder)
        check_base(adapter, folder, world.settings["llm_path"])
        check_fit(adapter, folder, base)

    configs = st.one_of(objects_like(config), bytes_like(json.dumps(config).encode()))
    return st.one_of(st.tuples(configs, st.just(weights)), st.tuples(st.just(config), bytes_like(weights))), read


def checkpoints(world: World) -> Kind:
    import torch
    from safetensors.torch import save

    from recbole_llm.classical.imported_checkpoint import read_checkpoint

    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    torch.save({"state_dict": tensors, "config": {"embedding_size": 4}}, world.folder / "sound.pth")
    sound = {"pth": (world.folder / "sound.pth").read_bytes(), "safetensors": save(tensors)}
    files = st.sampled_from(sorted(sound)).flatmap(lambda ending: st.tuples(st.just(ending), bytes_like(sound[ending])))
    return files, lambda given: read_checkpoint(written(world.folder / f"hostile.{given[0]}", given[1]))


def chat_templates(world: World) -> Kind:
    from transformers import AutoTokenizer

    from recbole_llm.data.tokens import TextTokens

    tokenizer = AutoTokenizer.from_pretrained(world.settings["llm_path"])
    pieces = [
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.content }}",
        "{% for i in range(9) %}",
    ]
    pieces += [
        "{% for i in range(10 ** 9) %}",
        "{% set s = 'x' * 9 %}",
        "{{ s }}",
        "{{ strftime_now('%Y') }}",
        "{{ raise_exception('no') }}",
    ]
    pieces += [
        "{% if add_generation_prompt %}",
        "{% endif %}",
        "{% macro f(n) %}",
        "{% endmacro %}",
        "{{ f(2) }}",
        "{{ 2 ** 99 }}",
        "{#",
        "#}",
    ]
    pieces += [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | tojson }}",
        "{{ cycler }}",
        "{% include 'x' %}",
        "{{ self }}",
        "{{ x.y.z }}",
    ]
    pieces += [
        "{% break %}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ messages[9] }}",
        "{{ 1 / 0 }}",
        "{{ 'x' | center(99) }}",
    ]

    def read(template: str) -> None:
        tokenizer.chat_template = template
        TextTokens(tokenizer, [], 1).chat("hello", None)

    return fragments(*pieces), read
