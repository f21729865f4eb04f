"""Adapters of the user's own: used in place of a training, and refused before anything is trained if they do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recbole_llm.llm import finetune
from recbole_llm.llm.adapter_folders import CONFIG_FILE, WEIGHTS_FILE
from recbole_llm.llm.lora import attach_lora, lora_modules, save_adapter
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import write_lm

Run = Callable[..., dict[str, Any]]


def make(base: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A PEFT folder with random values for a base model."""
    model = attach_lora(
        AutoModelForCausalLM.from_pretrained(base),
        name="x",
        seed=seed,
        **{"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **changes},
    )
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        weight = layer.lora_B["x"].weight
        weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    save_adapter(model, "x", folder)
    return folder


def changed(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], factor: str = "lora_B") -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key: change(t) if factor in key else t for key, t in tensors.items()}, folder / WEIGHTS_FILE)


def configured(folder: Path, **values: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of adapters that are trained from here on."""
    names: list[str] = []
    attach = finetune.attach_lora

    def noted(*args: Any, **options: Any) -> Any:
        names.append(options["name"])
        return attach(*args, **options)

    monkeypatch.setattr(finetune, "attach_lora", noted)
    return names


def record(result: dict[str, Any]) -> dict[str, Any]:
    return json.loads(Path(result["record"]).read_text())


def test_a_trained_adapter_given_back_scores_alike_and_trains_nothing(
    settings: dict[str, Any], tmp_path: Path, trained: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = record(run_recbole_llm("TALLRec", "tiny", config_dict=settings))
    assert trained == ["ingredient"]
    folder = tmp_path / "mine"
    shutil.copytree(tmp_path / "saved" / "stages" / before["stages"]["ingredient"], folder)
    caplog.clear()
    after = record(run_recbole_llm("TALLRec", "tiny", config_dict={**settings, "adapters": {"tuned": str(folder)}}))
    assert trained == ["ingredient"] and before["ranks"]["TALLRec"] == after["ranks"]["TALLRec"]
    assert (before["trained_parameters"] > 0, after["trained_parameters"]) == (True, 0)
    assert list(after["stages"]) == ["given-tuned"] and before["given_adapters"] == {}
    given = after["given_adapters"]["tuned"]
    assert given["folder"] == str(folder) and len(given["sha256"]) == 64
    text = "\n".join(caplog.messages)
    assert "used as it is" in text and "rank 4, scaling" in text
    assert f"given adapter tuned: {folder} ({given['sha256'][:8]})" in text  # the heading of the table


@pytest.mark.slow
def test_the_merge_follows_what_is_in_the_folder(
    settings: dict[str, Any], tmp_path: Path, tiny_lm: Path, trained: list[str]
) -> None:
    """Another rank, scaling and set of modules than the adapter that is trained beside it; then other values at the same path."""
    folder = make(tiny_lm, tmp_path / "spirit", r=2, use_rslora=True, target_modules=["q_proj", "up_proj"])
    config = {**settings, "adapters": {"base spirit": str(folder)}, "category_field": None}  # no general domain is needed
    first = record(run_recbole_llm("LoRACocktail", "tiny", config_dict={**config, "merge_granularity": "module"}))
    assert trained == ["ingredient"]
    sha = first["given_adapters"]["base spirit"]["sha256"]
    assert list(first["results"]) == [
        "LoRACocktail",
        "uniform mix",
        f"base spirit (given {sha[:8]})",
        "ingredient",
        "no adapter",
    ]
    changed(folder, lambda tensor: 2 * tensor)
    second = record(run_recbole_llm("LoRACocktail", "tiny", config_dict={**config, "merge_granularity": "module"}))
    assert trained == ["ingredient"] and first["stages"]["ingredient"] == second["stages"]["ingredient"]
    for name in ("given-base-spirit", "cocktail"):
        assert first["stages"][name] != second["stages"][name]
    assert second["given_adapters"]["base spirit"]["sha256"] != sha


def test_an_unknown_name_lists_the_models_adapters(settings: dict[str, Any], assemble: Any, tmp_path: Path) -> None:
    for model, known in (
        ("TALLRec", "it has 'tuned'"),
        ("LlamaRec", "it has 'tuned'"),
        ("MoLoRec", "it has 'base spirit', 'ingredient'"),
        ("WeaveRec", "it has 'target only', 'hybrid tiny-comedy', 'hybrid tiny-drama'"),
    ):
        changes = {"scorer": "label"} if model == "LlamaRec" else {}
        with pytest.raises(ValueError, match=f"adapters: {model} has no adapter 'spirit'; {known}"):
            assemble(model, {**settings, **changes, "lora_train_mode": "prefix"}, adapters={"spirit": str(tmp_path)})


def damage_nan(folder: Path) -> None:
    changed(folder, lambda tensor: tensor.fill_(float("nan")))


def damage_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(999, 32)}, folder / WEIGHTS_FILE)


def with_base_layer(folder: Path) -> None:
    """As peft's ``save_pretrained`` writes an adapter of lm_head."""
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "base_model.model.lm_head.base_layer.weight": torch.zeros(310, 32)}, folder / WEIGHTS_FILE)


