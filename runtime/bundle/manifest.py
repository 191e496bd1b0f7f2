"""The manifest of a bundle: what every runtime, in any language, has to know to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from dynexport.runtime.bundle.contract import Contract, Mod, Radial, UnifiedSkip, parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import hash_plain

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.data"
GOLDEN = "golden.safetensors"
ENGINES = "engines"
# A complete bundle in the directory whose place it is about to take.
NEXT = ".dynexport-next"
# Heads of caches have as many channels as the model's, or the next multiple of this where the engine wants one.
HEAD_DIM_MULTIPLE = 8

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
TargetName = Literal["onnxruntime", "tensorrt"]
ProfileName = Literal["prefill", "decode"]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Bytes = Annotated[int, Field(ge=0)]
Role = Literal[
    "step", "paths", "decode", "embedding", "router", "before_attention", "attention", "after_attention", "head"
]
_ARRAY_TYPES: dict[str, type[np.generic]] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
ArrayType = Annotated[str, Field(pattern=f"^({'|'.join(_ARRAY_TYPES)})$")]
Layers = Annotated[tuple[int, ...], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Speedup(_Part):
    """One declared ratio.

    Attributes:
        name: as on the command line and in reports: "2", "1.5", or "keep".
        ratio: the target, or None for a kept set given by hand.
        keep: layers that a generated token runs in, ascending.
    """

    name: str
    ratio: float | None
    keep: Layers


class TensorSpec(_Part):
    """An input or output.

    Dimensions are numbers or symbols: B batch, S new tokens, K logits rows, M cache slots, M_routed those of layers
    that choose their tokens.
    """

    name: str
    dtype: ArrayType
    shape: tuple[int | str, ...]

    @property
    def array_type(self) -> type[np.generic]:
        """What its arrays hold; bfloat16, which numpy lacks, as the same 16 bits."""
        return _ARRAY_TYPES[self.dtype]

    def sized(self, sizes: Mapping[str, int]) -> list[int]:
        """Its shape with symbols replaced. Raises DynexportError for a symbol that has no size."""
        unknown = [dim for dim in self.shape if isinstance(dim, str) and dim not in sizes]
        if unknown:
            raise DynexportError(f"{self.name:.80}: expected a dimension of {', '.join(sizes)}, found {unknown[0]:.40}")
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]


class Profile(_Part):
    """An optimization profile: the sizes that an engine is built for.

    Attributes:
        ranges: symbol of a dimension -> least, usual and greatest size.
    """

    name: ProfileName
    ranges: dict[str, tuple[Size, Size, Size]]


# What the inputs and outputs that hold a cache begin with; the rest of the name says which cache it is.
PAST, PRESENT = "past_key_values.", "present."


class Graph(_Part):
    """One ONNX file.

    Attributes:
        layers: the layers that it holds, ascending: the rows of ``cache_lengths`` and ``layer_active``.
        conditional: whether ``layer_active`` says which layers run.
        role: "step": it takes tokens and gives logits; "paths": so it does, each token on a path of its own; "decode":
            the same for one token of every row, beside a set that takes prompts. Others are parts of a set that a
            runtime calls in turn.
        step: which step's router it is, where every step has its own.
        profiles: of a TensorRT bundle, what engines are built for; none where ONNX Runtime takes any size.
    """

    name: str
    file: str
    layers: tuple[int, ...]
    conditional: bool
    role: Role = "step"
    step: int | None = None
    profiles: tuple[Profile, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def caches(self) -> dict[str, TensorSpec]:
        """The inputs that hold a cache, by what follows ``PAST``."""
        return {spec.name.removeprefix(PAST): spec for spec in self.inputs if spec.name.startswith(PAST)}

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """The outputs that hold no cache."""
        return tuple(spec for spec in self.outputs if not spec.name.startswith(PRESENT))

    def limit(self, dimension: str) -> int | None:
        """The greatest size of a dimension, by its symbol, that an engine is built for; None where any will do."""
        ranges = [profile.ranges.get(dimension) for profile in self.profiles]
        return max((sizes[2] for sizes in ranges if sizes), default=None)


class RoutedCaches(_Part):
    """The caches of layers that choose their tokens.

    Attributes:
        layers: those layers, ascending: the rows of ``routes`` and ``forced_routes``.
        slots: entries that a row may have there; fewer where a row never has as many tokens.
        slack: further slots, which a step may fill with what is never read.
        chunk: most tokens that a step may have while the caches hold entries; None for any number.
    """

    layers: Layers
    slots: Size
    slack: Size
    chunk: Size | None


class SingleGraph(_Part):
    """A graph of all steps of paths, in which layers run so many tokens, whatever was chosen.

    Attributes:
        layer_capacity: a layer has room for ``max(1, ceil(layer_capacity * B * S))`` tokens in every step.
        chunk: most new tokens of a row in a run; caches have so many slots more, which it may fill with what is never
            read.
    """

    layer_capacity: Annotated[float, Strict(), Field(gt=0, le=1)]
    chunk: Size


class Model(_Part):
    """The sizes that a runtime needs."""

    family: str
    layers: Size
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_length: Size
    parameters: Size


class Cost(_Part):
    """Bytes that a decode step must read (weights as stored in the bundle, caches), and FLOPs.

    Attributes:
        shared: head and final norm, whatever is skipped.
        layers: weights of each layer, its router included.
        kv_per_token: key and value of one cached token in one layer.
        layer_flops: of one layer's products for one token, two per weight.
    """

    shared: Annotated[int, Field(ge=1)]
    layers: tuple[Bytes, ...]
    kv_per_token: Bytes
    layer_flops: Annotated[int, Field(ge=1)]


class Tokens(_Part):
    """Special tokens.

    Attributes:
        bos, pad: None where the model has none.
        eos: end any text; empty when the model has none.
        turn_end: end an answer in a chat beside ``eos``: by the tokenizer or the chat template, not the config.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    turn_end: tuple[int, ...] = ()
    pad: int | None = None


