"""Nemotron-NAS (DeciLM): a llama whose ``block_configs`` give every layer its own sizes, or no attention or MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynexport.exporter.families.architecture import Architecture, LayerSizes
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.per_layer import check_some

_BLOCKS, _ATTENTION, _MLP = "block_configs", "attention", "ffn"
# What is read of each part of a block; every other field must be off.
_READ = {_ATTENTION: ("no_op", "n_heads_in_group"), _MLP: ("no_op", "ffn_mult", "intermediate_size", "hidden_act")}
# The widths of MLPs are multiples of this.
_MULTIPLE = 256


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    architecture = llama_like(
        fields,
        intermediate_size=1,  # that of each layer follows
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
    fields.only("intermediate_size", None)
    fields.only("num_key_value_heads", architecture.heads, "`num_attention_heads`")
    blocks = fields.get(_BLOCKS)
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or len(blocks) != architecture.layers:
        raise fields.error(_BLOCKS, blocks, f"{architecture.layers} blocks, as num_hidden_layers says")
    sizes = [_sizes(fields, layer, block, architecture) for layer, block in enumerate(blocks)]
    check_some(fields, _BLOCKS, sizes)
    return architecture.with_sizes(sizes)


def _sizes(fields: Fields, layer: int, block: Any, architecture: Architecture) -> LayerSizes:
    """Return the sizes of a layer from its block."""
    where = f"{_BLOCKS}: layer {layer}"
    if not isinstance(block, Mapping) or not set(block) <= {_ATTENTION, _MLP}:
        raise fields.error(where, block, f"an object with {_ATTENTION} and {_MLP}")
    attention, mlp = (_part(fields, where, block, name) for name in (_ATTENTION, _MLP))
    heads = kv_heads = width = 0
    if not _is_off(attention):
        heads, group = architecture.heads, attention.integer("n_heads_in_group")
        if heads % group:
            raise attention.error("n_heads_in_group", group, f"a divisor of {heads} heads")
        kv_heads = heads // group
    if not _is_off(mlp):
        if mlp.get("hidden_act") is not None and mlp.activation("hidden_act") != architecture.activation:
            raise mlp.error("hidden_act", mlp.get("hidden_act"), f"{architecture.activation}, as in the model")
        width = mlp.optional_integer("intermediate_size") or _width(mlp, architecture.hidden_size)
    return LayerSizes(heads, kv_heads, width)


def _part(fields: Fields, where: str, block: Mapping[str, Any], name: str) -> Fields:
    """Return the fields of a part of a block, after a check that no unknown one is on."""
    values = block.get(name)
    if not isinstance(values, Mapping):
        raise fields.error(f"{where}: {name}", values, "an object of fields")
    part = fields.within(f"{where}: {name}: ", values)
    for field, value in values.items():
        if field not in _READ[name] and value is not None and value is not False:
            raise part.error(field, value, "null or false, as it is not supported")
    return part


def _is_off(part: Fields) -> bool:
    return part.get("no_op") is not None and part.flag("no_op")


def _width(mlp: Fields, hidden: int) -> int:
    """Return the width of an MLP that has ``ffn_mult`` times the weights of a hidden x hidden matrix, rounded up."""
    factor = mlp.number("ffn_mult")
    if factor > _MULTIPLE * hidden:  # no width that a matrix beside ``hidden`` would have
        raise mlp.error("ffn_mult", factor, f"at most {_MULTIPLE * hidden}")
    return -(-int(2 * factor * hidden / 3) // _MULTIPLE) * _MULTIPLE


FAMILY = Family(
    "nemotron-nas",
    "Nemotron-NAS (Llama-3.1-Nemotron-51B, -Ultra-253B, Llama-3.3-Nemotron-Super-49B)",
    "llama; every layer has its own numbers of key heads and MLP channels, or no attention or MLP",
    _read,
)
