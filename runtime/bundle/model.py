"""The manifest's sections on the model: its sizes, its cost, its special tokens, its source."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part, Size, Whole

Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]


class Model(Part):
    """The sizes that a runtime needs.

    Attributes:
        family: ``model_type`` of the checkpoint.
        layers: number of layers; of the pool, if tokens take paths.
        hidden_size: size of hidden_states.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: size of a head.
        vocab_size: size of the vocabulary; token ids are 0..vocab_size-1.
        max_length: most tokens of a row, prompt and generated tokens together.
        parameters: number of elements of all weights.
    """

    family: str
    layers: Size
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_length: Size
    parameters: Annotated[int, Field(ge=1, lt=1 << 63)]


class PartCost(Part):
    """Bytes of weights of a layer that depend on one decision.

    Attributes:
        run: bytes that are read only if a token decides to run, a part of the layer's in ``layers``.
        skip: bytes that are read besides if a token decides to skip.
    """

    run: Bytes
    skip: Bytes = 0


class Cost(Part):
    """Bytes that a decode step reads (weights as stored, and caches), and its FLOPs; for reports, not for a runtime.

    Attributes:
        shared: bytes of the head and final norm, which every step reads.
        layers: bytes of each layer's weights, its router included, by layer index.
        kv_per_token: bytes of key and value of one cached token in one layer.
        layer_flops: FLOPs of one layer's matrix products for one token, two per weight.
        router: bytes of weights that a router reads to choose the next layer of a path; 0 if tokens take no paths.
        router_flops: FLOPs of one such choice.
        parts: for each decision about a token what depends on it, where it is not the whole layer; else empty.
        experts: the experts of a layer; 0 in a model without any.
        experts_per_token: how many of them run for a token; ``layers`` counts the bytes of so many.
        expert: bytes of one expert, by layer index; empty in a model without experts.
    """

    shared: Annotated[int, Field(ge=1, lt=1 << 63)]
    layers: tuple[Bytes, ...]
    kv_per_token: Bytes
    layer_flops: Annotated[int, Field(ge=1, lt=1 << 63)]
    router: Bytes = 0
    router_flops: Bytes = 0
    parts: tuple[PartCost, ...] = ()
    experts: Whole = 0
    experts_per_token: Whole = 0
    expert: tuple[Bytes, ...] = ()


class Tokens(Part):
    """Special tokens.

    Attributes:
        bos: id that begins a text; None if the model has none.
        pad: id used for padding; None if the model has none, then any id will do.
        eos: ids that end any text; empty if the model has none.
        turn_end: further ids that end an answer in a chat; from the tokenizer or chat template, not the config.
    """

    bos: Whole | None = None
    eos: tuple[Whole, ...] = ()
    turn_end: tuple[Whole, ...] = ()
    pad: Whole | None = None


class Source(Part):
    """The checkpoint that the bundle was made from.

    Attributes:
        model: path or name that the user gave.
        config_sha256: sha256 of ``config`` as JSON with sorted keys.
        config: content of its config.json, as rewritten by the importer if there was one.
        importer: name of the importer for checkpoints of other routing code; None for a checkpoint that needs none.
        adapter: path of the LoRA adapter that is merged into the weights, as the user gave it; None without one.
    """

    model: str
    config_sha256: str
    config: dict[str, Any]
    importer: str | None = None
    adapter: str | None = None
