"""The architecture of a decoder model as data, for graphs, references and cost models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

Array = np.ndarray
NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Residual = Literal["sequential", "parallel"]
QueryKeyNorm = Literal["head", "all"]


@dataclass(frozen=True)
class LongContext:
    """The rotary frequencies for contexts beyond the original training length (longrope, arXiv 2402.13753).

    Attributes:
        beyond: the largest context, in tokens, that uses the short frequencies.
        max_length: the largest supported context, in tokens.
        inverse_frequencies: [dim / 2], for contexts of more than ``beyond`` tokens.
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
        long: the frequencies for longer contexts (longrope), or None.
    """

    dim: int
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    rope_type: str = "default"
    long: LongContext | None = None

    def context(self, max_length: int) -> int:
        """Return the largest context, in tokens, with these frequencies, in a model of ``max_length`` tokens."""
        return max_length if self.long is None else self.long.beyond


@dataclass(frozen=True)
class LearnedPositions:
    """A learned position table of ``rows`` rows; position p uses row p + ``offset`` (opt: 2)."""

    rows: int
    offset: int = 0


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409)."""

    heads: int

    def slopes(self) -> Array:
        """Return the slopes, float32 [heads], as the paper's reference code does for any number of heads."""
        power = 2 ** math.floor(math.log2(self.heads))
        base = 2.0 ** (-(2.0 ** -(math.log2(power) - 3)))
        slopes = [base**i for i in range(1, power + 1)]
        extra = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
        slopes += [extra**i for i in range(1, 2 * (self.heads - power), 2)]
        return np.asarray(slopes, dtype=np.float32)


Positions = Rotary | LearnedPositions | Alibi
_SIZES = ("heads", "kv_heads", "intermediate_size")


