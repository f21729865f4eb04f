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
import sequence
import torch

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the parts would have their whole sizes")
PARTS = [*accelerator.parts(tiny=True)]


@CPU
@pytest.mark.parametrize("name", PARTS)
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
    load.main(["--sizes", "200x50", "--width=8", "--evaluated=100", f"--folder={tmp_path}", f"--json={file}"])
    found = json.loads(file.read_text())
    assert [*found["columns"]] == ["users", "items", *load.STEPS] and found["rows"][0][:2] == ["200", "50"]
    assert all("GiB" in cell for cell in found["rows"][0][2:]) and "--evaluated=100" in found["command"]


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
    }
    found = merge_rules.differences(record, "hit@1")
    assert {row: part[0] for row, part in found.items()} == {"LoRACocktail": 0.25, "a": -0.25, "b": 0.0, "mix": -0.5}
    assert all(low <= mean <= high for mean, low, high in found.values())
    lines = merge_rules.table([record], "hit@1").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]][-4:] == ["auto", "a", "b", "mix"] and "0.5000" in lines[3]
