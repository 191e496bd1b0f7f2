"""The declaration that a family file makes, and helpers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynexport.exporter.families.architecture import Architecture, Array, Source
from dynexport.exporter.families.class_fields import CLASS_DEFAULTS
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults, read_rotary
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
    """

    model_type: str
    title: str
    features: str
    read: Callable[[Fields], Architecture]
    base_prefix: str = "model."
    twins: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    masks: str = ""

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
        return {"is_causal": True, **CLASS_DEFAULTS[self.model_type], **named}


def llama_like(fields: Fields, *, rope: RopeDefaults | None = None, **overrides: Any) -> Architecture:
    """Return the architecture that llama, mistral, qwen, smollm3, gemma2 and phi3 share.

    q, k and v are stacked into one ``qkv_proj``: fewer, larger matrix products at decode. The families that have
    ``attention_bias`` and ``mlp_bias`` read them; in the others these must agree with what the family does.

    Args:
        fields: the fields of config.json.
        rope: the family's defaults of rotary positions; None for the usual ones.
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
    rotary = read_rotary(fields, head_dim, max_length, rope)
    values: dict[str, Any] = {
        "family": fields.family,
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size"),
        "max_length": rotary.context(max_length),
        "positions": rotary,
        "norm_epsilon": fields.number("rms_norm_eps"),
        "tied_embeddings": fields.flag("tie_word_embeddings"),
    }
    if "activation" not in overrides:
        values["activation"] = fields.activation("hidden_act")
    for name, bias in (("attention_bias", "qkv_bias"), ("mlp_bias", "mlp_bias")):
        if name not in fields.asked:
            fields.only(name, bool(overrides.get(bias)))
    values["sources"] = stacked_qkv(layers, bias=bool(overrides.get("qkv_bias")))
    return Architecture(**{**values, **overrides})


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


def stacked_qkv(layers: int, *, bias: bool) -> dict[str, Source]:
    """Return the sources of ``qkv_proj`` in every layer: the separate q, k and v projections."""
    return {
        f"model.layers.{i}.self_attn.qkv_proj.{kind}": Source(
            tuple(f"model.layers.{i}.self_attn.{part}_proj.{kind}" for part in "qkv")
        )
        for i in range(layers)
        for kind in (("weight", "bias") if bias else ("weight",))
    }


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


def renamed(layers: int, outer: dict[str, str], inner: dict[str, str], prefix: str) -> dict[str, Source]:
    """Return the sources of weights and biases for a family with other module names.

    Args:
        layers: the number of layers.
        outer: module of the graph -> module of the checkpoint, outside the layers.
        inner: module of the graph -> module of the checkpoint, within a layer.
        prefix: the checkpoint's name prefix of a layer, with ``{i}`` for its number.
    """
    modules = dict(outer)
    for i in range(layers):
        modules |= {f"model.layers.{i}.{ours}": prefix.format(i=i) + theirs for ours, theirs in inner.items()}
    return {
        f"{ours}.{kind}": Source((f"{theirs}.{kind}",))
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def deinterleave_qkv(heads: int, head_dim: int) -> Callable[[list[Array]], Array]:
    """Return a ``combine`` that reorders fused qkv rows from [heads, 3, head_dim] to [3, heads, head_dim]."""

    def combine(parts: list[Array]) -> Array:
        (fused,) = parts
        rest = fused.shape[1:]
        return fused.reshape(heads, 3, head_dim, *rest).swapaxes(0, 1).reshape(3 * heads * head_dim, *rest)

    return combine
