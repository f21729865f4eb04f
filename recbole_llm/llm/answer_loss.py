"""The cross-entropy of answer tokens under a causal LM, with few logits in memory at a time.

The logits of a vocabulary of 150,000 words take more memory than all activations of a small LM. So ``lm_head`` runs on some
states at a time, and their gradients are computed in the forward pass, after which the logits are dropped (as Liger Kernel does,
arXiv 2410.10989). This costs no further products, since a frozen ``lm_head`` needs no gradient.

Legend: B rows, T tokens, N answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_llm.llm.memory import LOGITS_AT_ONCE
from recbole_llm.store.costs import unmetered
from recbole_llm.store.random_state import preserved_random_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

PROBE = 30.0  # standard deviation of the logits that tell whether a model changes those of its head
_BARE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def answer_loss(model: Any, inputs: Mapping[str, Any], before: Tensor, answers: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of answers [N], given the states where ``before`` [B, T] is True.

    Args:
        model: a causal LM, or one with adapters.
        inputs: keyword arguments of its forward pass over [B, T] tokens.
    """
    head = model.get_output_embeddings()
    if head is None:
        return F.cross_entropy(model(**inputs).logits[before].float(), answers)
    if any(parameter.requires_grad for parameter in head.parameters()) or not is_bare(model, head):
        with _reading(head, lambda states: states[before.to(states.device)].unsqueeze(0)):
            logits = model(**inputs).logits[0]  # [N, V]
        return F.cross_entropy(logits.float(), answers.to(logits.device))
    found: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        found.append(states[before.to(states.device)])  # [N, D]
        return found[0][:1].unsqueeze(0)  # [1, 1, D]; of a slice, torch would copy the matrix of the head

    with _reading(head, keep):
        model(**inputs)
    (states,) = found
    return _ChunkedLoss.apply(states, head, answers.to(states.device))


@contextmanager
def _reading(head: nn.Module, chosen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``head`` runs on what ``chosen`` makes of its input [B, T, D]."""
    hook = head.register_forward_pre_hook(lambda _, given: (chosen(given[0]), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def is_bare(model: Any, head: nn.Module) -> bool:
    """Whether the logits of the model are those of its head; some models scale or cap them afterwards.

    The head reads a random state whose logits are large: none is near 0, where a cap changes nothing.
    """
    if head not in _BARE:
        outputs: list[Tensor] = []
        with in_memory(head):
            weight: Any = head.weight
            width = float(weight[:256].detach().float().std())

        def random(states: Tensor) -> Tensor:
            state = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))  # [1, 1, D]
            return (state * PROBE / max(float(state.norm()) * width, 1e-6)).to(states)

        hook = head.register_forward_hook(lambda *call: outputs.append(call[-1]))
        with unmetered(), preserved_random_state(), torch.no_grad(), _reading(head, random):
            token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
            logits = model(input_ids=token, use_cache=False).logits  # [1, 1, V]
        hook.remove()
        _BARE[head] = len(outputs) == 1 and torch.equal(outputs[0].to(logits.device, logits.dtype), logits)
    return _BARE[head]


def in_memory(head: nn.Module) -> AbstractContextManager[None]:
    """Within this block, ``head`` has its weights, also if accelerate keeps them elsewhere between its passes."""
    from accelerate.utils import align_module_device

    return align_module_device(head)


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of answers [N] given states [N, D]; the gradient of the states is computed with it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Any, answers: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[0]
        total = torch.zeros((), device=states.device)
        gradients: list[Tensor] = []
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for some, own in zip(states.split(size), answers.split(size), strict=True):
            with torch.set_grad_enabled(needed):
                leaf = some.detach().requires_grad_(needed)
                logits = head(leaf)  # [n, V]
            logp = logits.detach().float().log_softmax(-1)  # [n, V]
            chosen = own.to(logp.device).unsqueeze(1)  # [n, 1]; a tied head may be on another device than the last layer
            total -= logp.gather(1, chosen).sum().to(total.device) / len(answers)
            if needed:
                slope = logp.exp_().scatter_add_(1, chosen, -torch.ones_like(logp[:, :1]))  # of the sum of losses
                gradients.append(torch.autograd.grad(logits, leaf, slope.to(logits.dtype))[0])
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (states,) = ctx.saved_tensors  # of the sum; divided in fp32, since float16 has no room for small numbers
        return (states.float() * (gradient / len(states))).to(states.dtype), None, None
