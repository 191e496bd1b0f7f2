"""SmolLM3: llama with layers that have no rotary positions."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like, used_window
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults


def _rotary_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Return whether each layer is rotary: 1 in ``no_rope_layers``; without the field, all but every fourth layer."""
    listed, interval = fields.get("no_rope_layers"), fields.get("no_rope_layer_interval")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval")
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(listed, list) or len(listed) < layers or any(value not in (0, 1) for value in listed):
        raise fields.error("no_rope_layers", listed, f"{layers} values of 0 or 1")
    return tuple(bool(value) for value in listed[:layers])


def _read(fields: Fields) -> Architecture:
    layers = fields.layers("num_hidden_layers")
    bias = fields.flag("attention_bias")
    rotary_layers = _rotary_layers(fields, layers)
    return llama_like(
        fields,
        rope=RopeDefaults(theta=2000000.0),
        rotary_layers=rotary_layers,
        windows=layer_windows(fields, used_window(fields), [not rotary for rotary in rotary_layers]),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family("smollm3", "SmolLM3", "layers without rotary positions", _read)
