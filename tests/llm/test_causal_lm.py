"""Every family loads from a folder, frozen and ready; what cannot be loaded is refused with a way out."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.data.prompts import Example, Prompt
from recbole_llm.llm import causal_lm, identity
from recbole_llm.llm.causal_lm import fingerprint, load_causal_lm, load_tokenizer
from recbole_llm.llm.forward import lm_loss
from tests.llm import families
from tests.llm.conftest import FAMILIES, tiny_tokenizer


@pytest.fixture
def folder(tmp_path, build_model, build_tokenizer):
    def save(family="llama", **special):
        path = tmp_path / f"tiny-{family}"
        build_model(family).save_pretrained(path)
        build_tokenizer(**(special or {"eos_token": "</s>"})).save_pretrained(path)
        return path

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_frozen_with_equal_logits(folder, build_model, family):
    lm = load_causal_lm(folder(family), device="cpu")
    ids = torch.arange(5, 15).unsqueeze(0)  # [1, 10]
    assert torch.equal(lm.model(ids).logits, build_model(family)(ids).logits)
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert lm.model.dtype == torch.float32
    assert lm.tokenizer("ab c", add_special_tokens=False).input_ids == [4, 5, 3, 6]


@pytest.mark.parametrize("rows", [1, 4])
def test_the_matrix_of_the_head_is_not_copied_for_a_slice_of_states(folder, rows):
    model, sizes = load_causal_lm(folder(), device="cpu", dtype="bfloat16").model, []
    ids = torch.arange(5, 15).repeat(rows, 1)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                sizes.append(args[1].numel())
            return func(*args, **(kwargs or {}))

    with Products():
        assert model(ids, logits_to_keep=1).logits.shape[:2] == (rows, 1)
        assert lm_loss(model, [Example.of(Prompt([5, 6]), [7, 8])] * rows) > 0
    assert max(sizes, default=0) < model.lm_head.weight.numel()


def test_tied_embeddings_stay_tied(folder):
    model = load_causal_lm(folder("qwen2-gqa"), device="cpu").model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_pad_token_is_added_only_where_it_lacks(folder):
    assert load_causal_lm(folder(), device="cpu").tokenizer.pad_token == "</s>"
    padded = folder(eos_token="</s>", pad_token="<pad>")
    assert load_causal_lm(padded, device="cpu").tokenizer.pad_token == "<pad>"


def test_tokenizer_without_end_token_is_refused(folder):
    with pytest.raises(ValueError, match="end-of-text"):
        load_causal_lm(folder(pad_token="<pad>"), device="cpu")


def test_dtype_and_attention_keep_their_names(folder):
    lm = load_causal_lm(str(folder()), device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert lm.model.dtype == torch.bfloat16 and lm.model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="bf17"):
        load_causal_lm(folder(), device="cpu", dtype="bf17")


def test_four_bits_without_bitsandbytes_names_the_package(folder, monkeypatch):
    monkeypatch.setattr(causal_lm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        load_causal_lm(folder(), device="cpu", load_in_4bit=True)


def test_missing_folder_is_refused_before_the_network(tmp_path):
    for path in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no folder .*builtin"):
            load_causal_lm(path)


def test_hub_id_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no-such-owner/no-such-model@v1.*HF_HOME.*hf download.*builtin"):
        load_causal_lm("no-such-owner/no-such-model", revision="v1")


def test_pickled_weights_are_never_read(folder):
    path = folder()
    os.rename(path / "model.safetensors", path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights"):
        load_causal_lm(path)


def test_a_weight_that_no_file_has_is_refused_instead_of_drawn(folder):
    path = folder()
    tensors = load_file(path / "model.safetensors")
    whole = dict(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileNotFoundError, match=r"1 weights are missing .*model\.layers\.1\.mlp\.up_proj"):
        load_causal_lm(path, device="cpu")
    save_file(whole, path / "model.safetensors", {"format": "pt"})
    load_causal_lm(path, device="cpu")


def test_fingerprint_follows_the_weights_and_nothing_else(folder, build_model, monkeypatch):
    path = folder()
    before = fingerprint(path)
    (path / "README.md").write_text("a note")
    assert fingerprint(path) == before == fingerprint(str(path))

    model = build_model("llama")
    model.lm_head.weight[7, 3] += 1
    model.save_pretrained(path)
    assert fingerprint(path) != before

    monkeypatch.setattr(identity, "WHOLE_FILE", 0)  # a large file, known by samples that cover this one
    sampled = fingerprint(path)
    build_model("llama").save_pretrained(path)
    assert fingerprint(path) not in (sampled, before)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_fingerprint_follows_each_file_that_transformers_takes_for_the_chat_template(folder, name):
    path, text = folder(), "{{ 'another prompt' }}"
    (path / "tokenizer_of_last_year").mkdir()  # a folder is none of the files
    before = fingerprint(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(text)
    assert load_tokenizer(path).get_chat_template() == text
    assert fingerprint(path) != before


def test_fingerprint_waits_for_no_pipe_and_reads_no_device(folder):
    path = folder()
    (path / "chat_template.jinja").symlink_to("/dev/null")
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja is a broken link, a pipe or a device, not a file"):
        fingerprint(path)


def test_of_a_large_file_every_tensor_is_sampled(folder, monkeypatch):
    """A training may change one matrix alone, which samples of the file as a whole need not touch."""
    monkeypatch.setattr(identity, "WHOLE_FILE", 0)
    monkeypatch.setattr(identity, "SAMPLES", 2)
    monkeypatch.setattr(identity, "SAMPLE", 16)
    path = folder()
    file, before = path / "model.safetensors", fingerprint(path)
    tensors = load_file(file)
    assert len(tensors) > 20
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, file, {"format": "pt"})
        assert fingerprint(path) != before, name
    save_file(tensors, file, {"format": "pt"})
    assert fingerprint(path) == before
    for damaged in (b"", b"\xff" * 40, (40).to_bytes(8, "little") + b'{"a": {"data_offsets": ["x", 1]}, "b": 1}     '):
        file.write_bytes(damaged)
        assert fingerprint(path) != before  # loading it says what is wrong


def test_fingerprint_of_the_hub_is_its_revision():
    assert fingerprint("Qwen/Qwen2.5-0.5B", "abc") == "Qwen/Qwen2.5-0.5B@abc"


def test_a_model_without_sdpa_runs_eager_attention(tmp_path, caplog):
    families.build("gpt_neo").save_pretrained(tmp_path / "neo")
    families.build("rwkv").save_pretrained(tmp_path / "rwkv")
    for name in ("neo", "rwkv"):
        tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path / name)
        load_causal_lm(tmp_path / name, attn_implementation="sdpa", dtype="float32")
    assert "attn_implementation: sdpa cannot run" in caplog.text and "eager takes its place" in caplog.text


def test_attention_that_a_machine_lacks_is_refused_by_its_key(tmp_path):
    families.build("llama").save_pretrained(tmp_path)
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation: flash_attention_2.*choose attn_implementation: sdpa or eager"):
        load_causal_lm(tmp_path, attn_implementation="flash_attention_2")


def test_what_is_no_causal_lm_is_refused_by_its_key(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llm_path: .*cannot be loaded.*T5Config.*choose a causal LM of text"):
        load_causal_lm(tmp_path, attn_implementation="sdpa")


@pytest.mark.parametrize("alone", [True, False])
def test_a_folder_with_an_adapter_is_refused_with_the_keys_for_it(folder, alone):
    """Beside a whole model, transformers would load it into the model without a word."""
    path = folder()
    (path / "adapter_config.json").write_text("{}")
    if alone:
        (path / "config.json").unlink()
    for read in (load_causal_lm, causal_lm.load_config, causal_lm.identity, causal_lm.load_tokenizer):
        with pytest.raises(
            ValueError, match=rf"llm_path: {path} holds a PEFT adapter .* `adapters`, or fold it: `recbole-llm merge"
        ):
            read(path)


@pytest.mark.parametrize("cut", [0, 7, 1000])
def test_a_damaged_file_of_weights_is_named_with_its_folder(folder, cut):
    path = folder()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: cut - 1000 if cut == 1000 else cut])
    with pytest.raises(FileNotFoundError, match=rf"llm_path: the folder {path} holds no complete model \(.*header"):
        load_causal_lm(path, device="cpu")


@pytest.mark.parametrize(
    "changes", [{"model_type": "unheard"}, {"auto_map": {"AutoConfig": "c.C"}, "model_type": "unheard"}, None]
)
def test_a_config_that_transformers_does_not_know_is_refused_by_key(folder, changes):
    path = folder()
    file = path / "config.json"
    file.write_text("[]" if changes is None else json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"llm_path: {path}: its config.json cannot be read \(.*\); choose an LM whose"):
        causal_lm.load_config(path)


def test_a_device_map_of_devices_that_a_machine_lacks_is_refused_by_its_key(folder):
    path = folder()
    with pytest.raises(ValueError, match="device_map: cuda:9: .* cannot be placed"):
        load_causal_lm(path, device_map="cuda:9")
    with pytest.raises(ValueError, match="device_map: auto and max_memory: .* leave no device for the embeddings"):
        load_causal_lm(path, device_map="auto", max_memory={"cpu": "1KB"})
