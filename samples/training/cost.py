"""Count the floating-point operations of a model whose layers run some of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The factor of forward and backward pass: the backward pass has two products per forward product.
TRAINING = 3


def forward_flops(config: Any, tokens: int, ran: Sequence[int], routers: int = 0) -> int:
    """Return the operations of one row's forward pass; a multiplication and its addition are two operations.

    Only matrix products count: no norms, activations, softmax and rotary embedding, and no products that the causal
    mask discards.

    Args:
        config: a transformers ``LlamaConfig``.
        tokens: number of the row's tokens; the head runs on all of them.
        ran: per layer, the number of tokens that run in it and attend to each other.
        routers: multiplications of all routers and predictors per token.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = hidden * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    attended = [count * (count + 1) // 2 for count in ran]
    layers = sum(ran) * matrices + sum(attended) * 2 * heads
    return 2 * (layers + tokens * (hidden * config.vocab_size + routers))
