"""The kinds of hostile inputs: for each a strategy of hypothesis, and what reads them as the package does."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

import malformed_files
from faults.world import World

Kind = tuple[st.SearchStrategy[Any], Callable[[Any], Any]]

ODD_TEXTS = ["", " ", "..", "../../etc/passwd", "/etc/passwd", "\0", "é", "\u202e", "NaN", "1e999", "-1", "[" * 3000, "x" * 100_000]
ODD_TEXTS += ["=1+1", "<script>", "{{ 1 }}", "%s", "\n", "\t", "\ud7ff", "null", "~", "1" * 5000, "__import__('os').system('id')"]
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=30))
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
values = st.recursive(
    st.one_of(numbers, texts), lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)), max_leaves=8
)
cuts = st.tuples(st.sampled_from(["cut", "insert", "replace", "twice"]), st.floats(0, 1), st.binary(max_size=40))


def changed(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes after some edits."""
    for how, where, given in edits:
        at = int(where * len(data))
        data = {
            "cut": data[:at],
            "insert": data[:at] + given + data[at:],
            "replace": data[:at] + given + data[at + len(given) :],
            "twice": data[:at] + data,
        }[how]
    return data


def bytes_like(data: bytes) -> st.SearchStrategy[bytes]:
    """A file after one to three edits, or bytes of no sort."""
    return st.one_of(st.lists(cuts, min_size=1, max_size=3).map(lambda edits: changed(data, edits)), st.binary(max_size=200))


