"""What is encoded, in any batch the same, and what training changes."""

import pytest
import torch

from recbole_llm.data.items import ItemTexts
from recbole_llm.llm.text_encoder import TextEncoder, item_sentences, load_text_encoder
from tests.llm.text_encoder.conftest import TEXTS


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
    seq = ItemTexts(["", "Drama, Film Noir"], [], {"genre": ["", "Drama|Film Noir"]}, kinds={"genre": "token_seq"}, separator="|")
    assert item_sentences(seq, ["genre"]) == seq.titles  # nor are several values
    with pytest.raises(ValueError, match="text_fields.*'genres'.*genre, year"):
        item_sentences(items, ["genres"])


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
