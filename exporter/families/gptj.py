"""GPT-J: attention and MLP in parallel behind one LayerNorm, rotary positions of neighbouring channels."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.families.family import Family, layer_norm_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import Combine, Sources, renamed, stacked_qkv, turned_qkv

_OUTER = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"}
_INNER = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}
PREFIX = "transformer.h.{i}."
TWINS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
MASKS = r"(transformer\.)?h\.\d+\.attn\.(masked_bias|bias|causal_mask)"
_BASE = 10000.0


def _rotary(fields: Fields, hidden: int, head_dim: int) -> Rotary:
    """Return the rotary positions of the first ``rotary_dim`` channels of a head."""
    if fields.get("rotary_dim") is None and hidden != head_dim:
        raise fields.error("rotary_dim", None, f"an even number up to the {head_dim} channels of a head")
    dim = fields.integer("rotary_dim", default=hidden, at_most=head_dim)
    if dim % 2:
        raise fields.error("rotary_dim", dim, f"an even number up to the {head_dim} channels of a head")
    for name in ("rope_parameters", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"):
        fields.only(name, None)
    fields.only("rope_theta", _BASE)
    return Rotary(dim, tuple(_BASE ** (-i / dim) for i in range(0, dim, 2)))


def gptj_like(fields: Fields, qkv: Sources) -> Architecture:
    """Return the architecture that gptj and codegen share, with these sources of ``qkv_proj``."""
    hidden, heads, layers = fields.integer("n_embd"), fields.integer("n_head"), fields.layers("n_layer")
    # A tied head would have a bias too, which no checkpoint has.
    fields.only("tie_word_embeddings", False)
    return layer_norm_like(
        fields,
        hidden_size=hidden,
        heads=heads,
        layers=layers,
        intermediate_size=fields.integer("n_inner", default=4 * hidden),
        max_length=fields.integer("n_positions"),
        positions=_rotary(fields, hidden, max(1, hidden // heads)),
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        residual="parallel",
        shared_norm=True,
        mlp_bias=True,
        head_bias=True,
        sources=renamed(layers, _OUTER, _INNER, PREFIX) | qkv,
    )


def turned(fields: Fields) -> Combine:
    """Return the ``combine`` for the three parts of qkv."""
    heads = fields.integer("n_head")
    head_dim = max(1, fields.integer("n_embd") // heads)
    return turned_qkv(heads, heads, head_dim, min(head_dim, fields.integer("rotary_dim", default=head_dim)))


def _read(fields: Fields) -> Architecture:
    layers = fields.layers("n_layer")
    return gptj_like(fields, stacked_qkv(layers, bias=False, combine=turned(fields), prefix=PREFIX + "attn."))


FAMILY = Family(
    "gptj",
    "GPT-J",
    "parallel residual behind one LayerNorm, rotary of neighbouring channels",
    _read,
    base_prefix="transformer.",
    twins=TWINS,
    masks=MASKS,
)
