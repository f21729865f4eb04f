"""The package's own property files: complete, of the right types, and each key defined once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import recbole

from recbole_llm import registry
from recbole_llm.config import LLMConfig
from recbole_llm.config.checks import check
from recbole_llm.config.property_files import PropertyFiles, properties_folder, read_yaml
from recbole_llm.data.domains import POSITIONS
from recbole_llm.evaluation import slices
from recbole_llm.llm.builtin_lm import BuiltinLMConfig
from recbole_llm.llm.scoring import NORMALIZATIONS, STRATEGIES
from recbole_llm.model.laser.towers import POOLINGS, STATES
from recbole_llm.model.laser.training import OPTIMIZERS
from recbole_llm.model.weaverec import SCHEMES
from recbole_llm.training.schedule import KINDS
from tests.config.conftest import PROPERTIES, write


def test_every_model_has_a_property_file_and_no_other_has() -> None:
    assert {file.stem for file in (properties_folder() / "model").glob("*.yaml")} == set(registry.MODELS)


def given_file(file: Path, llm_settings: dict[str, str]) -> tuple[str, str, list[str] | None, dict[str, str]]:
    """The run in which a file of properties/ decides: model, dataset, config files, backbone."""
    parent, inside_llm = file.parent.name, file.parent.parent.name == "llm"
    if parent == "text_encoder":
        return "AlphaRec", "tiny", None, {"text_encoder": file.stem}
    if parent in ("weaverec", "tallrec", "tuned") or file.parent.parent.name == "tuned":
        model, dataset = {"weaverec": ("WeaveRec", "tiny"), "tallrec": ("TALLRec", "tiny")}.get(parent, (file.stem, parent))
        return model, dataset, [str(file)], llm_settings
    if parent == "llm" or inside_llm:
        return file.stem if inside_llm else "Pop", "tiny", None, {"llm": parent if inside_llm else file.stem}
    return file.stem if parent == "model" else "Pop", file.stem if parent == "dataset" else "tiny", None, llm_settings


@pytest.mark.parametrize("file", PROPERTIES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_property_files_say_what_a_run_reads(file: Path) -> None:
    if file.parent.name == "parts":
        own = {"collaborative": "ALLMRec", "amazon": "Pop", "latest_items": "NearestTitles"}
        model = own.get(file.stem, "LoRACocktail")
        dataset, files, llm = "amazon-beauty" if file.stem == "amazon" else "tiny", None, {"llm_path": "x"}
    else:
        model, dataset, files, llm = given_file(file, {"llm_path": "builtin"})
    config = LLMConfig(model, dataset, files, config_dict=llm)
    values = read_yaml(file)
    extends = values.pop("extends", [])
    assert values or extends
    for name in [extends] if isinstance(extends, str) else extends:
        assert (properties_folder() / f"{name}.yaml").is_file()
    if "eval_args" in values:
        values["eval_args"].pop("mode")  # RecBole sees another one
    if "train_neg_sample_args" in values:  # RecBole has a long way to say none
        assert values.pop("train_neg_sample_args") is None and config["train_neg_sample_args"]["distribution"] == "none"
    recipe = read_yaml(properties_folder() / "model" / f"{model}.yaml") if file.parent.name == "parts" and model != "Pop" else {}
    recipe |= read_yaml(properties_folder() / "parts" / "columns.yaml") if dataset == "tiny" else {}  # it has no property file
    for key, value in values.items():
        value = recipe.get(key, value)
        assert config[key] == (config[key] | value if isinstance(value, dict) else value), key
    LLMConfig(model, dataset, [write(Path("as_given.yaml"), **read_yaml_keys(file))], config_dict=llm)  # types and keys are right


def read_yaml_keys(file: Path) -> dict[str, Any]:
    return {key: value for key, value in read_yaml(file).items() if key != "extends"}


DEFINITIONS = PropertyFiles(properties_folder()).definitions


def test_a_key_is_defined_once(folder: Path) -> None:
    assert len(DEFINITIONS) > 150
    with (folder / "model" / "Laser.yaml").open("a") as stream:
        stream.write("r: 8  # (int) rank\n")
    with pytest.raises(ValueError, match=r"r is defined in .*Laser\.yaml and in .*overall\.yaml; keep the type in one comment"):
        _ = PropertyFiles(folder).definitions


def test_every_value_of_ours_has_the_type_of_its_key() -> None:
    """No file of properties/ has a key without a type, or another value than a user may give."""
    for file in PROPERTIES:
        check(read_yaml_keys(file), str(file), PropertyFiles(properties_folder()), {})


def test_every_key_of_recbole_has_a_type_that_its_defaults_have() -> None:
    """So nothing that RecBole sets itself is refused; and each key that its code reads is known."""
    folder = Path(recbole.__file__).parent
    files = [file for file in folder.glob("properties/**/*.yaml") if file.name not in ("url.yaml", "kg_url.yaml")]
    assert len(files) > 90
    for file in files:
        check(read_yaml(file), str(file), PropertyFiles(properties_folder()), {})
    made = {"MODEL_TYPE", "MODEL_INPUT_TYPE", "device", "eval_type", "valid_neg_sample_args", "test_neg_sample_args"}
    made |= {"feature_num", "cin"}  # by KD_DAGFM for its own use
    code = [
        file for name in ("config", "data", "evaluator", "model", "trainer/trainer.py") for file in (folder / name).rglob("*.py")
    ]
    code.append(folder / "trainer" / "trainer.py")
    for file in code:
        read = set(re.findall(r"config\[\s*[\"']([a-z]\w*)[\"']\s*\]", file.read_text(encoding="utf-8")))
        assert not read - DEFINITIONS.keys() - made, file


def test_choices_are_those_of_the_code() -> None:
    assert set(DEFINITIONS["scorer"].choices) == set(STRATEGIES)
    assert set(DEFINITIONS["normalize"].choices) == {*NORMALIZATIONS, "pmi"}
    assert set(DEFINITIONS["lr_scheduler_type"].choices) == set(KINDS)
    assert set(DEFINITIONS["train_positions"].choices) == set(DEFINITIONS["general_positions"].choices) == set(POSITIONS)
    assert set(DEFINITIONS["pooling"].choices) == set(POOLINGS) and set(DEFINITIONS["cf_states"].choices) == set(STATES)
    assert set(DEFINITIONS["laser_optimizer"].choices) == set(OPTIMIZERS)
    assert set(DEFINITIONS["weave"].choices) == set(DEFINITIONS["weave_controls"].types[0].entries[0].choices) == set(SCHEMES)
    assert {name.partition(".")[2] for name in DEFINITIONS if name.startswith("slices.")} == set(slices.NAMES)


def test_every_key_that_is_read_is_defined() -> None:
    made = {
        "MODEL_TYPE",
        "MODEL_INPUT_TYPE",
        "device",
        "eval_type",
        "candidate_phases",
        "full_phases",
    }
    for file in (properties_folder().parent / "recbole_llm").rglob("*.py"):
        read = set(re.findall(r"\bconfig\[[\"'](\w+)[\"']\]", file.read_text(encoding="utf-8")))
        read -= {"peft_type"} if file.name == "arithmetic.py" else set()  # adapter_config.json
        assert not read - DEFINITIONS.keys() - made, f"{file}: nothing defines {read - DEFINITIONS.keys() - made}"


def test_the_builtin_lm_has_the_same_defaults_in_its_file() -> None:
    assert BuiltinLMConfig(**LLMConfig("TALLRec", "tiny", config_dict={"llm_path": "builtin"})["builtin_lm"]) == BuiltinLMConfig()