def damage_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(i): i for i in range(999)}, unk_token="0")).save(str(folder / "tokenizer.json"))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: configured(f, base_model_name_or_path="org/other"),
            "trained on 'org/other', but the backbone is 'tiny-llama'",
        ),
        (lambda f: configured(f, r=4), "has rank 3, but its adapter_config.json says 4"),
        (lambda f: configured(f, r=0), "r is 0, not a whole number of at least 1"),
        (lambda f: configured(f, lora_alpha=float("nan")), "lora_alpha is nan, not a finite number"),
        (
            lambda f: configured(f, alpha_pattern={"q_proj": float("inf")}),
            r"alpha_pattern\['q_proj'\] is inf, not a finite number",
        ),
        (lambda f: configured(f, lora_alpha=0), "changes nothing: lora_alpha is 0"),
        (lambda f: configured(f, peft_type="LOHA"), "peft_type 'LOHA' cannot be summed"),
        (lambda f: configured(f, peft_type=None), "peft_type None cannot be summed"),
        (lambda f: configured(f, base_model_name_or_path=3), "base_model_name_or_path is 3, not a text"),
        (lambda f: configured(f, r=3.0), "peft cannot read its adapter_config.json"),
        (lambda f: configured(f, rank_pattern=None), "peft cannot read its adapter_config.json"),
        (lambda f: configured(f, task_type="ODD"), "Invalid task type"),
        (with_base_layer, r"lm_head.base_layer.weight, the base model's own matrix, .* save_embedding_layers=False"),
        (lambda f: configured(f, use_dora=True), "with use_dora=True it is not exactly"),
        (lambda f: configured(f, target_modules=["query"]), r"its target_modules \['query'\] do not fit the backbone"),
        (lambda f: configured(f, target_modules=["q_proj"]), "layers.0.mlp.down_proj.lora_A.weight is .* takes absent"),
        (lambda f: (f / CONFIG_FILE).write_text("[1]"), "is damaged: it holds a list, not an object"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "is damaged: it is not JSON"),
        (lambda f: (f / CONFIG_FILE).unlink(), "has no adapter_config.json"),
        (lambda f: changed(f, torch.zeros_like), "changes nothing: every B A is zero"),
        (damage_nan, "has values that are NaN or infinite"),
        (damage_vocabulary, "holds the whole matrix .*embed_tokens.weight of 999 tokens"),
        (damage_tokenizer, "the tokenizer beside it has 999 tokens, but the backbone has"),
        (
            lambda f: (f / "tokenizer.json").write_text("{"),
            "the tokenizer beside it cannot be read .*; copy .*/mine/tokenizer.json",
        ),
        (pickled, "has a pickled adapter_model.bin"),
        (truncated, "is damaged"),
        (shutil.rmtree, "there is no folder"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_refused_before_anything_is_trained(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tiny_lm: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = make(tiny_lm, tmp_path / "mine")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        assemble("TALLRec", settings, adapters={"tuned": str(folder)})
    assert "adapters['tuned']" in str(caught.value) and str(folder) in str(caught.value)
    assert not (tmp_path / "saved" / "stages").exists()


@pytest.mark.parametrize(
    "base", [None, "", "tiny-llama/", "./tiny-llama", "models/tiny-llama/", "/elsewhere/tiny-llama", "org/Tiny-Llama"]
)
def test_a_base_model_that_may_be_the_backbone_is_accepted(
    base: str | None, settings: dict[str, Any], assemble: Any, tmp_path: Path, tiny_lm: Path
) -> None:
    folder = make(tiny_lm, tmp_path / "mine")
    configured(folder, base_model_name_or_path=base)
    assert assemble("TALLRec", settings, adapters={"tuned": str(folder)}).model.given.folders["tuned"] == folder


def test_factors_of_another_rank_or_of_other_modules_are_refused_before_the_training(
    settings: dict[str, Any], assemble: Any, tiny_lm: Path, tmp_path: Path
) -> None:
    def planned(method: str, **changes: Any) -> Any:
        given = make(tiny_lm, tmp_path / "given", **changes)
        made = assemble("LoRACocktail", settings, merge=method, adapters={"base spirit": str(given)})
        return made.model.plan(made.candidates)

    with pytest.raises(ValueError, match="factors needs .* 'base spirit' has rank 3 in 14 modules, and 'ingredient' rank 4"):
        planned("factors")
    with pytest.raises(ValueError, match="'base spirit' has rank 4 in 2 modules, and 'ingredient' rank 4 in 14; use 'uniform'"):
        planned("factors", r=4, target_modules=["q_proj"])
    assert planned("factors", r=4) and planned("ties")


def test_general_datasets_beside_a_given_base_spirit_are_refused(
    settings: dict[str, Any], assemble: Any, tiny_lm: Path, tmp_path: Path
) -> None:
    given = {"base spirit": str(make(tiny_lm, tmp_path / "given"))}
    with pytest.raises(ValueError, match=r"general_datasets: \['other'\] train the base spirit, which adapters gives"):
        assemble("LoRACocktail", settings, general_datasets=["other"], adapters=given)


def test_one_of_another_size_is_refused(settings: dict[str, Any], assemble: Any, tmp_path: Path) -> None:
    wider = write_lm(tmp_path / "tiny-llama", hidden=48)  # the same name
    folder = make(wider, tmp_path / "mine", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is \[3, 48\] .* takes \[3, 32\]"):
        assemble("TALLRec", settings, adapters={"tuned": str(folder)})


def test_ranks_and_alphas_by_module_are_read_right(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tiny_lm: Path
) -> None:
    """The scores are those of peft with the same folder."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_lm), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "mine")
    made = assemble("TALLRec", settings, adapters={"tuned": str(tmp_path / "mine")})
    made.trainer.fit(made.train, made.valid)
    interaction, _, _, targets = next(iter(made.test))
    listed = made.test.candidates.lookup(interaction["user_id"], targets)[:5]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), tmp_path / "mine").eval()
    likelihood = made.model.parts.likelihood(made.model.parts.backbone.load(made.trainer.cache))
    with torch.no_grad():
        ours = made.model.score_candidates(interaction[:5], listed)
        expected = made.model.variant(likelihood.with_lm(plain)).score(interaction[:5], listed)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_hub_id_is_read_from_the_cache(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "hub" / "models--owner--lora"
    make(tiny_lm, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    made = assemble("TALLRec", settings, adapters={"tuned": "owner/lora"})
    assert made.model.given.folders["tuned"].name == commit
    assert made.model.facts().given_adapters["tuned"]["folder"] == "owner/lora"
    with pytest.raises(FileNotFoundError, match="cannot load the adapter owner/none.*HF_HOME.*hf download owner/none"):
        assemble("TALLRec", settings, adapters={"tuned": "owner/none"})


@pytest.mark.slow
def test_an_adapter_of_the_builtin_lm_belongs_to_one_training_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    small = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 2000}
    config = {**settings, "llm_path": "builtin", "builtin_lm": small}
    before = record(run_recbole_llm("TALLRec", "tiny", config_dict=config))
    folder = tmp_path / "mine"
    shutil.copytree(tmp_path / "saved" / "stages" / before["stages"]["ingredient"], folder)
    config["adapters"] = {"tuned": str(folder)}
    after = record(run_recbole_llm("TALLRec", "tiny", config_dict=config))
    assert after["ranks"]["TALLRec"] == before["ranks"]["TALLRec"] and "given-tuned" in after["stages"]
    with pytest.raises(ValueError, match="was trained on 'builtin-lm-.*', but the backbone is 'builtin-lm-"):
        run_recbole_llm("TALLRec", "tiny", config_dict={**config, "builtin_lm": small | {"tokens": 3000}})
    with pytest.raises(ValueError, match="was trained on 'builtin-lm-.*', but the backbone is 'tiny-llama'"):
        run_recbole_llm("TALLRec", "tiny", config_dict={**config, "llm_path": settings["llm_path"]})


@pytest.mark.slow
def test_the_full_model_of_a_merge_scores_as_the_merged_adapter(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, tiny_lm: Path, trained: list[str]
) -> None:
    given = {name: str(make(tiny_lm, tmp_path / name, seed)) for seed, name in enumerate(("base spirit", "ingredient"), 1)}
    full = tmp_path / "full"
    config = {**settings, "adapters": given, "merge_full_model": str(full)}
    first = run_recbole_llm("MoLoRec", "tiny", config_dict=config)
    assert not trained and record(first)["trained_parameters"] == 0
    again = run_recbole_llm("MoLoRec", "tiny", config_dict={**config, "merge_full_model": None})
    assert again["record"] == first["record"]  # the key changes no result
    own = record(
        run_recbole_llm("TALLRec", "tiny", config_dict={**settings, "llm_path": str(full), "adapters": {}, "lora_epochs": 1})
    )
    rows = record(first)["ranks"]
    assert own["ranks"]["no adapter"] == rows["MoLoRec"] != rows["no adapter"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="merge_full_model: .*taken exists and is not a full model"):
        assemble("MoLoRec", {**config, "merge_full_model": str(tmp_path / "taken")})
