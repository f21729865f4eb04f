"""The builtin encoder knows words of this catalogue, and depends on its arguments alone."""

import random

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from recbole_llm.llm.builtin_text_encoder import builtin_stage, train_word_tokenizer
from recbole_llm.llm.text_encoder import load_text_encoder
from recbole_llm.store.stages import StageCache
from tests.llm.text_encoder.conftest import GENRES, ODD, TEXTS, build


def test_builtin_puts_texts_that_share_words_together(builtin):
    query, near, far = builtin.encode(["The rocket and the alien", "ALIEN rocket!", "The kiss and the rose"])
    assert cosine_similarity(query, near, dim=0) > 0.8 > 0.3 > cosine_similarity(query, far, dim=0)
    assert builtin.encode(TEXTS[1:]).norm(dim=1).mean() == pytest.approx(1, abs=1e-3)


def test_builtin_knows_which_words_stand_together(tmp_path):
    """With fewer columns than words it is a latent analysis: these texts share no word."""
    encoder = load_text_encoder(build(tmp_path / "narrow", dim=3), device="cpu")
    space, more_space, love, more_love = encoder.encode(["alien planet", "rocket laser", "kiss wedding", "rose heart"])
    assert cosine_similarity(space, more_space, dim=0) > 0.9 > 0.3 > cosine_similarity(space, love, dim=0)
    assert cosine_similarity(love, more_love, dim=0) > 0.9 > 0.3 > cosine_similarity(more_space, more_love, dim=0)


@pytest.mark.parametrize("dim", [3, 16])
def test_builtin_mean_of_tokens_points_where_the_lsa_vector_does(tmp_path, dim):
    """Against the definition: TF-IDF times the leading right singular vectors, up to a rotation."""
    words = [*GENRES, *sum(GENRES.values(), [])]
    chance = np.random.default_rng(0)
    often = chance.dirichlet(np.ones(len(words)))  # some words are rare
    texts = [" ".join(chance.choice(words, 1 + i % 20, p=often)) for i in range(60)]  # of all lengths
    encoder = load_text_encoder(build(tmp_path / "encoder", texts, dim=dim), device="cpu")
    tokens = [encoder.model.tokenizer.encode(text).ids for text in texts]
    counts = np.zeros((len(tokens), encoder.model.tokenizer.get_vocab_size()))
    for row, ids in enumerate(tokens):
        np.add.at(counts[row], ids, 1)
    idf = np.log((1 + len(tokens)) / np.maximum((counts > 0).sum(0), 1))
    tfidf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    _, _, right = np.linalg.svd(tfidf / np.linalg.norm(tfidf, axis=1, keepdims=True), full_matrices=False)
    lsa = torch.tensor(counts * idf @ right[:dim].T)
    angles = cosine_similarity(lsa[:, None], lsa[None], dim=-1)
    ours = encoder.encode(texts).double()
    torch.testing.assert_close(cosine_similarity(ours[:, None], ours[None], dim=-1), angles, atol=2e-3, rtol=0)


def test_builtin_depends_on_its_arguments_alone(builtin_folder, tmp_path):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    again = build(tmp_path / "again")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (again / file).read_bytes() == (builtin_folder / file).read_bytes()
    stage = builtin_stage(TEXTS, dim=16, vocab_size=400, seed=1)
    for change in ({"dim": 17}, {"vocab_size": 401}, {"seed": 2}, {"texts": [*TEXTS[:-1], "New"]}):
        arguments = {"texts": TEXTS, "dim": 16, "vocab_size": 400, "seed": 1} | change
        assert builtin_stage(arguments.pop("texts"), **arguments).fingerprint != stage.fingerprint


def test_builtin_is_a_stage_whose_folder_says_what_it_is(tmp_path):
    folder = StageCache(tmp_path).run(builtin_stage(TEXTS, dim=256, vocab_size=400, seed=1))
    encoder = load_text_encoder(folder, device="cpu")
    weights = sum(p.numel() for p in encoder.model.parameters())
    assert encoder.name == f"builtin {weights / 1e6:.1f}M" == "builtin 0.1M"
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())


def test_builtin_of_a_catalogue_smaller_than_dim_has_the_width_all_the_same(tmp_path):
    for number, texts in enumerate((["", "Heat"], ["Heat", "Heat"], ["", "Toy Story", "Toy Soldiers", "Heat"])):
        encoder = load_text_encoder(build(tmp_path / str(number), texts, dim=64), device="cpu")
        vectors = encoder.encode(texts)
        assert vectors.shape == (len(texts), 64) and vectors.isfinite().all()
        assert (vectors.norm(dim=1) > 0).tolist() == [bool(text) for text in texts]
        columns = encoder.model[0].embedding.weight.any(dim=0)
        assert columns.sum() == len(set(texts) - {""})  # what there is beyond the rank would be rounding errors
    near, far = cosine_similarity(vectors[1], vectors[2:])
    assert near > far + 0.1


def test_every_text_has_a_vector(builtin, tmp_path):
    other = load_text_encoder(build(tmp_path / "odd", ODD), device="cpu")
    for encoder in (builtin, other):
        vectors = encoder.encode(ODD)
        assert vectors.isfinite().all() and not vectors[:2].any()  # nothing said: zeros
    assert vectors[2:].any(dim=1).all()  # its own catalogue
    tokenizer = other.model.tokenizer
    assert tokenizer.encode("[MASK]").ids == tokenizer.encode("[ mask ]").ids  # words and punctuation, nothing special
    assert builtin.encode([]).shape == builtin([]).shape == (0, 16)


def test_words_are_the_same_wherever_they_stand_and_rare_ones_fall_apart(builtin):
    tokenizer = builtin.model.tokenizer
    assert tokenizer.encode("Heart").ids == tokenizer.encode(" heart ").ids == tokenizer.encode("a heart").ids[1:]
    assert len(tokenizer.encode("heart").ids) == 1 < len(tokenizer.encode("hearty").ids)
    once = train_word_tokenizer(["heart rose", "heart"], 400)
    assert len(once.encode("heart").ids) == 1 < len(once.encode("rose").ids)


def test_builtin_names_what_it_cannot_be_made_from():
    with pytest.raises(ValueError, match="texts: no item"):
        builtin_stage(["", " "], dim=4, vocab_size=300, seed=1)
    with pytest.raises(ValueError, match="dim 0"):
        builtin_stage(TEXTS, dim=0, vocab_size=300, seed=1)
    with pytest.raises(ValueError, match="vocab_size 255"):
        builtin_stage(TEXTS, dim=4, vocab_size=255, seed=1)
