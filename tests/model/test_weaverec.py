"""WeaveRec: hybrids are the same for either target, trained once for all, and stand beside what the paper compares with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from recbole_llm.config.property_files import properties_folder
from recbole_llm.llm.adapter_folders import WEIGHTS_FILE
from recbole_llm.llm.lora import AdapterView, load_adapters
from recbole_llm.model import adapters, assembly
from recbole_llm.model.adapters import AdapterSpec, AdapterTraining
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.store.stages import Work
from tests.conftest import write_dataset

NAMES = ["tiny", "other", "third"]
ROWS = {"naive merging", "target only", "hybrid other", "data merging", "other only", "no adapter"}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def settings(module_settings: dict[str, Any], data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three datasets; ``lora_epochs: 2`` is enough for adapters that differ."""
    folder = tmp_path_factory.mktemp("three")
    for name in ("tiny", "other"):
        (folder / name).symlink_to(data_path / name)
    write_dataset(folder, "third", seed=2)
    return {**module_settings, "data_path": str(folder), "lora_epochs": 2}


@pytest.fixture(scope="module")
def woven(settings: dict[str, Any], assemble: Any, tiny_lm: Path) -> Any:
    """A trained WeaveRec on ``tiny`` with the source ``other``; ``lm`` is another copy of its LM with all its adapters."""
    from transformers import AutoModelForCausalLM

    made = assemble("WeaveRec", settings, source_datasets=["other"])
    made.trainer.fit(made.train, made.valid)
    made.folders = made.model.adapters(made.trainer.cache)
    made.lm = load_adapters(AutoModelForCausalLM.from_pretrained(tiny_lm), made.folders)
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the adapters that are trained from now on."""
    names: list[str] = []
    finetune = adapters.finetune

    def noted(model: Any, name: str, *args: Any, **kwargs: Any) -> None:
        names.append(name)
        finetune(model, name, *args, **kwargs)

    monkeypatch.setattr(adapters, "finetune", noted)
    return names


@pytest.fixture
def run(settings: dict[str, Any]) -> Run:
    def run(dataset: str = "tiny", files: list[str] | None = None, **changes: Any) -> dict[str, Any]:
        sources = [name for name in NAMES[:2] if name != dataset]
        changes = {**settings, "source_datasets": sources, **changes}
        return json.loads(Path(run_recbole_llm("WeaveRec", dataset, files, config_dict=changes)["record"]).read_text())

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def logits(lm: Any, **weights: float) -> torch.Tensor:
    """Of a mixture of adapters, with spaces in their names as underscores."""
    view = AdapterView(lm, {name.replace("_", " "): torch.tensor(weight) for name, weight in weights.items()})
    with torch.no_grad():
        return view(torch.arange(10, 30)[None]).logits


# -- the weave ---------------------------------------------------------------------------------------------------------


def test_target_only_and_hybrids_are_merged_evenly(woven: Any) -> None:
    model = woven.model
    assert model.merge_report["method"] == "uniform"
    assert model.merge_report["weights"] == {"target only": 0.5, "hybrid other": 0.5}
    merged = logits(woven.lm, merged=1.0)
    torch.testing.assert_close(merged, logits(woven.lm, target_only=0.5, hybrid_other=0.5), atol=1e-4, rtol=0)
    alone = {name: logits(woven.lm, **{name: 1.0}) for name in woven.folders}
    assert torch.equal(alone["data merging"], alone["hybrid other"])  # of one source they are one adapter
    distinct = {tuple(found.flatten().tolist()) for found in alone.values()}
    assert len(distinct) == len(alone) - 1


def test_a_hybrid_reads_as_much_of_either_domain_and_no_held_out_item(
    settings: dict[str, Any], assemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def noted(self: Any, spec: AdapterSpec, work: Work) -> None:
        seen[spec.name] = spec.sources, self.examples(spec), spec.valid
        (work.out / "done").touch()

    made = assemble("WeaveRec", settings, source_datasets=["other"], train_samples=20, seed=77)
    monkeypatch.setattr(AdapterTraining, "_train", noted)
    for stage in map(made.model.adapter_training.stage, made.model.trained(made.candidates).values()):
        made.trainer.cache.run(stage)
    sources, (rows, held_out), valid = seen["lora-other+tiny"]
    rows += held_out
    assert [domain.name for domain in sources] == ["other", "tiny"]
    assert Counter(row.domain for row in rows) == {0: 20, 1: 20} and valid is None  # stopped on no candidates of a target
    assert [row.domain for row in rows] != sorted(row.domain for row in rows)  # shuffled
    for index, name in enumerate(["lora-other", "lora-tiny"]):  # the same draw of a domain in every adapter
        assert {row[1:] for part in seen[name][1] for row in part} == {row[1:] for row in rows if row.domain == index}


@pytest.mark.slow
def test_a_second_target_reuses_every_adapter(woven: Any, run: Run, trained: list[str], caplog: pytest.LogCaptureFixture) -> None:
    record = run("other")
    assert not trained and all(seconds == 0 for name, seconds in record["stage_seconds"].items() if name != "weave")
    (logged,) = [message for message in caplog.messages if message.startswith("weave of 2 domains")]
    assert "2 single-domain and 1 hybrid adapters" in logged
    state = {line["name"]: line["status"] for line in record["plan"] if line["status"]}
    assert state == {"lora-other": "cached", "lora-other+tiny": "cached", "lora-tiny": "cached", "weave": "to run"}
    hybrid = record["stages"]["lora-other+tiny"]
    assert hybrid == woven.trainer.cache.folder(woven.model.sources["hybrid other"]).name


@pytest.mark.slow
def test_all_targets_of_k_domains_take_k_and_k_choose_2_trainings(run: Run, trained: list[str], tmp_path: Path) -> None:
    for dataset in NAMES:
        sources = [name for name in NAMES if name != dataset]
        run(dataset, source_datasets=sources, weave_controls=["target_only"], checkpoint_dir=str(tmp_path), lora_epochs=1)
    assert Counter(trained) == dict.fromkeys(
        ["lora-tiny", "lora-other", "lora-third", "lora-other+tiny", "lora-third+tiny", "lora-other+third"], 1
    )


def test_the_builtin_lm_reads_all_domains_whoever_is_the_target(
    settings: dict[str, Any], assemble: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 400}
    changes = {"llm_path": "builtin", "builtin_lm": small, "checkpoint_dir": str(tmp_path), "memorisation": True}
    builtin_stage, read, found = assembly.builtin_stage, [], {}

    def noted(config: Any, domains: Any, *rest: Any) -> Any:
        read.append([domain.name for domain in domains])
        return builtin_stage(config, domains, *rest)

    monkeypatch.setattr(assembly, "builtin_stage", noted)
    for dataset, sources in (("tiny", ["other"]), ("other", ["tiny"]), ("tiny", [])):
        model = assemble("WeaveRec", settings, dataset, source_datasets=sources, **changes).model
        found[dataset, bool(sources)] = model.parts.backbone.fingerprint
        assert read[-1] == (["other", "tiny"] if sources else ["tiny"])
        assert model.parts.backbone.stages[0] in model.sources["target only"].inputs
        (memorisation,) = model.memorised.stages
        assert memorisation.inputs == model.parts.backbone.stages  # of the LM that is evaluated, and of no other
    assert found["tiny", True] == found["other", True] != found["tiny", False]  # views hold nothing new


def test_views_of_the_target_stand_in_where_no_source_is_named(settings: dict[str, Any], assemble: Any) -> None:
    model = assemble("WeaveRec", settings).model
    assert [view.name for view in model.others] == ["tiny/comedy", "tiny/drama"]
    assert list(model._specs("hybrid")) == ["target only", "hybrid tiny-comedy", "hybrid tiny-drama"]


# -- controls ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_shows_every_control_on_the_same_candidates(run: Run) -> None:
    record = run()
    assert set(record["results"]) == {"WeaveRec", *ROWS}
    assert len({frozenset(ranks) for ranks in record["ranks"].values()}) == 1  # the same users
    one = run(weave="target_only", weave_controls=[])["trained_parameters"]
    assert record["trained_parameters"] == 2 * one > 0  # target only and the hybrid, no control
    assert record["ranks"]["naive merging"] != record["ranks"]["WeaveRec"]


def test_naive_merging_is_the_mean_of_the_single_domain_adapters(woven: Any) -> None:
    model, names = woven.model, ["target only", "other only"]
    interaction, _, _, targets = next(iter(woven.test))
    candidates = woven.test.candidates.lookup(interaction["user_id"], targets)[:5]
    parts = [weights(woven.folders[name]) for name in names]
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    scale = model.adapter_training.config.lora_alpha / model.adapter_training.config.r
    delta = sum(0.5 * scale * part[module.format("B")] @ part[module.format("A")] for part in parts)
    layer = woven.lm.base_model.model.model.layers[0].self_attn.q_proj
    view = AdapterView(woven.lm, dict.fromkeys(names, torch.tensor(0.5)))
    view.select()
    with torch.no_grad():
        x = torch.randn(3, delta.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ delta.T, atol=1e-5, rtol=1e-4)
        likelihood = model.parts.likelihood(model.parts.backbone.load(woven.trainer.cache)).with_lm(view)
        found = model.variants()["naive merging"].score(interaction[:5], candidates)
        torch.testing.assert_close(found, model.variant(likelihood).score(interaction[:5], candidates), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["target only", "data merging", "naive merging"])
def test_a_control_by_its_property_file_is_the_row_of_the_whole_run(run: Run, trained: list[str], name: str) -> None:
    file = properties_folder() / "weaverec" / f"{name.replace(' ', '-')}.yaml"
    whole = run()
    trained.clear()
    alone = run(files=[str(file)])
    assert not trained
    ours, theirs = (np.array(list(record["ranks"][row].values())) for record, row in ((alone, "WeaveRec"), (whole, name)))
    assert (ours != theirs).mean() < 0.1  # a sum in another order may break a tie
    assert abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_cached_scores_of_a_control_follow_its_adapters(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    """``weave: target_only`` has no part in the sources, but the rows beside it have."""
    changes = {"weave": "target_only", "weave_controls": ["data_merging"], "checkpoint_dir": str(tmp_path)}
    one, other = (run(source_datasets=[source], **changes) for source in ("other", "third"))
    assert one["ranks"]["WeaveRec"] == other["ranks"]["WeaveRec"]
    assert one["ranks"]["data merging"] != other["ranks"]["data merging"]


def test_controls_that_are_not_asked_for_are_not_trained(run: Run, trained: list[str], tmp_path: Path) -> None:
    record = run(weave_controls=[], checkpoint_dir=str(tmp_path), lora_epochs=1)
    assert set(record["results"]) == {"WeaveRec", "target only", "hybrid other", "no adapter"}
    assert sorted(trained) == ["lora-other+tiny", "lora-tiny"]


@pytest.mark.parametrize("scheme", ["naive_merging", "target_only", "data_merging"])
def test_the_hybrids_as_a_control_have_a_row_of_their_own(settings: dict[str, Any], assemble: Any, scheme: str) -> None:
    made = assemble("WeaveRec", settings, source_datasets=["other"], weave=scheme, weave_controls=["hybrid"])
    made.model.plan(made.candidates)
    rows = made.model._mixed(dict.fromkeys(["merged", *made.model.sources], Path()))
    assert rows["WeaveRec"] == {"merged": 1.0}
    assert rows["hybrid merging"] == {"target only": 0.5, "hybrid other": 0.5}


def test_a_choice_by_ranking_that_changes_nothing_is_said(
    settings: dict[str, Any], assemble: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for valid, warned in (("loss", False), ("ranking", True)):
        caplog.clear()
        assemble("WeaveRec", settings | {"source_datasets": ["other"], "lora_valid": valid})
        assert warned is any(message.startswith("lora_valid: ranking changes nothing") for message in caplog.messages)


def test_two_adapters_of_one_name_are_refused(settings: dict[str, Any], assemble: Any) -> None:
    """The second one would take the place of the target's adapter."""
    made = assemble("WeaveRec", settings, source_datasets=["other"], weave="naive_merging", weave_controls=[])
    made.model.others = [replace(made.model.others[0], name="target")]
    with pytest.raises(ValueError, match="source_datasets: target give two adapters of naive merging one name, of target o"):
        made.model.plan(made.candidates)


