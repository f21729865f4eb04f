"""Tiny data with every column that one of RecBole's models reads, and the settings that a model needs to run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

USERS, ITEMS, RELATIONS = 36, 40, 3
WIDTHS = {"ent": 64, "rel": 64}  # of the vectors, as the models that read them expect


def write(folder: Path, name: str = "rich") -> Path:
    """Ratings, user and item features, a knowledge graph with its links, and vectors of items and relations."""
    rng = np.random.default_rng(0)
    (folder / name).mkdir(parents=True)

    def table(suffix: str, columns: list[str], rows: list[list[Any]]) -> None:
        lines = ["\t".join(map(str, row)) for row in (columns, *rows)]
        (folder / name / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")

    def vectors(tokens: list[str], width: int) -> list[list[Any]]:
        return [[token, " ".join(f"{value:.3f}" for value in rng.normal(size=width))] for token in tokens]

    rows = []
    for user in range(USERS):
        bought = (int(rng.integers(ITEMS)) + np.arange(int(rng.integers(6, 10)))) % ITEMS
        rows += [[f"u{user}", f"i{item}", int(rng.integers(1, 6)), 1000 + 20 * user + step] for step, item in enumerate(bought)]
    table("inter", ["user_id:token", "item_id:token", "rating:float", "timestamp:float"], rows)
    people = [[f"u{user}", 20 + user % 5, "MF"[user % 2]] for user in range(USERS)]
    table("user", ["user_id:token", "age:token", "gender:token"], people)
    things = [[f"i{item}", f"title {item}", 1990 + item % 4, ("drama film", "comedy")[item % 2]] for item in range(ITEMS)]
    table("item", ["item_id:token", "title:token_seq", "release_year:token", "class:token_seq"], things)
    facts = [[f"e{item}", f"r{item % RELATIONS}", f"e{ITEMS + item % 7}"] for item in range(ITEMS)]
    table("kg", ["head_id:token", "relation_id:token", "tail_id:token"], facts)
    table("link", ["item_id:token", "entity_id:token"], [[f"i{item}", f"e{item}"] for item in range(ITEMS)])
    table("ent", ["ent_id:token", "ent_emb:float_seq"], vectors([f"i{item}" for item in range(ITEMS)], WIDTHS["ent"]))
    table("rel", ["rel_id:token", "rel_emb:float_seq"], vectors([f"r{k}" for k in range(RELATIONS)], WIDTHS["rel"]))
    return folder


_INTER = ["user_id", "item_id", "rating", "timestamp"]
_FEATURES = {"inter": _INTER, "user": ["user_id", "age", "gender"], "item": ["item_id", "release_year", "class"]}
_GRAPH = {"inter": _INTER, "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
_ITEM_VECTORS = {
    "additional_feat_suffix": ["ent"],
    "preload_weight": {"ent_id": "ent_emb"},
    "alias_of_item_id": ["ent_id"],
}
OWN: dict[str, dict[str, Any]] = {  # what the settings of a model's kind do not say
    "DIN": {"load_col": _FEATURES},
    "DIEN": {"load_col": _FEATURES},
    "FDSA": {"load_col": _FEATURES},
    "GRU4RecF": {"load_col": _FEATURES},
    "SASRecF": {"load_col": _FEATURES},
    "S3Rec": {"load_col": _FEATURES, "pretrain_epochs": 1},
    "RaCT": {"pretrain_epochs": 1, "metrics_k": 5},
    "NCL": {"num_clusters": 4},
    "SASRecCPR": {"reranker_CAN_NUM": "10"},
    "GRU4RecCPR": {"reranker_CAN_NUM": "10"},
    "GRU4RecKG": {"load_col": {**_GRAPH, "ent": ["ent_id", "ent_emb"]}, **_ITEM_VECTORS},
    "KSR": {
        "load_col": {**_GRAPH, "ent": ["ent_id", "ent_emb"], "rel": ["rel_id", "rel_emb"]},
        **_ITEM_VECTORS,
        "additional_feat_suffix": ["ent", "rel"],
        "preload_weight": {"ent_id": "ent_emb", "rel_id": "rel_emb"},
        "alias_of_relation_id": ["rel_id"],
    },
}
VARIANTS: dict[str, dict[str, Any]] = {  # the other forms of a model, beside its default
    "AsymKNN": {"knn_method": "user"},
    "BPR": {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1, "alpha": 0.5}},
    "CDAE": {"hid_activation": "tanh", "out_activation": "relu"},
    "CFKG": {"loss_function": "transe"},
    "CORE": {"dnn_type": "ave"},
    "DCNV2": {"mixed": True, "structure": "parallel"},
    "DMF": {"inter_matrix_type": "rating", "load_col": {"inter": _INTER}},
    "FDSA": {"pooling_mode": "max"},
    "GCMC": {"accum": "sum"},
    "GRU4RecF": {"pooling_mode": "max"},
    "HRM": {"pooling_type_layer_1": "average", "pooling_type_layer_2": "average"},
    "ItemKNN": {"knn_method": "user"},
    "KD_DAGFM": {"teacher": "CIN", "type": "inner"},
    "KGCN": {"aggregator": "concat"},
    "KGNNLS": {"aggregator": "neighbor"},
    "KTUP": {"L1_flag": True, "use_st_gumbel": True},
    "LINE": {"order": 1},
    "MKR": {"use_inner_product": False},
    "MacridVAE": {"nogb": True},
    "NAIS": {"algorithm": "concat", "split_to": 2},
    "NeuMF": {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": True, "candidate_num": 2}},
    "PNN": {"use_inner": False, "use_outer": True},
    "SASRecF": {"pooling_mode": "mean"},
    "SGL": {"type": "RW"},
    "SimpleX": {"aggregator": "user_attention"},
    "xDeepFM": {"direct": True},
}


def settings(model: str, kind: str, data_path: Path, folder: Path) -> dict[str, Any]:
    """Settings of one epoch and its evaluation; ``kind`` is the folder of the model in RecBole, such as ``general``."""
    columns = {"context_aware": _FEATURES, "knowledge_aware": _GRAPH}.get(kind, {"inter": _INTER})
    clicks = kind == "context_aware" or model in ("DIN", "DIEN")
    ranking = {"candidates": {"num_negatives": 9}, "topk": [1, 5], "valid_metric": "NDCG@5"}
    return {
        "data_path": str(data_path),
        "checkpoint_dir": str(folder / "saved"),
        "show_progress": False,
        "epochs": 1,
        "train_batch_size": 128,
        "MAX_ITEM_LIST_LENGTH": 8,
        "load_col": columns,
        **({"threshold": {"rating": 3}} if kind == "context_aware" else {} if clicks else ranking),
        **OWN.get(model, {}),
    }
