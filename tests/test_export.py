"""``recbole-llm export``: the examples of a training, byte for byte what it would train on, and no label of the evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from recbole_llm import cli
from recbole_llm.data.yes_no import YesNoPrompts
from recbole_llm.llm.micro_batches import MicroBatches
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import CHATML

TEMPLATE = "Seen:\n{history}\nCandidates:\n{candidates}\nNext:"


@pytest.fixture
def chat_lm(tiny_lm: Path, tmp_path: Path) -> Path:
    """The tiny LM with a chat template whose end of turn is EOS."""
    folder = tmp_path / "chat-lm"
    shutil.copytree(tiny_lm, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>")
    tokenizer.save_pretrained(folder)
    return folder


def export(model: str, out: Path, settings: dict[str, Any], *more: str) -> dict[str, list[dict[str, Any]]]:
    """Run the command; the lines of each file."""
    given = [f"--{key}={value}" for key, value in settings.items()]
    cli.main(["export", f"--model={model}", "--dataset=tiny", f"--out={out}", *given, *more])
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(out.glob("*.jsonl"))}


def chat_settings(settings: dict[str, Any], chat_lm: Path) -> dict[str, Any]:
    prompts = {"prompts": {"mine": TEMPLATE}, "prompt": "mine", "chat": True, "lora_train_mode": "prefix", "system": "Recommend."}
    return {**settings, **prompts, "llm_path": str(chat_lm), "lora_epochs": 2, "max_title_tokens": 8, "max_prompt_tokens": 400}


@pytest.mark.slow
def test_training_files_hold_what_the_training_sees(
    settings: dict[str, Any], chat_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example of two epochs of every adapter, by its ids, and its text gives these ids through the chat template."""
    config = chat_settings(settings, chat_lm)
    files = export("LoRACocktail", tmp_path / "out", config, "--ids", "--passes=2")
    assert not list((tmp_path / "saved").glob("stages/*"))  # nothing was trained
    seen: dict[int, set[tuple[int, ...]]] = {}  # number of the training -> epoch and ids
    get, init = MicroBatches.__getitem__, MicroBatches.__init__

    def noted(self: MicroBatches, step: int) -> Any:
        found = get(self, step)
        epoch = step // self.steps_per_epoch
        seen[len(seen)].update((epoch, *row.ids) for batch, _ in found for row, _ in batch)
        return found

    def started(self: MicroBatches, *args: Any, **options: Any) -> None:
        seen[len(seen) + 1] = set()
        init(self, *args, **options)

    monkeypatch.setattr(MicroBatches, "__getitem__", noted)
    monkeypatch.setattr(MicroBatches, "__init__", started)
    run_recbole_llm("LoRACocktail", "tiny", config_dict=config)
    tokenizer = AutoTokenizer.from_pretrained(chat_lm)
    for number, name in enumerate(("base-spirit", "ingredient"), 1):
        lines = files[f"{name}.train.jsonl"]
        half = len(lines) // 2
        exported = {(index // half, *line["input_ids"]) for index, line in enumerate(lines)}
        found = {row for row in seen[number] if row[0] < 2}
        assert found <= exported and len(found) == len(exported) - 2 * (half % 8)  # batches of 8, the rest is left out
        exact = [line for line in lines if line["exact"]]
        assert len(exact) > 0.9 * len(lines)
        for line in exact[:20]:
            ids = tokenizer.apply_chat_template(line["messages"], tokenize=True, return_dict=False)
            assert ids[: len(line["input_ids"])] == line["input_ids"]
            answer = [token for token in line["labels"] if token != -100]
            assert tokenizer.decode(answer) == line["messages"][-1]["content"] + "</s>"


def test_evaluation_prompts_hold_candidates_and_no_label(
    settings: dict[str, Any], chat_lm: Path, tmp_path: Path, assemble: Any
) -> None:
    config = chat_settings(settings, chat_lm)
    files = export("TALLRec", tmp_path / "out", config)
    made = assemble("TALLRec", config)
    histories = made.model.parts.histories
    for phase in ("valid", "test"):
        lines, candidates = files[f"{phase}.jsonl"], made.candidates[phase]
        assert len(lines) == len(candidates.users)
        for line, user, items in zip(lines, candidates.users.tolist(), candidates.items.tolist(), strict=True):
            assert set(line) == {"messages", "exact", "user", "candidates", "items"}
            assert [message["role"] for message in line["messages"]] == ["system", "user"]
            assert line["candidates"] == [made.model.parts.domain.items.names[item] for item in items]
            assert line["user"] == histories.user_ids[user] and len(line["items"]) == len(items)
            assert all(title in line["messages"][1]["content"] for title in line["candidates"])


def test_no_held_out_item_is_an_answer(settings: dict[str, Any], tmp_path: Path, tiny_lm: Path) -> None:
    """A user whose two last items occur nowhere else: they are in no training file."""
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    for suffix in ("inter", "item"):
        (folder / f"tiny.{suffix}").write_text(Path(settings["data_path"], "tiny", f"tiny.{suffix}").read_text())
    with open(folder / "tiny.item", "a") as file:
        file.write("".join(f"secret{k}\tSecret title {k}\t1999\tdrama film\n" for k in (1, 2)))
    with open(folder / "tiny.inter", "a") as file:
        rows = [f"u999\t{item}\t{2_000_000_000 + k}\n" for k, item in enumerate(["i1", "i2", "i3", "secret1", "secret2"])]
        file.write("".join(rows))
    changes = {"data_path": str(tmp_path / "data"), "lora_train_mode": "prefix", "train_samples": None}
    files = export("LoRACocktail", tmp_path / "out", {**settings, **changes}, "--layout=alpaca")
    for name, lines in files.items():
        text = "\n".join(json.dumps(line) for line in lines)
        assert ("Secret title" in text) == (name in ("valid.jsonl", "test.jsonl")), name
    assert all(set(line) == {"instruction", "input", "system", "output", "exact"} for line in files["ingredient.train.jsonl"])
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["form"].startswith("bare text") and "ends with its separator" in about["form"]
    assert all(line["output"].endswith("\n") for line in files["ingredient.train.jsonl"])


def test_whole_histories_are_documents(settings: dict[str, Any], tmp_path: Path) -> None:
    files = export("TALLRec", tmp_path / "out", settings)
    lines = files["tuned.train.jsonl"]
    assert len(lines) == 32 and all(set(line) == {"text", "exact"} and line["exact"] for line in lines)
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["tuned-train"] == {"file_name": "tuned.train.jsonl", "columns": {"prompt": "text"}}
    assert "stage: pt" in json.loads((tmp_path / "out" / "export.json").read_text())["form"]


@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_questions_have_yes_or_no_as_their_answer(settings: dict[str, Any], tmp_path: Path, train_on_inputs: bool) -> None:
    form = {"tallrec_form": "yes_no", "train_on_inputs": train_on_inputs, "prompt": "tallrec_yes_no", "normalize": "sum"}
    changes = {**settings, **form, "lora_train_mode": "prefix", "max_prompt_tokens": 400}
    files = export("TALLRec", tmp_path / "out", changes)
    answers = {line["messages"][-1]["content"] for line in files["tuned.train.jsonl"]}
    assert answers == {"Yes.</s>", "No.</s>"}
    assert len(files["test.jsonl"]) == 600 and all(len(line["candidates"]) == 1 for line in files["test.jsonl"])  # 60 users x 10
    assert all(line["candidates"][0] in line["messages"][-1]["content"] for line in files["test.jsonl"])
    about = json.loads((tmp_path / "out" / "export.json").read_text())["form"]
    assert ("train_on_prompt: true" in about) == train_on_inputs


def test_the_titles_of_questions_are_tokenised_once_for_all_lines(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"tallrec_form": "yes_no", "prompt": "tallrec_yes_no", "normalize": "sum", "lora_train_mode": "prefix"}
    built: list[Any] = []
    init = YesNoPrompts.__init__
    monkeypatch.setattr(YesNoPrompts, "__init__", lambda self, *given, **named: built.append(self) or init(self, *given, **named))
    files = export("TALLRec", tmp_path / "out", settings | form)
    assert sum(map(len, files.values())) > 500 and len(built) < 8


def test_a_given_adapter_has_no_training_file(settings: dict[str, Any], tmp_path: Path, tiny_lm: Path) -> None:
    from tests.model.test_given_adapters import make

    given = {"base spirit": str(make(tiny_lm, tmp_path / "mine"))}
    files = export("LoRACocktail", tmp_path / "out", settings, f"--adapters={given}")
    assert [name for name in files if "train" in name] == ["ingredient.train.jsonl"]


def test_mistakes_end_in_one_line(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    for model, out, changes, message in (
        ("TALLRec", "taken", {}, "is not overwritten"),
        ("SASRec", "new", {}, "trains no adapter on prompts of text"),
        ("ALLMRec", "new", {"lora_train_mode": "prefix"}, "trains no adapter on prompts of text"),
        ("TALLRec", "new", {"llm_path": "builtin"}, "the builtin LM has not been trained"),
    ):
        with pytest.raises(SystemExit):
            own = {**settings, **changes}
            if model == "SASRec":
                own = {key: settings[key] for key in ("data_path", "checkpoint_dir", "epochs", "candidates", "eval_args")}
            export(model, tmp_path / out, own)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and message in said, said
        assert not (tmp_path / "new").exists()


def test_the_builtin_lm_of_an_earlier_run_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    small = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 400}
    config = {**settings, "llm_path": "builtin", "builtin_lm": small, "lora_epochs": 1}
    run_recbole_llm("TALLRec", "tiny", config_dict=config)
    files = export("TALLRec", tmp_path / "out", config)
    assert all(line["exact"] for line in files["tuned.train.jsonl"])
    assert files["tuned.train.jsonl"][0]["text"].startswith("<s>The ")
