"""MoLoRec: the first version of RecCocktail, with one pair of coefficients for each adapted module.

Hou et al., "MoLoRec: A Generalizable and Efficient Framework for LLM-Based Recommendation" (arXiv 2502.08271 v1): a
domain-general LoRA and a domain-specific one, mixed with separate weights in each module (softmax over the two), with the
prompt and data recipe of the authors' code. It differs from LoRACocktail in settings only, which are in
``properties/model/MoLoRec.yaml``; docs/models/molorec.md lists them.
"""

from __future__ import annotations

from recbole_llm.model.loracocktail import LoRACocktail


class MoLoRec(LoRACocktail):
    """Domain-general LoRA + domain-specific LoRA, mixed per module."""
