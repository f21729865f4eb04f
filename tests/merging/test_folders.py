"""``recbole-llm merge``: what it writes, and the one line that a mistake ends in."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from recbole_llm import cli
from recbole_llm.llm.adapter_folders import Adapter, read_adapter
from recbole_llm.merging.arithmetic import write_adapter
from recbole_llm.merging.folders import merge_folders

MODULES = ["model.q_proj", "model.v_proj"]


def write(folder, seed, r=2, modules=MODULES, base="tiny", width=6):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, width, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(5, r, generator=generator)
    targets = [module.split(".")[-1] for module in modules]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": targets, "base_model_name_or_path": base}
    write_adapter(Adapter(config, tensors, folder.name), folder, {})
    return str(folder)


@pytest.fixture
def adapters(tmp_path):
    return [write(tmp_path / name, seed) for seed, name in enumerate(("base", "own"))]


def merge(adapters, out, *arguments):
    cli.main(["merge", f"--adapters={' '.join(map(str, adapters))}", f"--out={out}", *arguments])


def failing(capsys, adapters, out, *arguments):
    with pytest.raises(SystemExit) as stop:
        merge(adapters, out, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize(
    "arguments, weights, rank",
    [
        ([], {"base": 0.5, "own": 0.5}, 4),
        (["--merge=fixed", "--weights=[1.5, -.5]", "--extrapolate"], {"base": 1.5, "own": -0.5}, 4),
        (["--merge=ties", "--density=.3"], {"base": 1.0, "own": 1.0}, 4),
        (["--merge=dare", "--seed=3"], {"base": 0.5, "own": 0.5}, 4),
        (["--merge=dare_ties", "--weights=[1, .5]"], {"base": 1.0, "own": 0.5}, 4),
        (["--merge=magnitude_prune", "--compress_rank=1"], {"base": 0.5, "own": 0.5}, 1),
        (["--merge=factors"], {"base": 0.5, "own": 0.5}, 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_merges_into_one_recorded_folder(adapters, tmp_path, capsys, arguments, weights, rank):
    out = tmp_path / "deep" / "merged"
    merge(adapters, out, *arguments)
    said = capsys.readouterr().out
    assert str(out) in said and f"rank {rank}" in said and all(f"{n} {w:.4g}" in said for n, w in weights.items())
    record = json.loads((out / "merge.json").read_text())
    assert record["weights"] == weights and record["split"] is None
    assert [source["name"] for source in record["sources"]] == ["base", "own"]
    for source, folder in zip(record["sources"], adapters, strict=True):
        data = Path(folder, "adapter_model.safetensors").read_bytes()
        assert source["sha256"] == hashlib.sha256(data).hexdigest()
        assert source["sha256"] in (out / "README.md").read_text()
    merged = read_adapter(out)
    assert merged.config["r"] == rank and merged.modules == MODULES


def test_settings_used_are_recorded_with_their_defaults(adapters, tmp_path):
    for method, settings in {
        "ties": {"density": 0.5},
        "dare": {"density": 0.5, "seed": 0},
        "orthogonal_residual": {"residual": 0.1},
    }.items():
        merge(adapters, tmp_path / method, f"--merge={method}")
        record = json.loads((tmp_path / method / "merge.json").read_text())
        assert record["settings"] == settings | {"extrapolate": False}


def test_weights_by_module_are_recorded_and_told(adapters, tmp_path, capsys):
    merge(adapters, tmp_path / "out", "--merge=orthogonal_residual", "--residual=.4")
    assert "means over modules" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["granularity"] == "module" and list(record["weights"]) == MODULES
    assert all(row["own"] == pytest.approx(0.4) and row["base"] != 1 for row in record["weights"].values())


def test_names_tell_equal_folder_names_apart(tmp_path, capsys):
    one, two = (write(tmp_path / run / "lora", seed) for seed, run in enumerate(("r1", "r2")))
    assert "two adapters are named 'lora'" in failing(capsys, [one, two], tmp_path / "out")
    merge([f"a.b={one}", f"c={two}"], tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]) == ["a.b", "c"]


def test_an_adapter_of_the_hub_is_read_as_the_key_adapters_reads_it(adapters, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repo, file, revision):
        asked.append((repo, revision))
        return str(Path(adapters[1]) / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    merge([adapters[0], "me/lora@v1", "theirs=me/other"], tmp_path / "out")
    assert {*asked} == {("me/lora", "v1"), ("me/other", None)}
    assert list(json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]) == ["base", "lora@v1", "theirs"]
    monkeypatch.undo()
    capsys.readouterr()
    assert "--adapters: cannot load the adapter me/lora (" in failing(capsys, [adapters[0], "me/lora"], tmp_path / "more")


def test_folder_with_an_equals_sign_is_a_folder(tmp_path):
    merge([write(tmp_path / "lr=1", 0), write(tmp_path / "own", 1)], tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]) == ["lr=1", "own"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--merge=entropy"], "--model=LoRACocktail --merge=entropy"),
        (["--merge=grid"], "--model=LoRACocktail --merge=grid"),
        (["--merge=tiess"], "did you mean 'ties'"),
        (["--weights=[.5, .5]"], "--weights has no effect with --merge=uniform"),
        (["--merge=orthogonal_residual", "--weights=[.5, .5]"], "--weights has no effect with --merge=orthogonal_residual"),
        (["--merge=fixed", "--weights=[.5]"], "give one weight for each of"),
        (["--merge=fixed"], "give one weight for each of"),
        (["--merge=fixed", "--weights=[1.5, -.5]"], "merge_extrapolate"),
        (["--merge=fixed", "--density=.5"], "--density has no effect with --merge=fixed"),
        (["--merge=ties", "--seed=1"], "--seed has no effect with --merge=ties"),
        (["--merge=ties", "--residual=.1"], "--residual has no effect"),
        (["--merge=ties", "--density=0"], "merge_density"),
        (["--extrapolate"], "no weights are given"),
        (["--compress_rank=0"], "at least 1"),
        (["--what=1"], "no option --what"),
        (["other"], "'other' is not of the form --key=value"),
        (["--weights=a"], "'a' is not a list of numbers, such as [0.3, 0.7]"),
        (["--weights=.3 .7"], "is not a list of numbers"),
        (["--extrapolate=yes"], "invalid choice: 'yes'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(adapters, tmp_path, capsys, arguments, message):
    assert message in failing(capsys, adapters, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_go_together_are_refused(adapters, tmp_path, capsys):
    def refused(folder, *more):
        return failing(capsys, [adapters[0], folder], tmp_path / "out", *more)

    assert "different base models: 'tiny' and 'big'" in refused(write(tmp_path / "big", 1, base="big"))
    unknown = write(tmp_path / "unknown", 1, base=None)
    assert "if they have one, write it into the adapter_config.json of 'unknown', as base_model" in refused(unknown)
    assert "different widths of model.q_proj: (5, 6) and (5, 7)" in refused(write(tmp_path / "wide", 1, width=7))
    assert "'base' and 'r3' have 2 and 3" in refused(write(tmp_path / "r3", 1, r=3), "--merge=factors")
    one = write(tmp_path / "one", 1, modules=MODULES[:1])
    assert "in model.v_proj" in refused(one, "--merge=factors")
    assert "there is no folder" in refused(tmp_path / "absent")
    assert "is neither FOLDER nor NAME=FOLDER" in refused("=x")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.bin").write_bytes(b"pickle")
    assert "pickled adapter_model.bin" in refused(tmp_path / "empty")
    (tmp_path / "r3" / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    refused(tmp_path / "r3")
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_never_overwritten(adapters, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert "is not overwritten" in failing(capsys, adapters, out)
    assert [file.name for file in out.iterdir()] == ["mine"]


def test_a_folder_with_a_blank_is_quoted(tmp_path):
    one, two = write(tmp_path / "my lora", 0), write(tmp_path / "own", 1)
    merge([f"'{one}'", two], tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]) == ["my lora", "own"]


def test_it_is_an_ordinary_function(adapters, tmp_path):
    said = merge_folders(adapters, tmp_path / "out", merge="fixed", weights=[0.25, 0.75])
    assert said == f"{tmp_path / 'out'}: rank 4, fixed of base 0.25, own 0.75"
    with pytest.raises(ValueError, match="give at least one PEFT folder"):
        merge_folders([], tmp_path / "none")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_of_ours_that_was_damaged_is_refused_by_name(file, adapters, tmp_path, capsys):
    """A flipped bit of a weight is another weight, which only the manifest beside it can tell."""
    merge_folders(adapters, tmp_path / "merged")
    damaged = tmp_path / "merged" / file
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    assert f"{damaged} is damaged" in failing(capsys, [adapters[0], tmp_path / "merged"], tmp_path / "out")


def test_an_adapter_that_changes_nothing_or_is_damaged_is_refused(adapters, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    file, config = Path(adapters[1], "adapter_model.safetensors"), Path(adapters[1], "adapter_config.json")
    tensors, written = load_file(file), json.loads(config.read_text())

    def refused(change=lambda tensor: tensor, **values):
        save_file({key: change(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}, file)
        config.write_text(json.dumps(written | values))
        return failing(capsys, adapters, tmp_path / "out")

    assert "changes nothing: every B A is zero" in refused(torch.zeros_like)
    assert "are NaN or infinite" in refused(lambda tensor: tensor / 0)
    assert "changes nothing: lora_alpha is 0" in refused(lora_alpha=0)
    assert "lora_alpha is nan, not a finite number" in refused(lora_alpha=float("nan"))
    assert "has rank 2, but its adapter_config.json says 3" in refused(r=3)
    assert "peft_type 'LOHA'" in refused(peft_type="LOHA")
    config.write_text("[]")
    assert "it holds a list, not an object" in failing(capsys, adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_and_an_alpha_of_one_module_give_its_scaling(tmp_path):
    folder = Path(write(tmp_path / "a", 0, r=2))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {
        f"base_model.model.model.v_proj.lora_{f}.weight": t for f, t in (("A", torch.ones(4, 6)), ("B", torch.ones(5, 4)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for rs, expected in ((False, {"q_proj": 2.0, "v_proj": 0.25}), (True, {"q_proj": 4 / 2**0.5, "v_proj": 0.5})):
        patterns = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 1}, "use_rslora": rs}
        (folder / "adapter_config.json").write_text(json.dumps(config | patterns))
        adapter = read_adapter(folder)
        assert {name: adapter.scaling(f"model.{name}") for name in expected} == pytest.approx(expected)