class Source(_Part):
    """The checkpoint that the bundle was made from.

    Attributes:
        model: what the user named.
        config_sha256: the hash of ``config``.
        config: its config.json, or what an importer made of that.
        importer: how it was read, when other routing code has written it.
    """

    model: str
    config_sha256: str
    config: dict[str, Any]
    importer: str | None = None


class File(_Part):
    """Size and hash of a file of the bundle."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Bytes

    @classmethod
    def of(cls, path: Path, expected: str = "a file", *, advice: str = "") -> File:
        """Hash a regular file, no link; errors as for ``open_plain``."""
        sha256, size = hash_plain(path, expected, follow=False, advice=advice)
        return cls(sha256=sha256, bytes=size)


class Manifest(_Part):
    """``manifest.json``.

    Attributes:
        target: what the graphs are written for; TensorRT's run on ONNX Runtime too.
        key_positions: layers whose cache also holds the original position of every entry.
        routed: of layers that choose their tokens; None where no layer does.
        single_graph: of paths in one graph; None for all others.
        tools: versions of the packages that made the bundle.
        files: every other file of the bundle; names have no directories.
    """

    schema_version: int
    contract: Contract
    target: TargetName = "onnxruntime"
    precision: Precision
    model: Model
    speedups: tuple[Speedup, ...]
    graphs: Annotated[tuple[Graph, ...], Field(min_length=1)]
    cost: Cost
    tokens: Tokens
    key_positions: tuple[int, ...] = ()
    routed: RoutedCaches | None = None
    single_graph: SingleGraph | None = None
    source: Source
    tools: dict[str, str]
    files: dict[str, File]

    def limit(self, dimension: str) -> int | None:
        """The greatest size of a dimension, by its symbol, that engines are built for; None where any will do."""
        limits = [graph.limit(dimension) for graph in self.graphs]
        return max((limit for limit in limits if limit is not None), default=None)

    @property
    def has_routers(self) -> bool:
        """Whether tokens run where routers send them, whatever the ratio."""
        return isinstance(self.contract, Mod | Radial)

    @property
    def trained_for_its_strategy(self) -> bool:
        """Whether the checkpoint itself declares this strategy: only then was it trained to be run so."""
        declared = self.source.config.get("dynexport") or {}
        return bool(declared.get("strategy", "dense") == self.contract.strategy)

    def trained_for(self, speedup: Speedup) -> bool:
        """Whether the checkpoint itself declares these layers: only then was it trained to run in them alone."""
        if len(speedup.keep) == self.model.layers:
            return True
        declared = self.source.config.get("dynexport")
        if not (isinstance(declared, dict) and isinstance(self.contract, UnifiedSkip)):
            return False
        try:
            trained = parse_contract(declared, "config.json: dynexport")
        except DynexportError:
            return False  # of another version, or never a contract
        if not isinstance(trained, UnifiedSkip) or trained.keep != self.contract.keep:
            return False
        return trained.keep is not None or (trained.rule == self.contract.rule and speedup.ratio in trained.speedups)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        layers = self.model.layers
        if len(self.cost.layers) != layers:
            raise ValueError(f"cost.layers: expected {layers} as in model.layers, found {len(self.cost.layers)}")
        listed = {
            "key_positions": self.key_positions,
            "routed.layers": self.routed.layers if self.routed else (),
            **{f"layers of graph {graph.name}": graph.layers for graph in self.graphs},
            **{f"keep of speedup {speedup.name}": speedup.keep for speedup in self.speedups},
        }
        for name, indices in listed.items():
            if indices != tuple(sorted(set(indices))) or not set(indices) <= set(range(layers)):
                raise ValueError(f"{name}: expected ascending layers 0..{layers - 1}, found others")
        chosen = self.contract.routed_layers if isinstance(self.contract, Mod) else ()
        if chosen != (self.routed.layers if self.routed else ()):
            raise ValueError(f"routed.layers: expected {list(chosen)} as in the contract, found others")
        roles = [graph.role for graph in self.graphs]
        if self.single_graph is not None and not (isinstance(self.contract, Radial) and roles == ["paths"]):
            raise ValueError("single_graph: expected a radial contract and one graph with the role paths, found others")
        if self.single_graph is None and "paths" in roles:
            raise ValueError("single_graph: expected beside a graph with the role paths, found none")
        of_steps = isinstance(self.contract, Radial) and self.contract.cache_policy == "step"
        if "decode" in roles and not of_steps:
            raise ValueError("graphs: expected the role decode for radial with cache_policy step, found it elsewhere")
        if len({speedup.name for speedup in self.speedups}) < len(self.speedups):
            raise ValueError("speedups: expected a name for each, found one twice")
        self._check_caches()
        return self

    def _check_caches(self) -> None:
        heads, size = self.model.kv_heads, self.model.head_dim
        padded = -(-size // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
        for spec in (spec for graph in self.graphs for spec in graph.caches.values()):
            holds_heads = spec.name.endswith(("key", "value"))
            if holds_heads and not (
                len(spec.shape) == 4 and spec.shape[1] == heads and spec.shape[3] in (size, padded)
            ):
                found = f"{list(spec.shape)!s:.80}"
                raise ValueError(f"{spec.name:.80}: expected {heads} heads of {size} as in model, found {found}")