@st.composite
def objects_like(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value of which one to three parts, at any depth, are replaced, removed or added."""
    found = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        place, parent, key = found, None, None
        for _ in range(draw(st.integers(0, 4))):
            if isinstance(place, dict) and place:
                parent, key = place, draw(st.sampled_from(sorted(place)))
            elif isinstance(place, list) and place:
                parent, key = place, draw(st.integers(0, len(place) - 1))
            else:
                break
            place = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "add" and isinstance(place, dict):
            place[draw(texts)] = draw(values)
        elif parent is None:
            found = draw(values) if how == "replace" else found
        elif how == "remove":
            parent.pop(key)
        else:
            parent[key] = draw(values)
    return found


def fragments(*parts: str) -> st.SearchStrategy[str]:
    """Texts of pieces of a syntax."""
    return st.lists(st.one_of(st.sampled_from(parts), texts), max_size=12).map("".join)


def written(file: Path, content: bytes | str) -> Path:
    """A file with a content, in its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return file


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


def property_files(world: World) -> Kind:
    from recbole_llm.config import LLMConfig

    pieces = ["&a ", "*a", "<<: ", "!!python/object/apply:os.system ['id']", "- ", ": ", "{", "}", "[", "]", ", ", "\n", "\n  ", "---\n"]
    pieces += ["topk", "seed", "metrics", "eval_args", "candidates", "epochs: ", "1e999", "2020-13-01", "? ", "|", ">", "%YAML 9", "#"]
    keys = sorted({*world.settings} - {"data_path", "checkpoint_dir"})
    lines = st.dictionaries(st.one_of(st.sampled_from(keys), texts), values, max_size=3).map(lambda made: json.dumps(made, default=str))
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


def candidate_files(world: World) -> Kind:
    from recbole_llm.data.candidate_files import read_candidates

    users, items = ["[PAD]", *(f"u{n}" for n in range(9))], ["[PAD]", *(f"i{n}" for n in range(9))]
    lines = [f"u{n}\ti{n}\t" + " ".join(f"i{(n + k) % 9}" for k in range(4)) for n in range(9)]
    sound = "\n".join(["user_id:token\titem_id:token\tcandidates:token_seq", *lines, ""]).encode()
    file = world.folder / "hostile.candidates"
    return bytes_like(sound), lambda data: read_candidates(written(file, data), users, items)


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
        written(file, (sealed(data) if seal and isinstance(data, dict) else json.dumps(data)) if not isinstance(data, bytes) else data)
        found = read_record(file)
        per_user(found, "Pop", "hit@1")
        run = SavedRun.read(file)
        for stage in run.record["stages"]:
            run.stage(stage)

    made = st.tuples(objects_like(content), st.booleans())
    return st.one_of(made, st.tuples(bytes_like(sound.read_bytes()), st.just(False))), read


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


def chat_templates(world: World) -> Kind:
    from transformers import AutoTokenizer

    from recbole_llm.data.tokens import TextTokens

    tokenizer = AutoTokenizer.from_pretrained(world.settings["llm_path"])
    pieces = ["{{ messages[-1]['content'] }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% for i in range(9) %}"]
    pieces += ["{% for i in range(10 ** 9) %}", "{% set s = 'x' * 9 %}", "{{ s }}", "{{ strftime_now('%Y') }}", "{{ raise_exception('no') }}"]
    pieces += ["{% if add_generation_prompt %}", "{% endif %}", "{% macro f(n) %}", "{% endmacro %}", "{{ f(2) }}", "{{ 2 ** 99 }}", "{#", "#}"]
    pieces += ["{{ ''.__class__.__mro__ }}", "{{ messages | tojson }}", "{{ cycler }}", "{% include 'x' %}", "{{ self }}", "{{ x.y.z }}"]
    pieces += ["{% break %}", "{% generation %}", "{% endgeneration %}", "{{ messages[9] }}", "{{ 1 / 0 }}", "{{ 'x' | center(99) }}"]

    def read(template: str) -> None:
        tokenizer.chat_template = template
        TextTokens(tokenizer, [], 1).chat("hello", None)

    return fragments(*pieces), read


def json_files(world: World) -> Kind:
    from recbole_llm.leaderboard.table import from_json
    from recbole_llm.llm.reading import Reading
    from recbole_llm.replication.results import read_results
    from recbole_llm.store.files import verify
    from recbole_llm.store.json_files import read_object, read_sealed

    folder = world.folder / "hostile json"
    pieces = ["{", "}", "[", "]", '"a"', '"boards"', '"form"', '"tables"', ":", ",", "1", "NaN", "-Infinity", "null", "\\ud800", "[" * 5000]

    def manifest(file: Path) -> None:
        written(folder / "MANIFEST.json", file.read_bytes())
        verify(folder)

    readers: list[Callable[[Path], Any]] = [read_object, read_sealed, read_results, manifest, lambda file: Reading.of(read_sealed(file))]
    readers.append(lambda file: from_json(file.read_text(encoding="utf-8", errors="replace")))
    documents = st.one_of(values.map(lambda made: json.dumps(made, default=str)), fragments(*pieces), st.binary(max_size=60))

    def read(given: tuple[int, Any]) -> None:
        readers[given[0]](written(folder / "file.json", given[1]))

    return st.tuples(st.integers(0, len(readers) - 1), documents), read


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
    long = st.tuples(st.sampled_from(["x", " x", "(", ", The", "é", "</s>", "\u200b", "a (", ") ", "<s"]), st.integers(1, 100_000))
    one = st.one_of(texts, long.map(lambda pair: (pair[0] * pair[1])[:100_000]))

    def read(titles: list[str]) -> None:
        cells = [row.split("\t") for row in rows]
        for cell, title in zip(cells, titles, strict=False):
            cell[1] = title.replace("\t", " ").replace("\n", " ").replace("\r", " ")
        written(place / name / f"{name}.item", "\n".join([head, *map("\t".join, cells), ""]))
        found = create_dataset(config).item_texts
        TextTokens(tokenizer, found.names, 20).titles(True)

    return st.lists(one, max_size=3), read


def checkpoints(world: World) -> Kind:
    import torch
    from safetensors.torch import save

    from recbole_llm.classical.imported_checkpoint import read_checkpoint

    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    torch.save({"state_dict": tensors, "config": {"embedding_size": 4}}, world.folder / "sound.pth")
    sound = {"pth": (world.folder / "sound.pth").read_bytes(), "safetensors": save(tensors)}
    files = st.sampled_from(sorted(sound)).flatmap(lambda ending: st.tuples(st.just(ending), bytes_like(sound[ending])))
    return files, lambda given: read_checkpoint(written(world.folder / f"hostile.{given[0]}", given[1]))


def boards(world: World) -> Kind:
    from recbole_llm.leaderboard.plan import read_plan

    sound = {"dataset": "tiny", "seeds": [1, 2], "models": {"Pop": {}, "BPR": {"settings": {"epochs": 1}}}, "shortcuts": False}
    sound |= {"protocols": {"candidates": {}, "full": {"eval_args": {"mode": "full"}}}, "settings": {"topk": [1, 5]}}
    changes = {key: world.settings[key] for key in ("data_path", "checkpoint_dir")}
    file = world.folder / "board.yaml"
    documents = st.one_of(objects_like(sound).map(lambda made: json.dumps(made, default=str)), bytes_like(json.dumps(sound).encode()))
    return documents, lambda content: read_plan(written(file, content), changes)


def search_spaces(world: World) -> Kind:
    from recbole_llm.leaderboard.space import distribution, read_space

    pieces = ["epochs ", "learning_rate ", "choice ", "uniform ", "loguniform ", "quniform ", "[1, 2]", "0, 1", "1, 9, 2", "\n", ", ", "[", "("]
    pieces += ["-700, 700", "1e308", "nan", "inf", "# ", "1, 1e-9, 1"]
    file = world.folder / "space.hyper"

    def read(content: str | bytes) -> None:
        for kind, given in read_space(written(file, content)).values():
            distribution(kind, given)

    return st.one_of(fragments(*pieces), st.binary(max_size=60)), read


KINDS: dict[str, Callable[[World], Kind]] = {
    "atomic files": atomic_files,
    "titles of up to 100,000 characters": item_texts,
    "property files": property_files,
    "command lines": command_lines,
    "leaderboard files": boards,
    "search spaces": search_spaces,
    "candidate files": candidate_files,
    "prediction files": prediction_files,
    "run records": records,
    "other JSON files": json_files,
    "adapters": adapters,
    "checkpoints": checkpoints,
    "chat templates": chat_templates,
}
