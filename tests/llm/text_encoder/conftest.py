"""Two tiny text encoders, the builtin one and a BERT, which the tests of this folder share."""

import pytest
import torch

from recbole_llm.llm.builtin_text_encoder import builtin_stage
from recbole_llm.llm.text_encoder import TextEncoder, load_text_encoder
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


@pytest.fixture(scope="session")
def builtin_folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("builtin") / "encoder")


@pytest.fixture
def builtin(builtin_folder):
    return load_text_encoder(builtin_folder, device="cpu")


@pytest.fixture(scope="session")
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
