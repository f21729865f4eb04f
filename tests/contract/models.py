"""The models that the contracts hold for, and the settings that some of them need."""

from __future__ import annotations

from recbole_llm.evaluation.published import ALLMREC, RECCOCKTAIL, WEAVEREC
from recbole_llm.registry import MODELS, SHORTCUTS

BASELINES = ["Pop", "BPR", "LightGCN", "NeuMF", "GRU4Rec", "NextItNet", "BERT4Rec", "SASRec"]
OWN = {  # what the shared tiny settings say and a model cannot do, or need not
    "LlamaRec": {"lora_train_mode": "prefix"},
    "Cascade": {"llm_ranker": "TALLRec"},
}
TRAINED = [name for name in MODELS if name not in (*SHORTCUTS, "Imported")]
SMALL_LM = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokens": 400, "batch_tokens": 256, "vocab_size": 300}
TRAINING_STAGES = {  # of each model the first stages that train something, one of each kind
    "TALLRec": ["ingredient"],
    "LlamaRec": ["verbalizer"],
    "LoRACocktail": ["base-spirit"],
    "MoLoRec": ["ingredient"],
    "WeaveRec": ["lora-tiny+tiny-comedy"],
    "ALLMRec": ["alignment", "projection"],
    "Laser": ["phase-1", "phase-2"],
    "Cascade": ["ingredient"],
    "AlphaRec": [],
}
PUBLISHED = {  # protocols with generated answers, and the rows that are generated
    "TALLRec": (RECCOCKTAIL, ["TALLRec", "no adapter"]),
    "LoRACocktail": (RECCOCKTAIL, ["LoRACocktail", "no adapter"]),
    "MoLoRec": (RECCOCKTAIL, ["MoLoRec", "no adapter"]),
    "WeaveRec": (WEAVEREC, ["WeaveRec", "no adapter"]),
    "ALLMRec": (ALLMREC, ["ALLMRec", "LLM only"]),
}
