"""Building and planning a model trains nothing, and its plan lists the stages of all its parts."""

from pathlib import Path

import pytest
from recbole.model.abstract_recommender import AbstractRecommender

import recbole_llm.model
from recbole_llm.classical.trainer import ProtocolTrainer
from recbole_llm.config import LLMConfig
from recbole_llm.costs.plan import TO_RUN
from recbole_llm.llm import backbones, text_backbone
from recbole_llm.planner import plan_of
from recbole_llm.registry import MODELS, SHORTCUTS
from recbole_llm.store.stages import StageCache
from recbole_llm.training.loop import TrainingLoop
from tests.contract.models import BASELINES, OWN, SMALL_LM, TRAINED


@pytest.fixture
def no_training(monkeypatch) -> None:
    """Whatever trains, runs a stage or loads weights of a backbone fails."""

    def forbidden(*arguments, **keywords):
        raise AssertionError("something is trained or loaded before fit")

    for owner, function in (
        (TrainingLoop, "run"),
        (ProtocolTrainer, "fit"),
        (StageCache, "_run"),
        (backbones, "load_causal_lm"),
        (text_backbone, "load_text_encoder"),
    ):
        monkeypatch.setattr(owner, function, forbidden)


@pytest.mark.parametrize(
    ("name", "llm_path"), [*((name, None) for name in (*MODELS, *BASELINES)), *((name, "builtin") for name in TRAINED)]
)
def test_constructing_and_planning_train_nothing_and_load_no_weights(name, llm_path, settings, assemble, no_training):
    changes = {"llm_path": llm_path or settings["llm_path"], "candidates": {"num_negatives": 9, "source": "retriever"}}
    built = assemble(name, {**settings, **OWN.get(name, {}), **changes})
    assert not list(Path(settings["checkpoint_dir"]).rglob("*.safetensors"))
    assert not list(Path(settings["checkpoint_dir"]).glob("stages/*"))
    assert bool(built.trainer.plan(built.candidates)) == (name in [*TRAINED, "NearestTexts"])


@pytest.mark.parametrize("name", [*MODELS, "SASRec"])
@pytest.mark.parametrize("case", ["candidates", "full ranking", "candidates of a retriever"])
def test_the_plan_lists_the_builtin_lm_the_text_encoder_and_the_retriever(name, case, settings, assemble):
    changes = {"llm_path": "builtin", "builtin_lm": SMALL_LM, **OWN.get(name, {})}
    # as in llm/builtin/LlamaRec.yaml: its plan reads the labels as tokens
    labels = {"prompts": {"labelled": "{history}\n?\n{candidates}\n="}, "retriever_top": 10}
    changes |= labels if name == "LlamaRec" else {}
    if case == "full ranking":
        changes |= {"eval_args": {"mode": {"valid": "candidates", "test": "full"}}}
    if case == "candidates of a retriever":
        changes |= {"candidates": {"num_negatives": 9, "source": "retriever"}}
    run = assemble(name, {**settings, **changes})
    plan = plan_of(run.trainer, run.stages, run.train, run.valid, run.test, run.retriever)
    listed = [line.name for line in plan.lines]
    ranker = name not in ("Laser", "AlphaRec", "Imported", "SASRec", *SHORTCUTS)
    expected = {
        "builtin-lm": ranker or name == "Laser",
        "builtin-text-encoder": name in ("ALLMRec", "AlphaRec", "NearestTexts"),
        "cf-SASRec": name in ("ALLMRec", "Laser", "Cascade") or (ranker and case == "full ranking") or case.endswith("retriever"),
    }
    assert {stage: stage in listed for stage in expected} == expected
    assert all(line.status in ("", TO_RUN) for line in plan.lines) and not list(Path(settings["checkpoint_dir"]).glob("stages/*"))


@pytest.mark.parametrize("name", [*MODELS])
def test_at_most_three_levels_of_classes_stand_above_recboles_base(name):
    """The protocol of the evaluation, which is no model, does not count."""
    found = LLMConfig(name, "tiny", config_dict={"data_path": "data"}).model_class
    own = [cls for cls in found.__mro__ if cls.__module__.startswith("recbole_llm") and issubclass(cls, AbstractRecommender)]
    assert own[0].__name__ == name and len(own) <= 3, own


def test_a_model_file_is_read_in_one_sitting():
    (folder,) = recbole_llm.model.__path__
    lines = {str(file): len(file.read_text().splitlines()) for file in Path(folder).rglob("*.py")}
    assert len(lines) > 10 and {name: number for name, number in lines.items() if number > 300} == {}
