"""Hostile settings: property files, command lines, files of leaderboards and searches."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from faults.strategies import Kind, bytes_like, fragments, objects_like, texts, values, written
from faults.world import World


def property_files(world: World) -> Kind:
    from recbole_llm.config import LLMConfig

    pieces = [
        "&a ",
        "*a",
        "<<: ",
        "!!python/object/apply:os.system ['id']",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\n",
        "\n  ",
        "---\n",
    ]
    pieces += [
        "topk",
        "seed",
        "metrics",
        "eval_args",
        "candidates",
        "epochs: ",
        "1e999",
        "2020-13-01",
        "? ",
        "|",
        ">",
        "%YAML 9",
        "#",
    ]
    keys = sorted({*world.settings} - {"data_path", "checkpoint_dir"})
    lines = st.dictionaries(st.one_of(st.sampled_from(keys), texts), values, max_size=3).map(
        lambda made: json.dumps(made, default=str)
    )
    file = world.folder / "hostile.yaml"
    given = {key: world.settings[key] for key in ("data_path", "checkpoint_dir", "llm_path")}

    def read(content: bytes | str) -> None:
        written(file, content)
        LLMConfig("Pop", "tiny", [str(file)], given)

    return st.one_of(fragments(*pieces), lines, st.binary(max_size=100)), read


def command_lines(world: World) -> Kind:
    from recbole_llm import cli
    from recbole_llm.config import LLMConfig
    from recbole_llm.config.property_files import PropertyFiles

    keys = sorted({name.partition(".")[0] for name in PropertyFiles().definitions} - {"data_path", "checkpoint_dir", "gpu_id"})
    words = st.one_of(texts, values.map(repr), st.sampled_from(["[1, 2", "{'a': 1}", "(" * 300, "1_0", "0x1F", "lambda: 1"]))
    ones = st.one_of(st.builds(lambda key, text: f"--{key}={text}", st.one_of(st.sampled_from(keys), texts), words), texts)
    given = {key: world.settings[key] for key in ("data_path", "checkpoint_dir")}

    def read(arguments: list[str]) -> None:
        LLMConfig("Pop", "tiny", None, given, cmd_line=cli._keys(arguments))

    return st.lists(ones, max_size=3), read


def boards(world: World) -> Kind:
    from recbole_llm.leaderboard.plan import read_plan

    sound = {"dataset": "tiny", "seeds": [1, 2], "models": {"Pop": {}, "BPR": {"settings": {"epochs": 1}}}, "shortcuts": False}
    sound |= {"protocols": {"candidates": {}, "full": {"eval_args": {"mode": "full"}}}, "settings": {"topk": [1, 5]}}
    changes = {key: world.settings[key] for key in ("data_path", "checkpoint_dir")}
    file = world.folder / "board.yaml"
    documents = st.one_of(
        objects_like(sound).map(lambda made: json.dumps(made, default=str)), bytes_like(json.dumps(sound).encode())
    )
    return documents, lambda content: read_plan(written(file, content), changes)


def search_spaces(world: World) -> Kind:
    from recbole_llm.leaderboard.space import distribution, read_space

    pieces = [
        "epochs ",
        "learning_rate ",
        "choice ",
        "uniform ",
        "loguniform ",
        "quniform ",
        "[1, 2]",
        "0, 1",
        "1, 9, 2",
        "\n",
        ", ",
        "[",
        "(",
    ]
    pieces += ["-700, 700", "1e308", "nan", "inf", "# ", "1, 1e-9, 1"]
    file = world.folder / "space.hyper"

    def read(content: str | bytes) -> None:
        for kind, given in read_space(written(file, content)).values():
            distribution(kind, given)

    sound = [
        "epochs choice [1, 2]",
        "learning_rate loguniform -7, 0",
        "dropout_prob uniform 0, 1",
        "hidden_size quniform 8, 64, 8",
    ]
    lines = st.lists(st.one_of(st.sampled_from(sound), fragments(*pieces)), max_size=4).map("\n".join)
    return st.one_of(lines, st.binary(max_size=60)), read
