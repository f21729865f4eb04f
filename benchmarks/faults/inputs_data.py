"""Hostile data: atomic files, titles, candidates, predictions."""

from __future__ import annotations

import json
import shutil
from random import Random

import malformed_files
from hypothesis import strategies as st

from faults.strategies import Kind, bytes_like, texts, values, written
from faults.world import World


def atomic_files(world: World) -> Kind:
    place = world.folder / "atomic"
    sound, name = malformed_files.write(place), malformed_files.NAME
    config = malformed_files.settings(place)

    def read(given: tuple[str, int | bytes]) -> None:
        suffix, how = given
        file = place / name / f"{name}.{suffix}"
        data = malformed_files.damaged(Random(how), sound[suffix])[0] if isinstance(how, int) else how
        file.write_bytes(data)
        try:
            found = malformed_files.outcome(config, place)
        finally:
            file.write_bytes(sound[suffix])
        if found == "refused":
            raise ValueError("refused")  # by an error that names the file, as the outcome has checked

    hows = st.sampled_from(["inter", "item"]).flatmap(
        lambda suffix: st.tuples(st.just(suffix), st.one_of(st.integers(0, 2**40), bytes_like(sound[suffix])))
    )
    return hows, read


def item_texts(world: World) -> Kind:
    from transformers import AutoTokenizer

    from recbole_llm.config import LLMConfig
    from recbole_llm.data.loading import create_dataset
    from recbole_llm.data.tokens import TextTokens

    place, name = world.folder / "titles", "titles"
    shutil.copytree(world.folder / "data" / "tiny", place / name)
    for suffix in ("inter", "item"):
        (place / name / f"tiny.{suffix}").rename(place / name / f"{name}.{suffix}")
    head, *rows = (place / name / f"{name}.item").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(world.settings["llm_path"])
    config = LLMConfig("Pop", name, None, {**world.settings, "data_path": str(place)})
    long = st.tuples(
        st.sampled_from(["x", " x", "(", ", The", "é", "</s>", "\u200b", "a (", ") ", "<s"]), st.integers(1, 100_000)
    )
    one = st.one_of(texts, long.map(lambda pair: (pair[0] * pair[1])[:100_000]))

    def read(titles: list[str]) -> None:
        cells = [row.split("\t") for row in rows]
        for cell, title in zip(cells, titles, strict=False):
            cell[1] = title.replace("\t", " ").replace("\n", " ").replace("\r", " ")
        written(place / name / f"{name}.item", "\n".join([head, *map("\t".join, cells), ""]))
        found = create_dataset(config).item_texts
        TextTokens(tokenizer, found.names, 20).titles(True)

    return st.lists(one, max_size=3), read


def candidate_files(world: World) -> Kind:
    from recbole_llm.data.candidate_files import read_candidates

    users, items = ["[PAD]", *(f"u{n}" for n in range(9))], ["[PAD]", *(f"i{n}" for n in range(9))]
    lines = [f"u{n}\ti{n}\t" + " ".join(f"i{(n + k) % 9}" for k in range(4)) for n in range(9)]
    sound = "\n".join(["user_id:token\titem_id:token\tcandidates:token_seq", *lines, ""]).encode()
    file = world.folder / "hostile.candidates"
    return bytes_like(sound), lambda data: read_candidates(written(file, data), users, items)


def prediction_files(world: World) -> Kind:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recbole_llm.evaluation.prediction_files import read_predictions

    users, items = ["[PAD]", *(f"u{n}" for n in range(5))], ["[PAD]", *(f"i{n}" for n in range(5))]
    rows = [(f"u{n}", f"i{(n + k) % 5}", 0.5 * k) for n in range(5) for k in range(3)]
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("user", "item", "score"))}
    binary = world.folder / "sound.parquet"
    pq.write_table(pa.table(columns), binary)
    sound = {
        "csv": "\n".join(["user,item,score", *(",".join(map(str, row)) for row in rows), ""]).encode(),
        "jsonl": "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows).encode(),
        "parquet": binary.read_bytes(),
    }
    lines = st.lists(values, max_size=4).map(lambda made: "\n".join(json.dumps(one, default=str) for one in made).encode())

    def read(given: tuple[str, bytes]) -> None:
        read_predictions(written(world.folder / f"hostile.{given[0]}", given[1]), users, items)

    files = st.sampled_from(sorted(sound)).flatmap(lambda ending: st.tuples(st.just(ending), bytes_like(sound[ending])))
    return st.one_of(files, st.tuples(st.just("jsonl"), lines)), read
