"""Huginn: a core of layers that runs many times, with the input injected each time, between a prelude and a coda."""

from __future__ import annotations

import math

import numpy as np

from dynexport.exporter.families.architecture import Architecture, Array, Rotary, Source
from dynexport.exporter.families.class_fields import ROTARY
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import Combine, Sources, turned_qkv

ADAPTER = "transformer.adapter.weight"
_OUTER = {"embed_tokens": "wte", "norm": "ln_f"}
_INNER = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "pre_feedforward_layernorm": "norm_3",
    "post_feedforward_layernorm": "norm_4",
    "self_attn.o_proj": "attn.proj",
    "mlp.down_proj": "mlp.proj",
}
# Other values name other code than that of the published model.
_ONLY = {
    "architecture_class_name": "RecurrentGPT",
    "bias": False,
    "block_class_name": "SandwichBlock",
    "injection_type": "linear",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "state_init": "like-init",
    "test_time_noise": 0,
}


def _read(fields: Fields) -> Architecture:
    for name, value in _ONLY.items():
        fields.only(name, value)
    for name in ROTARY:
        fields.only(name, None)
    hidden, heads, vocab = fields.integer("n_embd"), fields.integer("n_heads"), fields.integer("vocab_size")
    if hidden % heads or hidden // heads % 2:
        raise fields.error("n_embd", hidden, f"an even number of channels for each of {heads} heads")
    head_dim, tied = hidden // heads, fields.flag("tie_embeddings")
    fields.only("head_dim", head_dim, "`n_embd` over `n_heads`")
    fields.only("num_key_value_heads", heads, "`n_heads`")
    fields.only("padded_vocab_size", vocab, "`vocab_size`")
    fields.only("tie_word_embeddings", tied, "`tie_embeddings`")
    least = {"n_layers_in_prelude": 0, "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1}
    prelude, core, coda = (fields.integer(name, at_least=bound, at_most=1024) for name, bound in least.items())
    layers = fields.layers("n_layers")
    if layers != prelude + core + coda:
        raise fields.error("n_layers", layers, f"{prelude} + {core} + {coda}, the sum of {', '.join(least)}")
    parts = (("prelude", prelude), ("core_block", core), ("coda", coda))
    names = [f"transformer.{part}.{i}" for part, count in parts for i in range(count)]
    base = fields.number("rope_base")
    qk_bias = fields.flag("qk_bias")
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=vocab,
        max_length=fields.integer("block_size"),
        positions=Rotary(head_dim, tuple(base ** (-i / head_dim) for i in range(0, head_dim, 2))),
        norm_epsilon=fields.number("norm_eps"),
        post_norms=True,
        norms_of_sums=True,
        embedding_scale=math.sqrt(hidden),
        qkv_bias=qk_bias,
        tied_embeddings=tied,
        as_declared=True,
        loops=fields.integer("mean_recurrence"),
        loop_body=(prelude, prelude + core - 1),
        sources=_sources(names, heads, head_dim, qk_bias=qk_bias),
    )


def _sources(names: list[str], heads: int, head_dim: int, *, qk_bias: bool) -> Sources:
    """Return the sources of all tensors; ``names`` are the checkpoint's names of the layers."""
    found = {f"model.{ours}.weight": Source((f"transformer.{theirs}.weight",)) for ours, theirs in _OUTER.items()}
    found["model.adapter_state.weight"] = Source((ADAPTER,), _half(0, columns=True))
    found["model.adapter_input.weight"] = Source((ADAPTER,), _half(1, columns=True))
    turned = turned_qkv(heads, heads, head_dim, head_dim)
    for i, name in enumerate(names):
        layer = f"model.layers.{i}."
        found |= {f"{layer}{ours}.weight": Source((f"{name}.{theirs}.weight",)) for ours, theirs in _INNER.items()}
        for which, part in enumerate(("gate", "up")):
            found[f"{layer}mlp.{part}_proj.weight"] = Source((f"{name}.mlp.fc.weight",), _half(which), moves_rows=True)
        qkv = f"{layer}self_attn.qkv_proj."
        found[f"{qkv}weight"] = Source((f"{name}.attn.Wqkv.weight",), lambda parts: turned(np.split(parts[0], 3)))
        if qk_bias:
            found[f"{qkv}bias"] = Source((f"{name}.attn.qk_bias",), lambda parts: turned(_biases(parts[0])))
    return found


def _half(which: int, *, columns: bool = False) -> Combine:
    return lambda parts: np.ascontiguousarray(np.split(parts[0], 2, axis=int(columns))[which])


def _biases(stored: Array) -> list[Array]:
    """Return the biases of q, k and v of the stored ones of q and k [2, 1, heads, head_dim]."""
    query, key = stored.reshape(2, -1)
    return [query, key, np.zeros_like(key)]


FAMILY = Family(
    "huginn_raven",
    "Huginn",
    "a core of layers runs many times between prelude and coda, with its input injected each time",
    _read,
    base_prefix="",
    twins={"num_attention_heads": "n_heads", "hidden_size": "n_embd", "num_hidden_layers": "n_layers"},
    masks=r"freqs_cis",
)
