"""The builtin text encoder: word vectors of the catalogue's own texts, so that A-LLMRec's first command needs no download.

A text is the mean of its word vectors, which start as a latent semantic analysis (LSA: TF-IDF, then SVD) and can be trained
on. What it knows is which words stand together in this catalogue: it is never passed off as a pretrained SBERT. It is saved
as an ordinary SentenceTransformer, a ``StaticEmbedding``.

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
        ValueError: there is no text, no width, or no room for the 256 bytes.
    """
    if dim < 1 or vocab_size < 256:
        raise ValueError(f"builtin text encoder: dim {dim} must be at least 1, vocab_size {vocab_size} 256, one a byte")
    if not any(text.strip() for text in texts):
        raise ValueError("texts: no item has one, so there is nothing to make the builtin text encoder from")

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
    """A tokenizer of lower-case words and punctuation, with byte-level subwords for words that occur once or are rare.

    The builtin LM's tokenizer merges whole titles into one token, in which LSA would find nothing that two items share.
    Every Unicode text goes through, and there are no special tokens: ``[MASK]`` in a text is text.
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
    """Token vectors [V, D] whose mean over a text points where the text's LSA vector does; the means have norm 1 on average.

    LSA: the truncated SVD U S V' of the texts' TF-IDF rows x, in which a text has the vector x V. A mean over tokens weights
    each of them equally, so the idf goes into its row of V. Columns beyond the catalogue's rank are zero.
    """
    from scipy import sparse
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    lengths = np.array([len(row) for row in tokens], dtype=np.float32)
    cells = np.repeat(np.arange(len(tokens)), lengths.astype(int)), np.concatenate(tokens)
    counts = sparse.csr_matrix((np.ones(len(cells[0]), np.float32), cells), shape=(len(tokens), vocab_size))  # [N, V]
    texts_with = np.bincount(counts.indices, minlength=vocab_size)
    idf = np.log((1 + len(tokens)) / np.maximum(texts_with, 1)).astype(np.float32)  # [V], above 0 even where all have it
    weighted = counts.copy()
    weighted.data = (1 + np.log(counts.data)) * idf[counts.indices]
    _, strength, right = randomized_svd(normalize(weighted), dim, n_iter=4, random_state=seed)  # [R], [R, V], R <= D
    right = right[strength > 1e-5 * strength[0]]  # of the others only rounding errors are left
    table = np.zeros((vocab_size, dim), np.float32)
    table[:, : len(right)] = idf[:, None] * right.T
    means = (counts @ table) / lengths[:, None]  # [N, D]
    return torch.from_numpy(table / np.linalg.norm(means, axis=1).mean())
