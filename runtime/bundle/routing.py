"""The manifest's section on routing: the decisions that routers make for each token."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part, Size, Whole

LayerPart = Literal["layer", "attention", "mlp"]
Layers = Annotated[tuple[Whole, ...], Field(min_length=1)]


class LayerRouting(Part):
    """Routing by layer: in some layers, or runs of consecutive layers, a router decides which tokens run.

    Graphs take ``token_counts`` int64 [B] and ``forced_routes`` int64 [R, B, S] (1 run, 0 skip, -1 the router decides).
    They return ``routes`` bool, ``route_scores`` and ``route_margins`` float32, all [R, B, S], and ``overflow`` int64
    [R, B], the number of tokens that skipped the layer because its cache was full.

    Attributes:
        kind: always "layers".
        layers: the routed layers, ascending; with a span, the first layer of each run.
        parts: what the decisions about each layer are about: "layer", all of it; "attention"; "mlp". With two parts a
            layer has two of the R decisions, one after the other.
        span: number of consecutive layers that each decision is about.
        skipped_kv: what a token that skips a layer leaves in its cache: "none", no entry; "kept", an entry without
            running it; "computed", an entry that is computed, so that the layer runs for all tokens and skipping saves
            nothing.
        overflow: what a token does when the layer's cache is full: "residual", it skips the layer; "error", generation
            stops.
    """

    kind: Literal["layers"] = "layers"
    layers: Layers
    parts: Annotated[tuple[LayerPart, ...], Field(min_length=1, max_length=2)] = ("layer",)
    span: Size = 1
    skipped_kv: Literal["none", "kept", "computed"] = "none"
    overflow: Literal["residual", "error"]

    @property
    def decisions(self) -> int:
        """R, the number of decisions about a token."""
        return len(self.layers) * len(self.parts)

    def layer_of(self, decision: int) -> int:
        """Return the layer, or the first layer of the run, that a decision is about."""
        return self.layers[decision // len(self.parts)]

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each decision: its layer, and its part where a layer has two."""
        if len(self.parts) == 1:
            return tuple(map(str, self.layers))
        return tuple(f"{layer}.{part}" for layer in self.layers for part in self.parts)

    @property
    def covered(self) -> tuple[int, ...]:
        """All layers that decisions are about, those of the first decision first."""
        return tuple(layer + more for layer in self.layers for more in range(self.span))


class PathRouting(Part):
    """Routing by path: at every hop, a router sends each token to a layer of the pool, or to exit.

    A graph for a whole step takes ``token_counts`` int64 [B] and ``forced_paths`` int64 [hops, B, S] (a layer index;
    the number of layers for exit; -1 the router decides). It returns ``paths`` int64, ``path_scores`` and
    ``path_margins`` float32, all [hops, B, S]. A graph for several tokens per row also returns ``overflow`` int64
    [1, B], the number of hops at which a token's chosen layer was full. ``paths`` holds the index of the layer that
    ran; the number of layers if the token exited at this hop; -1 after its exit and for padding; -2 if the chosen layer
    was full.

    Attributes:
        kind: always "paths".
        hops: most hops of a token.
        min_hops: number of hops before exit is allowed.
        exit: whether a token may exit early; exit is the router's last score.
        reuse: whether a token may visit a layer more than once.
        places: the caches that entries are stored in: "hops", one per hop, shared by all layers; "layers", one per
            layer.
        layer_capacity: share of a call's tokens that one layer takes at a hop: at most
            ``max(1, ceil(layer_capacity * B * S))``.
    """

    kind: Literal["paths"] = "paths"
    hops: Size
    min_hops: Annotated[int, Field(ge=0, lt=1 << 31)]
    exit: bool
    reuse: bool
    places: Literal["hops", "layers"]
    layer_capacity: Annotated[float, Field(gt=0, le=1)] = 1.0


Routing = Annotated[LayerRouting | PathRouting, Field(discriminator="kind")]
