"""The K/V caches of a Radial Network: one for every step, or one for every layer of the pool, as the contract says."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from dynexport.runtime.cache import Cache, Entries, check_sizes, zeroed
from dynexport.runtime.contract import Radial
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph, Manifest, SingleGraph

Array = np.ndarray


class PathCache(Entries):
    """Caches for ``rows`` sequences of up to ``slots`` tokens.

    A place is a step or a layer. A layer that tokens come back to has more entries than tokens: its buffers grow.

    Attributes:
        buffers: per place: "key" and "value" [rows, kv_heads, slots, head_dim]; "position" int64 [rows, slots]
            where original positions are needed; "step" int64 [rows, slots] where a place is a layer. Their types, and
            where the graph has a number for slots, these too, are those of its inputs.

    Args:
        record: keep logs.
    """

    def __init__(self, manifest: Manifest, contract: Radial, rows: int, slots: int, *, record: bool = False) -> None:
        check_sizes(manifest, rows, slots)
        places = contract.places(manifest.model.layers)
        (graph,) = (graph for graph in manifest.graphs if graph.role == "attention")
        self._specs = graph.caches
        self.buffers = zeroed(self._specs, {"B": rows, "M": slots}, slots, places)
        self.begin(manifest, rows, slots, caches=places, routers=0, record=record)  # no token finds a place full

    @cached_property
    def together(self) -> dict[str, Array]:
        """All buffers, as "{place}.key" and so on; of caches of a fixed size, which none are put in place of."""
        return {f"{i}.{part}": buffer for i, place in enumerate(self.buffers) for part, buffer in place.items()}

    def room(self, place: int, needed: int) -> dict[str, Array]:
        """The buffers of a place with at least so many slots; larger ones where there were fewer."""
        slots = self.buffers[place]["key"].shape[2]
        if needed > slots:
            more = max(needed, 2 * slots)
            (grown,) = zeroed(self._specs, {"B": self.rows, "M": more}, more)
            if grown["key"].shape[2] < needed:
                raise DynexportError(
                    f"cache: all {slots} entries of a row are used, as many as the graph has room for, {needed} are "
                    "needed; the context is exhausted"
                )
            for part, buffer in self.buffers[place].items():
                entries = grown[part][:, :, :slots] if buffer.ndim == 4 else grown[part][:, :slots]
                entries[:] = buffer
            self.buffers[place] = grown
        return self.buffers[place]


def check_places(graph: Graph, places: int) -> None:
    """Raise DynexportError for a graph of all steps that has not a cache for every place."""
    found = len({name.partition(".")[0] for name in graph.caches})
    if found != places:
        raise DynexportError(f"{graph.file}: expected {places} caches, found {found}; convert again")


class SinglePathCache(Cache):
    """Caches of a single graph for ``rows`` sequences of up to ``slots`` tokens.

    A place, a step or a layer, has room for as many entries as its tokens can have there, and for those of a run that
    nobody counts. Memory that is never written is never taken, where the system gives it page by page.

    Attributes:
        buffers: "{place}.key" and "{place}.value" float32 [rows, kv_heads, room, head_dim]; "{place}.position" and
            "{place}.step" int64 [rows, room] as for ``PathCache``.
        overflow: int64 [1, rows], how often layers turned a row's tokens away.

    Args:
        record: keep logs.

    Raises:
        DynexportError: when the graph has not the caches of its contract, or there is no memory for them.
    """

    def __init__(self, manifest: Manifest, contract: Radial, rows: int, slots: int, *, record: bool = False) -> None:
        check_sizes(manifest, rows, slots)
        single, specs = manifest.single_graph, manifest.graphs[0].caches
        assert isinstance(single, SingleGraph)
        places = contract.places(manifest.model.layers)
        check_places(manifest.graphs[0], places)
        room = slots * contract.entries_per_token + single.chunk
        (self.buffers,) = zeroed(specs, {"B": rows, "M": room}, slots)
        self.begin(manifest, rows, slots, caches=places, routers=1, record=record)

    def written_lengths(self) -> np.ndarray:
        """``lengths`` as they are: behind all entries there is room that nobody counts."""
        return self.lengths


__all__ = ["PathCache", "SinglePathCache"]
