"""A decoder family as data: everything that a graph, a reference or a cost model needs to know of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

Array = np.ndarray
NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Residual = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class LongContext:
    """What rotary positions become in a context of more tokens than the model was first trained for (longrope).

    Attributes:
        beyond: tokens of the largest context that does without.
        max_length: tokens of the largest context of all.
        inverse_frequencies: [dim / 2], for contexts between them.
    """

    beyond: int
    max_length: int
    inverse_frequencies: tuple[float, ...]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (arXiv 2104.09864) of the first ``dim`` channels of every head.

    Attributes:
        dim: rotated channels per head, even.
        inverse_frequencies: [dim / 2], scaling already applied.
        attention_factor: multiplies cos and sin (yarn, longrope).
        rope_type: transformers' name of the scaling, for messages.
        long: the frequencies of longer contexts, in a model that has others for them.
    """

    dim: int
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    rope_type: str = "default"
    long: LongContext | None = None

    def context(self, max_length: int) -> int:
        """Of a model of ``max_length`` tokens, the largest context that has these frequencies."""
        return max_length if self.long is None else self.long.beyond


@dataclass(frozen=True)
class LearnedPositions:
    """A learned table of ``rows`` added to the token embedding; the first ``offset`` are never used (opt: 2)."""

    rows: int
    offset: int = 0


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409)."""

    heads: int

    def slopes(self) -> Array:
        """float32 [heads], as in the paper's reference code for any number of heads."""
        power = 2 ** math.floor(math.log2(self.heads))
        base = 2.0 ** (-(2.0 ** -(math.log2(power) - 3)))
        slopes = [base**i for i in range(1, power + 1)]
        extra = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
        slopes += [extra**i for i in range(1, 2 * (self.heads - power), 2)]
        return np.asarray(slopes, dtype=np.float32)


Positions = Rotary | LearnedPositions | Alibi


@dataclass(frozen=True)
class Source:
    """Where a tensor of the graph comes from in the checkpoint.

    Attributes:
        names: checkpoint tensors, read one after the other.
        combine: makes the graph's tensor from them; by default they are stacked along their first axis.
    """

    names: tuple[str, ...]
    combine: Callable[[list[Array]], Array] | None = None

    def build(self, read: Callable[[str], Array]) -> Array:
        """Read and combine; float32."""
        parts = [read(name) for name in self.names]
        if self.combine is not None:
            return self.combine(parts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class Architecture:
    """One decoder-only model. Sizes are in elements, lengths in tokens.

    Attributes:
        attention_scale: multiplies q.k before softmax; None is head_dim ** -0.5.
        windows: per layer, how many latest positions a token sees (its own included), or None for all.
        rotary_layers: per layer, whether rotary positions are applied (smollm3 leaves some out).
        post_norms: gemma2's norms after attention and after the MLP, before the residual add.
        sources: tensor of the graph -> where it comes from, for those whose Hugging Face name differs.
    """

    family: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    positions: Positions
    norm: NormKind = "rms"
    norm_epsilon: float = 1e-5
    activation: Activation = "silu"
    gated_mlp: bool = True
    residual: Residual = "sequential"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float | None = None
    embedding_norm: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    rotary_layers: tuple[bool, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        defaults: dict[str, object] = {}
        if not self.windows:
            defaults["windows"] = (None,) * self.layers
        if not self.rotary_layers:
            defaults["rotary_layers"] = (isinstance(self.positions, Rotary),) * self.layers
        for name, value in defaults.items():
            object.__setattr__(self, name, value)

    @property
    def scale(self) -> float:
        """What multiplies q.k before softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def longest(self) -> int:
        """Tokens of the largest context that the model can be given; ``max_length`` unless longer ones have other
        rotary frequencies."""
        long = self.positions.long if isinstance(self.positions, Rotary) else None
        return self.max_length if long is None else long.max_length

    def with_context(self, max_length: int) -> Architecture:
        """The model for a context of this many tokens, at most ``longest``."""
        positions = self.positions
        if isinstance(positions, Rotary) and positions.long is not None and max_length > positions.long.beyond:
            positions = replace(positions, inverse_frequencies=positions.long.inverse_frequencies)
        return replace(self, max_length=max_length, positions=positions)

    def needs_key_positions(self, layer: int) -> bool:
        """Whether a layer's attention looks at the original positions of cached keys (windows, ALiBi)."""
        return isinstance(self.positions, Alibi) or self.windows[layer] is not None

    @property
    def layer_flops_per_token(self) -> int:
        """Of one layer's products for one token: two for every weight of its matrices."""
        query, both = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        attention = self.hidden_size * (query + both) + query * self.hidden_size
        return 2 * (attention + (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size)
