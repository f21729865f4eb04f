"""Folders and hub ids of text encoders: what is read, what is refused, and by what they are known."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_llm.llm.text_encoder import load_text_encoder
from tests.llm.text_encoder.conftest import TEXTS


def test_folder_loads_frozen_under_its_name(bert, bert_folder):
    assert (bert.name, bert.dim, bert.model.device.type) == ("tiny-bert", 24, "cpu")
    assert not bert.model.training and not any(p.requires_grad for p in bert.model.parameters())
    assert bert.fingerprint == load_text_encoder(str(bert_folder), device="cpu").fingerprint


def test_fingerprint_follows_everything_that_changes_vectors_and_nothing_else(bert, copied):
    def fingerprint():
        return load_text_encoder(copied, device="cpu").fingerprint

    seen = [fingerprint()]
    (copied / "notes").mkdir()
    (copied / "notes" / "README.md").write_text("a note")
    assert seen == [fingerprint()] and len(seen[0]) == 64
    config = copied / "1_Pooling" / "config.json"
    config.write_text(config.read_text().replace('"mean"', '"cls"'))
    seen.append(fingerprint())
    with torch.no_grad():
        next(bert.model.parameters())[7, 3] += 1
    bert.save(copied)
    seen.append(fingerprint())
    (copied / "0_Part").mkdir()  # of a module in a folder of its own, such as CLIP's or an older Transformer
    for content in ("{}", '{"max_seq_length": 7}'):
        (copied / "0_Part" / "sentence_bert_config.json").write_text(content)
        seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_half_precision_is_trained_in_full(copied, bert):
    config = copied / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))  # the tensors are in full
    assert torch.equal(load_text_encoder(copied, device="cpu").encode(TEXTS), bert.encode(TEXTS))
    bert.model.half().save(str(copied), create_model_card=False)
    assert {p.dtype for p in load_text_encoder(copied, device="cpu").model.parameters()} == {torch.float32}


def test_missing_folder_is_refused_before_the_network(tmp_path):
    for path in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="text_encoder_path.*no folder .*builtin"):
            load_text_encoder(path)


def test_hub_id_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="path.*no-owner/no-model@v1.*HF_HOME.*hf download no-owner.*builtin"):
        load_text_encoder("no-owner/no-model", revision="v1")
    with pytest.raises(FileNotFoundError, match="sentence-transformers/no-model "):
        load_text_encoder("no-model")


def test_hub_id_loads_from_the_local_cache_and_is_known_by_its_commit(monkeypatch, tmp_path, bert, bert_folder):
    commit, repository = "0123456789" * 4, tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    os.symlink(bert_folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = load_text_encoder("owner/model", device="cpu")
    assert (encoder.name, encoder.fingerprint) == ("owner/model", f"owner/model@{commit}")
    assert torch.equal(encoder.encode(TEXTS), bert.encode(TEXTS))


def test_only_files_that_hold_no_code_are_fetched(monkeypatch, bert_folder):
    asked = SimpleNamespace()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kw: asked.__dict__.update(kw) or str(bert_folder))
    load_text_encoder("owner/model", revision="v2", device="cpu")
    assert asked.revision == "v2" and set(asked.allow_patterns) == {"*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"}


def test_pickled_weights_are_never_read(copied, builtin, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kw: pytest.fail("unpickled"))
    (copied / "pytorch_model.bin").write_bytes(b"beside safetensors it is left alone")
    load_text_encoder(copied, device="cpu")
    os.remove(copied / "model.safetensors")
    builtin.model.save(str(tmp_path / "static"), create_model_card=False, safe_serialization=False)
    for folder in (copied, tmp_path / "static"):
        with pytest.raises(FileNotFoundError, match="text_encoder_path.*pytorch_model.bin.*pickled weights.*save"):
            load_text_encoder(folder, device="cpu")
    os.rename(copied / "pytorch_model.bin", copied / "part.bin")
    (copied / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"x": "part.bin"}}')
    with pytest.raises(FileNotFoundError, match="no complete model"):
        load_text_encoder(copied, device="cpu")


def test_code_of_a_model_is_never_run(copied):
    (copied / "own.py").write_text("raise SystemExit('run')")
    modules = copied / "modules.json"
    modules.write_text(modules.read_text().replace("sentence_transformers.sentence_transformer.modules.pooling.", "own."))
    with pytest.raises(FileNotFoundError, match="own.Pooling.*code are not read"):
        load_text_encoder(copied, device="cpu")


def test_model_that_reads_texts_in_another_way_is_named(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW, Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    words = WordEmbeddings(WhitespaceTokenizer(["gun", "kiss", "item"]), np.eye(3, dtype=np.float32))
    for modules, read_as in ([BoW(["gun", "kiss"])], "sentence_embedding"), ([words, Pooling(3)], "input_ids, .*"):
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"), create_model_card=False)
        with pytest.raises(ValueError, match=f"text_encoder_path.*reads texts as {read_as} is not.*Transformer"):
            load_text_encoder(tmp_path / "model", device="cpu")


def test_damaged_or_empty_folder_is_named(copied, tmp_path):
    (copied / "model.safetensors").write_bytes(b"half")
    (tmp_path / "empty").mkdir()
    for folder in (copied, tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=f"text_encoder_path: the folder {folder} holds no complete model"):
            load_text_encoder(folder, device="cpu")