# -- other merges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "factors"])
@pytest.mark.slow
def test_the_merges_of_the_hook_are_available(woven: Any, run: Run, trained: list[str], method: str) -> None:
    record = run(merge=method, weave_controls=["target_only"], **({"merge_density": 0.7} if method == "ties" else {}))
    assert not trained and record["merge"]["method"] == method
    assert set(record["results"]) == {"WeaveRec", "uniform mix", "target only", "hybrid other", "no adapter"}


@pytest.mark.parametrize("changes", [{"merge": "entropy", "merge_granularity": "module"}, {"merge": "orthogonal_residual"}])
@pytest.mark.slow
def test_coefficients_by_module_are_drawn_in_the_run_folder(
    settings: dict[str, Any], changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**settings, "source_datasets": ["other"], "weave_controls": [], **changes}
    folder = Path(run_recbole_llm("WeaveRec", "tiny", config_dict=changes)["record"]).parent
    assert imread(folder / "coefficients.png").shape[1] > 500
    assert any("coefficients by module" in message for message in caplog.messages)
    plain = run_recbole_llm("WeaveRec", "tiny", config_dict={**changes, "merge": "uniform", "merge_granularity": "global"})
    assert not (Path(plain["record"]).parent / "coefficients.png").exists()


# -- what is refused, and what is not looked at ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weave": "hybrids"},
            "weave: 'hybrids' in .* is not one of hybrid, target_only, data_merging, naive_merging; did you mean 'hybrid'",
        ),
        (
            {"weave_controls": ["target_only", "naive"]},
            r"weave_controls: \['target_only', 'naive'\] in .* of hybrid, .*; change 'naive'$",
        ),
        ({"weave_controls": ["target"]}, r"weave_controls: \['target'\] in .* of hybrid, .*; change 'target' to 'target_only'$"),
        ({"source_datasets": ["other", "other"]}, "source_datasets: other occurs 2 times"),
        ({"source_datasets": ["tiny"]}, "source_datasets: tiny occurs 2 times"),
        ({"source_datasets": [], "category_field": None}, "source_datasets: none given, and tiny has no category_field"),
        ({"merge": "tis"}, "merge: 'tis' is unknown; did you mean 'ties'"),
    ],
)
def test_mistakes_are_refused_before_anything_trains(run: Run, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(checkpoint_dir=str(tmp_path), **changes)
    assert not list(tmp_path.glob("stages/*-*"))


def test_labels_touch_no_adapter(woven: Any, settings: dict[str, Any], assemble: Any, tmp_path: Path) -> None:
    """Users exchange validation and test items with each other: every adapter is bit-equal."""
    folder = tmp_path / "data"
    for name in ("tiny", "other"):
        (folder / name).mkdir(parents=True)
        source = Path(settings["data_path"]) / name
        (folder / name / f"{name}.item").write_text((source / f"{name}.item").read_text())
        header, *lines = (source / f"{name}.inter").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        by_user: dict[str, list[list[str]]] = {}
        for row in rows:
            by_user.setdefault(row[0], []).append(row)
        users = list(by_user.values())
        known = [{row[1] for row in own} for own in users]
        labels = [[row[1] for row in own[-2:]] for own in users]
        changed = 0
        for own, items, others in zip(users, known, labels[1:] + labels[:1], strict=True):
            if not items.intersection(others):
                own[-2][1], own[-1][1] = others
                changed += 1
        assert changed > 10
        (folder / name / f"{name}.inter").write_text("\n".join([header, *map("\t".join, rows)]) + "\n")
    changes = {"data_path": str(folder), "checkpoint_dir": str(tmp_path / "saved")}
    made = assemble("WeaveRec", {**settings, **changes}, source_datasets=["other"])
    made.trainer.fit(made.train, made.valid)
    assert made.candidates["test"].sha256 != woven.candidates["test"].sha256
    folders = made.model.adapters(made.trainer.cache)
    for name, path in woven.folders.items():
        ours, theirs = weights(path), weights(folders[name])
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
