"""The builtin text encoder: word vectors of the catalogue's own texts, so that A-LLMRec's first command needs no download.

The vector of a text is the mean of its word vectors. These are initialised by latent semantic analysis (LSA: TF-IDF, then
SVD) and can be fine-tuned. They know only which words occur together in this catalogue, so tables name the encoder
``builtin``. It is saved as an ordinary SentenceTransformer with a ``StaticEmbedding``.

Legend: N texts, V tokens, D width, R rank of the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.llm.text_encoder import TextEncoder
from recbole_llm.store.files import fingerprint
from recbole_llm.store.stages import Stage, Work


def builtin_stage(texts: Sequence[str], *, dim: int, vocab_size: int, seed: int) -> Stage:
    """The builtin encoder of a catalogue's texts as a cached stage; vectors of width ``dim``, at most ``vocab_size`` tokens.

    Raises:
        ValueError: all texts are empty, ``dim`` is below 1, or ``vocab_size`` is below 256, one token for each byte.
    """
    if dim < 1 or vocab_size < 256:
        raise ValueError(f"builtin_text_encoder: dim {dim} must be at least 1, vocab_size {vocab_size} at least 256")
    if not any(text.strip() for text in texts):
        raise ValueError("texts: no item has one, so the builtin text encoder has no training data")

    def build(work: Work) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        tokenizer = train_word_tokenizer(texts, vocab_size)
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        table = lsa_embeddings([row for row in rows if row], tokenizer.get_vocab_size(), dim, seed)  # [V, D]
        model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu")
        TextEncoder(model, f"builtin {table.numel() / 1e6:.1f}M", "").save(work.out)

    depends = {"texts": fingerprint(list(texts)), "dim": dim, "vocab_size": vocab_size, "seed": seed}
    return Stage("builtin-text-encoder", depends, build)


def train_word_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A tokenizer of lower-case words and punctuation, with byte-level subwords for rare words.

    The builtin LM's tokenizer merges whole titles into one token; LSA needs tokens that several items share. Any Unicode
    text can be encoded. There are no special tokens: ``[MASK]`` in a text is encoded as ordinary text.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def lsa_embeddings(tokens: Sequence[Sequence[int]], vocab_size: int, dim: int, seed: int) -> Tensor:
    """Token vectors [V, D]; their mean over a text has the direction of its LSA vector. The means have norm 1 on average.

    LSA: a text with the TF-IDF row x has the vector x V, from the truncated SVD U S V' of all rows. A mean weights all tokens
    equally, so each row of V is multiplied by the token's idf. Columns beyond the catalogue's rank are zero.
    """
    from scipy import sparse
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    lengths = np.array([len(row) for row in tokens], dtype=np.float32)
    cells = np.repeat(np.arange(len(tokens)), lengths.astype(int)), np.concatenate(tokens)
    counts = sparse.csr_matrix((np.ones(len(cells[0]), np.float32), cells), shape=(len(tokens), vocab_size))  # [N, V]
    texts_with = np.bincount(counts.indices, minlength=vocab_size)
    idf = np.log((1 + len(tokens)) / np.maximum(texts_with, 1)).astype(np.float32)  # [V], positive even for a token of all texts
    weighted = counts.copy()
    weighted.data = (1 + np.log(counts.data)) * idf[counts.indices]
    _, strength, right = randomized_svd(normalize(weighted), dim, n_iter=4, random_state=seed)  # [R], [R, V], R <= D
    right = right[strength > 1e-5 * strength[0]]  # the others are rounding errors
    table = np.zeros((vocab_size, dim), np.float32)
    table[:, : len(right)] = idf[:, None] * right.T
    means = (counts @ table) / lengths[:, None]  # [N, D]
    return torch.from_numpy(table / np.linalg.norm(means, axis=1).mean())
