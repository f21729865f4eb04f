"""The cost of merging adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from recbole_llm.costs.lora import AdapterShape
from recbole_llm.costs.parts import FP32, counted, larger, shape_of
from recbole_llm.llm.backbones import Outline
from recbole_llm.llm.memory import training_memory
from recbole_llm.store.costs import Cost


def merge_cost(outline: Outline, merge: Callable[[], Any], adapters: Sequence[AdapterShape], *, at_most: bool) -> Cost:
    """The cost of a method that searches the weights of adapters.

    Args:
        merge: runs it on a blank LM.
        at_most: answers are decoded, and may end earlier.
    """
    trained, read, exact = counted(lambda _: merge(), 1, gradients=True)
    shape, beside = shape_of(outline), sum(adapter.parameters for adapter in adapters)
    through = training_memory(outline.config, dtype=outline.dtype, r=sum(adapter.r for adapter in adapters))
    # the passes of a batch are one graph: those over the prompts, then those over the answers with their cache
    graph = max(trained.most_fed, trained.most_cached)
    with_gradients = {"activations": graph * through.per_token, "logits": 3 * FP32 * trained.most_logits * shape.vocabulary}
    at_once = larger(with_gradients if trained.fed else {}, shape.forward_bytes(read))
    memory = {"weights": shape.weight_bytes, "adapters": beside * FP32} | at_once
    return Cost(
        trained=trained,
        read=read,
        memory=memory,
        train_flops=2 * shape.flops(trained) + 4.0 * beside * trained.fed,
        read_flops=shape.flops(read) + 2.0 * beside * read.fed,
        exact=exact,
        at_most=at_most,
        note="at most: decoded answers may end earlier" if at_most else "",
    )
