"""The stages of a past run are those that its record names; what it does not name is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from recbole_llm.store.recorded_stages import RecordedStages
from recbole_llm.store.stages import Stage, StageCache, Work


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def stages(ran: list[str]) -> tuple[Stage, Stage]:
    def build(name: str):
        def write(work: Work) -> None:
            ran.append(name)
            (work.out / "result.txt").write_text(name)

        return write

    upstream = Stage("up", {"code": "then"}, build("up"))
    return upstream, Stage("model", {"code": "then"}, build("model"), inputs=(upstream,))


def later(stages: tuple[Stage, Stage]) -> tuple[Stage, Stage]:
    """The same stages as a later version of the code plans them."""
    upstream = Stage("up", {"code": "now"}, stages[0].build)
    return upstream, Stage("model", {"code": "now"}, stages[1].build, inputs=(upstream,))


def test_recorded_folders_are_used_whatever_the_code_names(tmp_path: Path, stages: tuple[Stage, Stage], ran: list[str]) -> None:
    before = StageCache(tmp_path)
    before.run(stages[1])
    recorded = {name: folder.name for name, folder in before.folders.items()}
    upstream, model = later(stages)
    past = RecordedStages(tmp_path, recorded=recorded)
    assert past.run(model) == before.folder(stages[1]) and ran == ["up", "model"]
    assert past.folder(upstream) == before.folder(stages[0])
    # a stage that the record does not name is computed, with its inputs
    other = Stage("other", {}, stages[0].build, inputs=(Stage("new input", {}, stages[0].build), upstream))
    past.run(model, other)
    assert ran == ["up", "model", "up", "up"] and past.folder(other).is_dir()


def test_an_input_that_a_recorded_stage_no_longer_needs_is_not_computed(
    tmp_path: Path, stages: tuple[Stage, Stage], ran: list[str]
) -> None:
    before = StageCache(tmp_path)
    before.run(stages[1])
    recorded = {"model": before.folders["model"].name}
    RecordedStages(tmp_path, recorded=recorded).run(later(stages)[1])
    assert ran == ["up", "model"]


@pytest.mark.parametrize("damaged", ["up", "model"])
def test_damage_is_named_with_how_to_repeat_the_run(tmp_path: Path, stages: tuple[Stage, Stage], damaged: str) -> None:
    before = StageCache(tmp_path)
    before.run(stages[1])
    (before.folders[damaged] / "result.txt").write_text("other")
    recorded = {name: folder.name for name, folder in before.folders.items()}
    past = RecordedStages(tmp_path, recorded=recorded, again="repeat the run (--model=SASRec)")
    with pytest.raises(ValueError, match=rf"the stage {damaged} .* missing or damaged .*; repeat the run \(--model=SASRec\)"):
        past.run(later(stages)[1])
    assert before.folders[damaged].is_dir()  # nothing is deleted


def test_of_two_stages_of_one_name_each_has_its_own_folder(tmp_path: Path, stages: tuple[Stage, Stage]) -> None:
    first, second = stages[0], Stage("up", {"of": "a retriever"}, stages[0].build)
    before = StageCache(tmp_path)
    before.run(first)
    before.run(second)
    recorded = {name: folder.name for name, folder in before.folders.items()}
    past = RecordedStages(tmp_path, recorded=recorded)
    assert [past.folder(stage) for stage in (first, second)] == [before.folder(stage) for stage in (first, second)]


def roles(code: str) -> tuple[Stage, Stage]:
    """A retriever and another part of the same model with other settings, as a state of the code names them."""

    def build(work: Work) -> None:
        (work.out / "result.txt").write_text(code)

    retriever = Stage("cf-SASRec", {"epochs": 9, "code": code}, build, role="retriever")
    return retriever, Stage("cf-SASRec", {"epochs": 1, "code": code}, build, role="cf_model")


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_of_one_name_are_told_apart_by_their_roles_after_a_change_of_code(first: int, tmp_path: Path) -> None:
    before, then = StageCache(tmp_path), roles("then")
    before.run(then[first])
    before.run(then[1 - first])
    past = RecordedStages(tmp_path, recorded={name: folder.name for name, folder in before.folders.items()})
    assert [past.folder(stage) for stage in roles("now")] == [before.folder(stage) for stage in then]


def test_of_a_changed_role_only_the_very_same_stage_is_that_of_the_run(tmp_path: Path) -> None:
    before, (stage, _) = StageCache(tmp_path), roles("then")
    before.run(stage)
    recorded = {name: folder.name for name, folder in before.folders.items()}
    past = RecordedStages(tmp_path / "new", recorded=recorded, run_root=tmp_path, changed=frozenset({"retriever"}))
    other, _ = roles("now")
    assert past.folder(stage) == before.folder(stage)
    assert past.run(other) == tmp_path / "new" / other.folder_name and (past.folder(other) / "result.txt").read_text() == "now"
