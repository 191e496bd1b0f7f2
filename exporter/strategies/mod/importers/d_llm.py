"""D-LLM: whole blocks of a llama in Meta's own layout, with LoRA on queries, keys and values."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.strategies.mod.importers.imported import (
    ImportedCheckpoint,
    Origin,
    Origins,
    under_contract,
)
from dynexport.exporter.strategies.mod.importers.own_fields import OwnFields

_TITLE = "D-LLM"
_ROUTERS = r"layers\.\d+\.router\..+"
_OUTSIDE = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_INSIDE = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_FACTS: dict[str, Any] = {
    "strategy": "mod",
    "target": "block",
    "skipped_kv": "none",
    "router_input": "hidden",
    "router": {"kind": "mlp", "activation": "silu"},
    "gate": "none",
    "decision": {"rule": "router", "threshold": 0.5, "comparison": ">="},
    "positions": "original",
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_TOKENS_NOTE = "tokens: begin 1 and end 2, as in every tokenizer of Llama 2; config.json may name others"


def _recognises(stored: Checkpoint) -> bool:
    return "model_type" not in stored.config and any(re.fullmatch(_ROUTERS, name) for name in stored.names)


def _read(stored: Checkpoint) -> ImportedCheckpoint:
    fields = OwnFields(stored)
    fields.drop("lora_rank", "dynamic_active_target", "max_batch_size")
    config = _config(stored, fields)
    start = fields.integer("dynamic_start_layer", 2, at_least=0)
    width = fields.integer("dynamic_router_hdim", 512)
    keep_first = fields.integer("dynamic_reserve_initials", 2, at_least=0)
    layers = list(range(start, config["num_hidden_layers"]))
    if not layers:
        raise fields.error("dynamic_start_layer", f"a layer below {config['num_hidden_layers']}", start)
    origins = {f"{ours}.weight": Origin((f"{theirs}.weight",)) for ours, theirs in _OUTSIDE.items()}
    for layer in range(config["num_hidden_layers"]):
        origins |= _layer(stored, layer, config)
    for layer in layers:
        origins |= _router(layer, config["hidden_size"], width)
    if "rope.freqs" in stored.names:  # a constant, under the name of such a constant
        origins["model.rotary_emb.inv_freq"] = Origin(("rope.freqs",))
    facts = _FACTS | {"routed_layers": layers, "keep_first": keep_first}
    notes = [_TOKENS_NOTE] * (not _TOKENS.keys() <= fields.config.keys())
    return under_contract(stored, _TITLE, _ROUTERS, origins, facts, _TOKENS | fields.config | config, notes)


def _config(stored: Checkpoint, fields: OwnFields) -> dict[str, Any]:
    """Return the fields of a Hugging Face llama for Meta's params.json."""
    heads = fields.integer("n_heads")
    fields.drop("multiple_of", "ffn_dim_multiplier", "vocab_size")  # the tensors tell what follows from these
    sizes = [_rows(stored, name) for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")]
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": fields.integer("dim"),
        "num_hidden_layers": fields.integer("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("n_kv_heads", heads),
        "rms_norm_eps": fields.number("norm_eps", 1e-5),
        "max_position_embeddings": fields.integer("max_seq_len", 2048),
        "vocab_size": sizes[0],
        "intermediate_size": sizes[1],
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    if hidden % (2 * heads) or heads % kv_heads:
        raise fields.error("n_heads", f"heads of an even number of channels, and a multiple of {kv_heads}", heads)
    return config


def _rows(stored: Checkpoint, name: str) -> int:
    """Return the first dimension of a tensor; 1 for one that is absent or a number, which is an error later."""
    return (*(stored.shape(name) if name in stored.names else ()), 1)[0]


def _layer(stored: Checkpoint, layer: int, config: dict[str, Any]) -> Origins:
    """Return the origins of a layer; queries and keys of Meta rotate channels 2 i and 2 i + 1 together."""
    theirs, ours = f"layers.{layer}.", f"model.layers.{layer}."
    origins = {f"{ours}{name}.weight": Origin((f"{theirs}{part}.weight",)) for name, part in _INSIDE.items()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    for part, count in {"q": heads, "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}.items():
        rows = count * hidden // heads
        weight, lora = f"{theirs}attention.w{part}.weight", f"{theirs}attention.lora_{part}.linear_"
        first, second = f"{lora}A.weight", f"{lora}B.weight"
        names, shapes = [weight], [(rows, hidden)]
        if first in stored.names or second in stored.names:
            rank = _rows(stored, first)
            names, shapes = [weight, first, second], [(rows, hidden), (rank, hidden), (rows, rank)]
        combine = _merged if part == "v" else _turned(count)
        origins[f"{ours}self_attn.{part}_proj.weight"] = Origin(tuple(names), tuple(shapes), combine, (rows, hidden))
    return origins


def _merged(parts: list[np.ndarray]) -> np.ndarray:
    """Return a weight with its LoRA matrices A and B, if there are, as W + B A."""
    weight = parts[0].astype(np.float64)
    return np.asarray(weight + parts[2].astype(np.float64) @ parts[1] if len(parts) > 1 else weight)


def _turned(heads: int) -> Any:
    """Return a ``combine`` that merges LoRA and reorders the rows of every head for Hugging Face's rotation."""

    def combine(parts: list[np.ndarray]) -> np.ndarray:
        weight = _merged(parts)
        return np.asarray(weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))

    return combine


def _router(layer: int, hidden: int, width: int) -> Origins:
    """Return the origins of a router, whose second logit runs the token."""
    theirs, ours = f"layers.{layer}.router.", f"model.layers.{layer}.mod_router."
    return {
        f"{ours}fc1.weight": Origin((f"{theirs}linear_1.weight",), ((width, hidden),)),
        f"{ours}fc1.bias": Origin((f"{theirs}linear_1.bias",), ((width,),)),
        f"{ours}norm.weight": Origin((f"{theirs}norm.weight",), ((width,),)),
        f"{ours}fc2.weight": Origin((f"{theirs}linear_2.weight",), ((2, width),), _second_minus_first, (1, width)),
        f"{ours}fc2.bias": Origin((f"{theirs}linear_2.bias",), ((2,),), _second_minus_first, (1,)),
    }


def _second_minus_first(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0][1:] - parts[0][:1]


D_LLM = Importer("d-llm", _read, _recognises)

__all__ = ["D_LLM"]
