"""What the manifest of a bundle says of the model: its sizes, what it costs to run, its special tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part, Size

Bytes = Annotated[int, Field(ge=0)]


class Model(Part):
    """The sizes that a runtime needs.

    Attributes:
        family: ``model_type`` of the checkpoint.
        layers: layers of the model; of a pool, where tokens take paths.
        hidden_size: channels of a hidden state.
        heads: query heads of attention.
        kv_heads: key and value heads.
        head_dim: channels of a head.
        vocab_size: ids are 0..vocab_size-1.
        max_length: tokens that a row may have, prompt and generated ones together.
        parameters: elements of all weights.
    """

    family: str
    layers: Size
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_length: Size
    parameters: Size


class Cost(Part):
    """Bytes that a decode step must read (weights as stored in the bundle, caches), and FLOPs; no runtime needs it.

    Attributes:
        shared: head and final norm, whatever is skipped.
        layers: weights of each layer, its router included, by the layer's index.
        kv_per_token: key and value of one cached token in one layer.
        layer_flops: of one layer's products for one token, two per weight.
        router: weights that one choice of a path's next layer reads; 0 where tokens take no paths.
        router_flops: of one such choice.
    """

    shared: Annotated[int, Field(ge=1)]
    layers: tuple[Bytes, ...]
    kv_per_token: Bytes
    layer_flops: Annotated[int, Field(ge=1)]
    router: Bytes = 0
    router_flops: Bytes = 0


class Tokens(Part):
    """Special tokens.

    Attributes:
        bos: begins a text; None where the model has none.
        pad: None where the model has none; any id may stand for padding.
        eos: each ends any text; empty when the model has none.
        turn_end: each ends an answer in a chat beside ``eos``: by the tokenizer or the chat template, not the config.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    turn_end: tuple[int, ...] = ()
    pad: int | None = None
