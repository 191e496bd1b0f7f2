"""The declaration that a family file makes, and helpers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.families.class_defaults import CLASS_DEFAULTS
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults, read_rotaries, read_rotary
from dynexport.exporter.families.sources import stacked_qkv, turned_qkv
from dynexport.runtime.bundle.errors import DynexportError


@dataclass(frozen=True)
class Family:
    """One Hugging Face ``model_type``.

    Attributes:
        model_type: the family's ``model_type`` in config.json.
        title: the model names, for the table in the docs.
        features: the distinguishing features, for the table in the docs.
        read: makes the architecture from config fields.
        base_prefix: the name prefix that checkpoints of the bare model do not have (``transformer.`` of gpt2).
        twins: a second name of a field -> its name in transformers' class (the inverse of ``attribute_map``).
        renamed: a tensor -> its other name, which some checkpoints of transformers 5 have.
        masks: a regular expression of the causal masks and constants that old versions stored as tensors.
        own_layers: whether single layers may have sizes and windows of their own (``per_layer_config``).
    """

    model_type: str
    title: str
    features: str
    read: Callable[[Fields], Architecture]
    base_prefix: str = "model."
    twins: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    masks: str = ""
    own_layers: bool = False

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a config.json under the names of transformers' class, with its defaults added.

        Raises:
            DynexportError: when two names of one field have different values.
        """
        named = dict(config)
        for twin, name in self.twins.items():
            value = named.pop(twin, None)
            if value is not None and named.get(name) is None:
                named[name] = value
            elif value is not None and named[name] != value:
                raise DynexportError(
                    f"config.json ({self.model_type}): {twin}: expected {named[name]!r:.80} as in {name}, which "
                    f"is another name of this field, found {value!r:.80}; remove the wrong one from config.json"
                )
        kinds = named.get("layer_types")
        if isinstance(kinds, list):
            named["layer_types"] = ["full_attention" if kind == "attention" else kind for kind in kinds]  # its old name
        defaults = {self.twins.get(name, name): value for name, value in CLASS_DEFAULTS[self.model_type].items()}
        return {"is_causal": True, **defaults, **named}


def llama_like(
    fields: Fields,
    *,
    rope: RopeDefaults | None = None,
    sliding_rope: RopeDefaults | None = None,
    stack_qkv: bool = True,
    **overrides: Any,
) -> Architecture:
    """Return the architecture that llama and the families with its field names share.

    q, k and v are stacked into one ``qkv_proj``: fewer, larger matrix products at decode. The families that have
    ``attention_bias`` and ``mlp_bias`` read them; in the others these must agree with what the family does. Sources in
    ``overrides`` are added to those of ``qkv_proj``.

    Args:
        fields: the fields of config.json.
        rope: the family's defaults of rotary positions; None for the usual ones.
        sliding_rope: those of layers with a window, where they have their own.
        stack_qkv: whether the checkpoint has q, k and v apart.
        overrides: fields of the architecture that differ.

    Raises:
        DynexportError: when a field is missing or its value is not supported.
    """
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.layers("num_hidden_layers")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.error("hidden_size", hidden, f"a multiple of {heads} heads")
    head_dim = fields.integer("head_dim", default=hidden // heads)
    max_length = fields.integer("max_position_embeddings")
    sliding = None
    if rope is not None and sliding_rope is not None:
        rotary, sliding = read_rotaries(fields, head_dim, max_length, rope, sliding_rope)
    else:
        rotary = read_rotary(fields, head_dim, max_length, rope)
    values: dict[str, Any] = {
        "family": fields.family,
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "vocab_size": fields.integer("vocab_size"),
        "max_length": rotary.context(max_length),
        "positions": rotary,
        "sliding_positions": sliding,
    }
    if "intermediate_size" not in overrides:
        values["intermediate_size"] = fields.integer("intermediate_size")
    if "norm_epsilon" not in overrides:
        values["norm_epsilon"] = fields.number("rms_norm_eps")
    if "tied_embeddings" not in overrides:
        values["tied_embeddings"] = fields.flag("tie_word_embeddings")
    if "activation" not in overrides:
        values["activation"] = fields.activation("hidden_act")
    for name, bias in (("attention_bias", "qkv_bias"), ("mlp_bias", "mlp_bias")):
        if name not in fields.asked:
            fields.only(name, bool(overrides.get(bias)))
    stacked = stacked_qkv(layers, bias=bool(overrides.get("qkv_bias"))) if stack_qkv else {}
    return Architecture(**{**values, **overrides, "sources": {**stacked, **overrides.get("sources", {})}})


def neighbours_rotated(architecture: Architecture) -> Architecture:
    """Return the architecture of a model with q, k and v apart that rotates channels 2 i and 2 i + 1 together."""
    a = architecture
    assert isinstance(a.positions, Rotary)
    turned = turned_qkv(a.heads, a.kv_heads, a.head_dim, a.positions.dim)
    sources = {**a.sources, **stacked_qkv(a.layers, bias=a.qkv_bias, combine=turned)}
    return replace(a, sources=sources)


def layer_norm_like(fields: Fields, *, hidden_size: int, heads: int, layers: int, **values: Any) -> Architecture:
    """Return the architecture that gpt2, opt, gpt-neox and bloom share: LayerNorm, no grouped heads, no MLP gate."""
    if hidden_size % heads:
        raise fields.error("hidden_size", hidden_size, f"a multiple of {heads} heads")
    fields.only("head_dim", hidden_size // heads, "`hidden_size` over heads")
    return Architecture(
        family=fields.family,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden_size // heads,
        vocab_size=fields.integer("vocab_size"),
        norm="layer",
        gated_mlp=False,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        **values,
    )


def used_window(fields: Fields) -> int | None:
    """Return ``sliding_window`` if ``use_sliding_window`` is true, else None, as in transformers."""
    fields.get("sliding_window")
    return fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None


def layer_windows(fields: Fields, window: int | None, sliding: Sequence[bool]) -> tuple[int | None, ...]:
    """Return the window of each layer: ``window`` in sliding layers, None in the others.

    Args:
        fields: the fields of config.json.
        window: the sliding window, in tokens, or None.
        sliding: whether each layer slides, for a config without ``layer_types``.

    Raises:
        DynexportError: when ``layer_types`` is malformed, or has a sliding layer in a model without a window:
            transformers' attention implementations differ there.
    """
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != len(sliding) or any(kind not in known for kind in kinds):
            raise fields.error("layer_types", kinds, f"{len(sliding)} of {' or '.join(known)}")
        sliding = [kind == "sliding_attention" for kind in kinds]
        if window is None and any(sliding):
            raise fields.error("layer_types", kinds, "full_attention in a model without a sliding window")
    return tuple(window if slides else None for slides in sliding)


def same_window(fields: Fields) -> tuple[int | None, ...]:
    """Return ``sliding_window`` for every layer; in these families transformers ignores ``layer_types``."""
    return (fields.optional_integer("sliding_window"),) * fields.layers("num_hidden_layers")
