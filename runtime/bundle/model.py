"""The manifest's sections on the model: its sizes, its cost, its special tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part, Size, Whole

Heads = Annotated[int, Field(ge=0, lt=1 << 31)]
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
        heads_of_layers: query heads of each layer, 0 without attention, where layers differ; ``heads`` is then the
            largest. Empty: every layer has ``heads``.
        kv_heads_of_layers: the same of ``kv_heads``.
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
    heads_of_layers: tuple[Heads, ...] = ()
    kv_heads_of_layers: tuple[Heads, ...] = ()

    def heads_in(self, place: int) -> int:
        """Return the number of query heads in a place, 0 where there is no attention."""
        return self.heads_of_layers[place] if self.heads_of_layers else self.heads

    def kv_heads_in(self, place: int) -> int:
        """Return the number of key and value heads in a place, 0 where there is no attention."""
        return self.kv_heads_of_layers[place] if self.kv_heads_of_layers else self.kv_heads


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
        kv_of_layers: ``kv_per_token`` of each layer, where layers differ; ``kv_per_token`` is then the largest. Empty:
            it is the same in every layer.
        flops_of_layers: the same of ``layer_flops``.
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
    kv_of_layers: tuple[Bytes, ...] = ()
    flops_of_layers: tuple[Bytes, ...] = ()

    def kv_in(self, place: int) -> int:
        """Return the bytes of key and value of one cached token in a place."""
        return self.kv_of_layers[place] if self.kv_of_layers else self.kv_per_token

    def flops_in(self, place: int) -> int:
        """Return the FLOPs of a place's matrix products for one token."""
        return self.flops_of_layers[place] if self.flops_of_layers else self.layer_flops


def check_layers(model: Model, cost: Cost, *, paths: bool) -> None:
    """Raise ValueError for a list without one entry per layer, or layers that differ where tokens take ``paths``."""
    layers = model.layers
    if cost.expert and not (len(cost.expert) == layers and 0 < cost.experts_per_token <= cost.experts):
        raise ValueError(f"cost.expert: expected {layers} layers, and experts_per_token in 1..experts")
    lists: dict[str, tuple[int, ...]] = {
        "model.heads_of_layers": model.heads_of_layers,
        "model.kv_heads_of_layers": model.kv_heads_of_layers,
        "cost.kv_of_layers": cost.kv_of_layers,
        "cost.flops_of_layers": cost.flops_of_layers,
    }
    for name, values in {"cost.layers": cost.layers, **{name: found for name, found in lists.items() if found}}.items():
        if len(values) != layers:
            raise ValueError(f"{name}: expected {layers} as in model.layers, found {len(values)}")
        if paths and name in lists:
            raise ValueError(f"{name}: expected layers of one size where routing has paths, found others")


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
