"""The token limit of the tree scorer on the shape of SmolLM2-135M; a part of ``benchmarks/scoring.py``, which explains it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from recbole_llm.data.prompts import Prompt
from recbole_llm.llm.scoring import Scorer

LAYERS = 30
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LIMITS = {"equal": ((300, 300), (10, 10), 0), "mixed": ((200, 400), (3, 17), 0), "shared": ((300, 300), (10, 10), 60)}


def token_limits(
    users: int, layers: int, candidates: int, seconds: Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """Figures for each of :data:`LIMITS`; ``seconds`` times the sides alternately."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers})).eval().requires_grad_(False)
    for name, (lengths, sizes, beginning) in LIMITS.items():
        draw = torch.Generator().manual_seed(0)

        def tokens(least: int, most: int, draw=draw) -> list[int]:
            number = int(torch.randint(least, most + 1, (1,), generator=draw))
            return torch.randint(3, SMOLLM2["vocab_size"], (number,), generator=draw).tolist()

        start = tokens(beginning, beginning)
        prompts = [Prompt((start + tokens(*lengths))[: max(lengths)]) for _ in range(users)]
        answers = [[tokens(*sizes) for _ in range(candidates)] for _ in prompts]
        fed = [sum(len(answer) - 1 for answer in row) for row in answers]
        rows = [torch.tensor([tokens(len(prompt) + more, len(prompt) + more)]) for prompt, more in zip(prompts, fed, strict=True)]
        read = [torch.randn(1, 1 + more, SMOLLM2["hidden_size"], generator=draw) for more in fed]
        taken = seconds(
            {
                "body": lambda rows=rows: [model.base_model(input_ids=row, use_cache=False) for row in rows],
                "head": lambda read=read: [model.lm_head(states) for states in read],
                "tree": lambda prompts=prompts, answers=answers: Scorer(batch_tokens=2048)(model, prompts, answers),
            }
        )
        number = sum(map(torch.numel, rows))
        yield {
            "prompts": name,
            "layers": layers,
            "tokens": number,
            "tokens_per_s": number / taken["tree"],
            "limit_tokens_per_s": number / (taken["body"] + taken["head"]),
            "share": (taken["body"] + taken["head"]) / taken["tree"],
            "share_without_head": taken["body"] / taken["tree"],
        }
