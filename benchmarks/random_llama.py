"""A llama model with random weights, large enough that its decoding is memory-bound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import random_tensors, save_checkpoint


def save_llama(
    directory: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    max_length: int,
    contract: Mapping[str, Any],
    routers: Mapping[str, tuple[int, ...]],
) -> None:
    """Save the model as a Hugging Face checkpoint, float32, with tied embeddings.

    Args:
        contract: the object under "dynexport" in config.json.
        routers: name -> shape of additional tensors.
    """
    head_dim = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
        shapes |= {f"{name}self_attn.{part}_proj.weight": (kv_heads * head_dim, hidden) for part in "kv"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, intermediate)
    tensors = random_tensors({**shapes, **routers})
    norms = [f"model.layers.{i}.{part}_layernorm.weight" for i in range(layers) for part in ("input", "post_attention")]
    tensors |= {name: np.ones(hidden, np.float32) for name in (*norms, "model.norm.weight")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": True,
        "dynexport": contract,
    }
    save_checkpoint(directory, config, tensors)