@dataclass(frozen=True)
class Source:
    """The checkpoint tensors that one tensor of the graph is made from.

    Attributes:
        names: names of the checkpoint tensors, in order.
        combine: makes the graph's tensor from them; None concatenates them along their first axis.
        moves_rows: whether ``combine`` only selects or orders the rows of one tensor, whatever a row holds.
        item: the entry along the first axis that is taken of every tensor, such as an expert's; None: all of it.
    """

    names: tuple[str, ...]
    combine: Callable[[list[Array]], Array] | None = None
    moves_rows: bool = False
    item: int | None = None

    def build(self, read: Callable[[str], Array], read_item: Callable[[str, int], Array] | None = None) -> Array:
        """Return the combined tensor, float32.

        Args:
            read: reads a whole tensor.
            read_item: reads one entry along a tensor's first axis; None reads the whole tensor for it.
        """
        if self.item is None:
            parts = [read(name) for name in self.names]
        else:
            parts = [read(n)[self.item] if read_item is None else read_item(n, self.item) for n in self.names]
        if self.combine is not None:
            return self.combine(parts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer.

    Attributes:
        heads: query heads; 0: the layer has no attention.
        kv_heads: key and value heads.
        intermediate_size: channels between the matrices of the MLP; 0: the layer has no MLP.
    """

    heads: int
    kv_heads: int
    intermediate_size: int

    @property
    def is_empty(self) -> bool:
        """Return whether the layer has neither attention nor MLP."""
        return not (self.heads or self.intermediate_size)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: MLPs of which a router chooses some for each token (arXiv 1701.06538).

    An expert is down(swiglu(gate(x), up(x))), with swiglu(g, u) = g sigmoid(alpha g) (u + beta), where g is at most
    ``limit`` and u within it.

    Attributes:
        count: the number of experts.
        chosen: the number of experts that run for a token.
        intermediate_size: channels of an expert between its products.
        normalised: whether the weights of the chosen experts are divided by their sum.
        shared_size: channels of an expert that runs for every token, behind a gate of its own; None without one.
        bias: whether the router and the products of experts have biases.
        alpha: the factor of the gate in the sigmoid.
        beta: added to the output of up.
        limit: the bound of the outputs of gate and up; None without one.
        layers: whether each layer has experts in place of an MLP.
    """

    count: int
    chosen: int
    intermediate_size: int
    normalised: bool
    layers: tuple[bool, ...]
    shared_size: int | None = None
    bias: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def weights_per_token(self, hidden_size: int) -> int:
        """Return the number of weights that a layer multiplies a token by: the router and the experts that run."""
        channels = self.chosen * self.intermediate_size + (self.shared_size or 0)
        return hidden_size * (self.count + 3 * channels)


@dataclass(frozen=True)
class Architecture:
    """The architecture of a decoder-only model; sizes are in elements, lengths in tokens.

    Attributes:
        attention_scale: multiplies q.k before softmax; None is head_dim ** -0.5.
        windows: the sliding window of each layer, in tokens, the token itself included; None: full attention.
        sliding_positions: the rotary positions of layers with a window, where they have their own (gemma3, olmo3).
        rotary_layers: whether each layer applies rotary positions (some layers of smollm3 do not).
        logits_scale: multiplies the logits (granite, cohere).
        residual_scale: multiplies the outputs of attention and MLP before they are added to the residual (granite).
        shared_norm: whether attention and MLP of a parallel layer take the output of one norm.
        pre_norms: whether there are norms before attention and before the MLP (olmo2 has none).
        post_norms: whether there are norms after attention and after the MLP, before the residual add (gemma2).
        norms_of_sums: whether those norms are applied after the residual add instead, to its sum (huginn_raven).
        qk_norm: what the norms of query and key take: each head by itself, or all heads together; None: no norms.
        qkv_clip: the bound that queries, keys and values are clipped to, after their norms; None without one.
        sinks: whether every query head has a score of its own beside those of the keys, which takes part of the
            probability and has no value (gpt_oss).
        experts: the mixture of experts in place of the MLP of some layers; None without one.
        as_declared: whether only graphs of the strategy that the family's own fields declare compute all of a model.
        loops: how often a token runs the layers that a looped family repeats, as its config says.
        loop_body: first and last of those layers; None: all of them.
        exit_threshold: threshold of the family's rule for leaving before the last loop; None without one.
        weights_of: for each layer that a token runs, the layer whose weights it has: itself, but in looped models.
        sizes: each layer's own sizes, where they differ or a layer lacks attention or MLP; ``heads``, ``kv_heads`` and
            ``intermediate_size`` are then the largest of any layer. Empty: these are the sizes of every layer.
        sources: tensor of the graph -> its checkpoint tensors, where the Hugging Face name or layout differs.
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
    residual_scale: float | None = None
    shared_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    logits_scale: float | None = None
    embedding_scale: float | None = None
    embedding_norm: bool = False
    qk_norm: QueryKeyNorm | None = None
    qkv_clip: float | None = None
    sinks: bool = False
    experts: Experts | None = None
    pre_norms: bool = True
    post_norms: bool = False
    norms_of_sums: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied_embeddings: bool = False
    sliding_positions: Rotary | None = None
    windows: tuple[int | None, ...] = ()
    rotary_layers: tuple[bool, ...] = ()
    as_declared: bool = False
    loops: int = 1
    loop_body: tuple[int, int] | None = None
    exit_threshold: float | None = None
    weights_of: tuple[int, ...] = ()
    sizes: tuple[LayerSizes, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        defaults: dict[str, object] = {}
        if not self.windows:
            defaults["windows"] = (None,) * self.layers
        if not self.rotary_layers:
            defaults["rotary_layers"] = (isinstance(self.positions, Rotary),) * self.layers
        if not self.weights_of:
            defaults["weights_of"] = tuple(range(self.layers))
        for name, value in defaults.items():
            object.__setattr__(self, name, value)

    @property
    def scale(self) -> float:
        """The factor of q.k before softmax: ``attention_scale``, or head_dim ** -0.5."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def longest(self) -> int:
        """The largest supported context, in tokens: more than ``max_length`` only with longrope."""
        long = self.positions.long if isinstance(self.positions, Rotary) else None
        return self.max_length if long is None else long.max_length

    def with_context(self, max_length: int) -> Architecture:
        """Return the architecture for a context of ``max_length`` tokens, at most ``longest``."""
        positions = self.positions
        if isinstance(positions, Rotary) and positions.long is not None and max_length > positions.long.beyond:
            positions = replace(positions, inverse_frequencies=positions.long.inverse_frequencies)
        return replace(self, max_length=max_length, positions=positions)

    def rotary_of(self, layer: int) -> Rotary | None:
        """Return the rotary positions of a layer; None without any."""
        if not isinstance(self.positions, Rotary) or not self.rotary_layers[layer]:
            return None
        return self.sliding_positions if self.sliding_positions and self.windows[layer] is not None else self.positions

    def repeated(self, layers: Sequence[int]) -> Architecture:
        """Return the architecture whose tokens run these of its layers, one after the other, some several times."""
        experts = self.experts
        if experts is not None:
            experts = replace(experts, layers=tuple(experts.layers[layer] for layer in layers))
        return replace(
            self,
            layers=len(layers),
            experts=experts,
            windows=tuple(self.windows[layer] for layer in layers),
            rotary_layers=tuple(self.rotary_layers[layer] for layer in layers),
            weights_of=tuple(layers),
            sizes=tuple(self.sizes[layer] for layer in layers) if self.sizes else (),
        )

    def sizes_of(self, layer: int) -> LayerSizes:
        """Return the sizes of a layer."""
        return self.sizes[layer] if self.sizes else LayerSizes(self.heads, self.kv_heads, self.intermediate_size)

    def with_sizes(self, sizes: Sequence[LayerSizes]) -> Architecture:
        """Return the architecture whose layers have these sizes; at least one has attention and one an MLP."""
        largest = {name: max(getattr(own, name) for own in sizes) for name in _SIZES}
        alike = all(own == LayerSizes(**largest) for own in sizes)
        return replace(self, **largest, sizes=() if alike else tuple(sizes))

    def of(self, layer: int) -> Architecture:
        """Return the architecture with the sizes of a layer as those of the model."""
        if not self.sizes:
            return self
        own = self.sizes[layer]
        return replace(self, **{name: getattr(own, name) for name in _SIZES})

    def needs_key_positions(self, layer: int) -> bool:
        """Return whether a layer's attention needs the original positions of cached keys (windows, ALiBi)."""
        return isinstance(self.positions, Alibi) or self.windows[layer] is not None

    @property
    def projected_size(self) -> int:
        """Channels of a token's packed query, key and value."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def experts_of(self, layer: int) -> Experts | None:
        """Return the mixture of experts of a layer; None for a layer with an MLP."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None

    @property
    def layer_flops_per_token(self) -> int:
        """Floating-point operations of one layer for one token, two for every weight; a mean where layers differ."""
        attention = self.hidden_size * (self.projected_size + self.heads * self.head_dim)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        if self.experts is not None:
            mixed = sum(self.experts.layers)
            mlp = (
                (self.layers - mixed) * mlp + mixed * self.experts.weights_per_token(self.hidden_size)
            ) // self.layers
        return 2 * (attention + mlp)
