"""What routers decide token by token, in the manifest of a bundle."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part, Size

Layers = Annotated[tuple[int, ...], Field(min_length=1)]


class LayerRouting(Part):
    """Routers decide, in some layers, which tokens run there.

    Graphs take ``token_counts`` int64 [B] and ``forced_routes`` int64 [R, B, S] (1 runs, 0 skips, -1 leaves it to the
    router), and give ``routes`` bool, ``route_scores`` and ``route_margins`` float32 [R, B, S] and ``overflow`` int64
    [R, B], tokens that found the layer's cache full.

    Attributes:
        kind: "layers".
        layers: those layers, ascending: the rows R.
        overflow: what a full cache means: "residual", the token passes the layer by; "error", generation stops.
    """

    kind: Literal["layers"] = "layers"
    layers: Layers
    overflow: Literal["residual", "error"]


class PathRouting(Part):
    """A router sends every token, hop by hop, to a layer of the pool, or out.

    A whole-step graph takes ``token_counts`` int64 [B] and ``forced_paths`` int64 [hops, B, S] (a layer, the number of
    layers to leave, -1 leaves it to the router), and gives ``paths`` int64, ``path_scores`` and ``path_margins``
    float32 [hops, B, S]; a graph for several tokens of a row also ``overflow`` int64 [1, B], how often they found the
    layer of their choice full. What ``paths`` holds: a layer that ran; the number of layers: left here; -1: had left
    before, or is padding; -2: turned away, as the layer was full.

    Attributes:
        kind: "paths".
        hops: hops after which every token leaves.
        min_hops: leaving is not allowed in the hops before this one; the first is 0.
        exit: whether leaving is a choice, the last score.
        reuse: whether a token may visit a layer again.
        places: what a cache belongs to: "hops", its hop, whichever layer made the entry; "layers", its layer.
        layer_capacity: a layer has room for ``max(1, ceil(layer_capacity * B * S))`` tokens of a call.
    """

    kind: Literal["paths"] = "paths"
    hops: Size
    min_hops: Annotated[int, Field(ge=0)]
    exit: bool
    reuse: bool
    places: Literal["hops", "layers"]
    layer_capacity: Annotated[float, Field(gt=0, le=1)] = 1.0


Routing = Annotated[LayerRouting | PathRouting, Field(discriminator="kind")]
