"""The K/V caches of a Radial Network: one for every step, or one for every layer of the pool, as the contract says."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph, Manifest, SingleGraph
from dynexport.runtime.execution.cache import Buffers, Cache, Entries, check_sizes, copy_entries, zeroed

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
        room: tokens that rows have room for at first; None for all.
    """

    def __init__(
        self,
        manifest: Manifest,
        contract: Radial,
        rows: int,
        slots: int,
        *,
        record: bool = False,
        room: int | None = None,
    ) -> None:
        check_sizes(manifest, rows, slots)
        places = contract.places(manifest.model.layers)
        (graph,) = (graph for graph in manifest.graphs if graph.role == "attention")
        self._specs = graph.caches
        self._room = slots if room is None else min(slots, room)
        self.buffers = zeroed(self._specs, {"B": rows, "M": self._room}, slots, places)
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
                copy_entries(buffer, grown[part])
            self.buffers[place] = grown
        return self.buffers[place]

    def reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens in every place, for graphs that take all of them at once.

        Raises:
            DynexportError: where there is not so much memory.
        """
        if min(tokens, self.slots) <= self._room:
            return
        self._room = min(self.slots, max(tokens, 2 * self._room))
        for place in range(len(self.buffers)):
            self.room(place, self._room)
        self.__dict__.pop("together", None)

    def written_lengths(self) -> np.ndarray:
        """``lengths`` at which a step may write: a row that has ended writes over its last slot, never read again."""
        return np.asarray(np.minimum(self.lengths, self._room - 1))


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
        room: as for ``Cache``.

    Raises:
        DynexportError: when the graph has not the caches of its contract, or there is no memory for them.
    """

    def __init__(
        self,
        manifest: Manifest,
        contract: Radial,
        rows: int,
        slots: int,
        *,
        record: bool = False,
        room: int | None = None,
    ) -> None:
        self._contract = contract
        check_places(manifest.graphs[0], contract.places(manifest.model.layers))
        super().__init__(manifest, rows, slots, record=record, room=room)
        self.begin(manifest, rows, slots, caches=contract.places(manifest.model.layers), routers=1, record=record)

    def _zeroed(self, rows: int, slots: int, room: int) -> Buffers:
        single = self._manifest.single_graph
        assert isinstance(single, SingleGraph)
        entries = room * self._contract.entries_per_token + single.chunk
        return zeroed(self._manifest.graphs[0].caches, {"B": rows, "M": entries}, slots)[0]

    def written_lengths(self) -> np.ndarray:
        """``lengths`` as they are: behind all entries there is room that nobody counts."""
        return self.lengths


__all__ = ["PathCache", "SinglePathCache"]
