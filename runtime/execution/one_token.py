"""A decode step of one row by a graph set with graphs of whole layers: two calls per hop, and little in between."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dynexport.runtime.bundle.manifest import PathRouting
from dynexport.runtime.engines.engine import NO_CACHES, Caches, Engine, Prepared
from dynexport.runtime.execution.decisions import nan_in_hop
from dynexport.runtime.execution.kv_cache import KvCache

Array = np.ndarray
# Rows whose calls are kept.
_MOST_ROWS = 8


class Path:
    """The path of one token.

    Attributes:
        hidden_states: [1, hidden], after the last hop.
        layers: int64 [hops, 1], the layer of every hop; the number of layers for an exit, -1 after it.
        scores: float32 [hops, 1], the score of each choice; 0 after the exit.
        margins: float32 [hops, 1], the distance to the next best choice; infinity after the exit.
        entries: int64 [places, 1], entries that the token added.
    """

    def __init__(self, hops: int, places: int) -> None:
        self.hidden_states = np.zeros((1, 0), np.float32)
        self.layers = np.full((hops, 1), -1, np.int64)
        self.scores = np.zeros((hops, 1), np.float32)
        self.margins = np.full((hops, 1), np.inf, np.float32)
        self.entries = np.zeros((places, 1), np.int64)


class OneToken:
    """Takes one token of a row through its path. For one thread at a time.

    Args:
        routing: the bundle's routing.
        layers: number of layers of the pool.
        routers: engines of the routers, one per hop.
        whole: engines of whole layers.
    """

    def __init__(self, routing: PathRouting, layers: int, routers: list[Engine], whole: list[Engine]) -> None:
        self._routing, self._layers, self._routers, self._whole = routing, layers, routers, whole
        self._rows: list[_Row] = []

    def run(
        self, cache: KvCache, row: int, hidden_states: Array, angles: Mapping[str, Array], forced: Array
    ) -> Path | None:
        """Run every hop of the token and write its entries, which the caller commits.

        Args:
            cache: the cache.
            row: the token's row.
            hidden_states: [1, hidden], of the embedding.
            angles: "cos" and "sin" [1, 1, ..] with rotary positions, else empty.
            forced: int64 [hops, 1], -1 where the router decides.

        Returns:
            The path; None where an engine cannot bind calls.

        Raises:
            DynexportError: for a cache that is full, or scores that are not finite.
        """
        routing, lengths, position = self._routing, cache.lengths[:, row].tolist(), int(cache.positions[row])
        bound = self._row(cache, row, hidden_states, angles)
        bound.begin(position, hidden_states, angles)
        told, path, scores = forced[:, 0].tolist(), Path(routing.hops, len(lengths)), []
        for hop in range(routing.hops):
            exits = hop >= routing.min_hops if routing.exit else None
            if not routing.reuse and hop >= self._layers and not exits:
                break  # it has run every layer
            found = bound.decided(self._routers[hop], told[hop], exits)
            if found is None:
                return None
            choice = int(found["choices"][0])
            scores.append(found["scores"][0].copy())
            path.layers[hop], path.margins[hop] = choice, found["margins"][0]
            if choice == self._layers:
                break
            place = choice if routing.places == "layers" else hop
            cache.check_entries(place, lengths[place] + 1)
            if not bound.run(self._whole[choice], choice, place, lengths[place], hop, found.get("probabilities")):
                return None
            if not routing.reuse:
                bound.allowed[0, choice] = False
            lengths[place] += 1
            path.entries[place] += 1
        for hop, given in enumerate(scores):
            if not np.isfinite(given).all():
                raise nan_in_hop(hop, row, position)
            path.scores[hop] = given[path.layers[hop, 0]]
        path.hidden_states = bound.hidden_states[0].copy()
        return path

    def _row(self, cache: KvCache, row: int, hidden_states: Array, angles: Mapping[str, Array]) -> _Row:
        """Return the bound calls of a row; those of the least recently used one are given up."""
        for place, known in enumerate(self._rows):
            if known.row == row and known.buffers is cache.buffers:
                self._rows.append(self._rows.pop(place))
                return known
        choices = self._layers + self._routing.exit
        self._rows = [*self._rows[1 - _MOST_ROWS :], _Row(cache, row, hidden_states, angles, choices)]
        return self._rows[-1]


class _Row:
    """The bound calls of one row: one for each router and layer. They read the same arrays.

    Attributes:
        buffers: the cache's buffers that calls are bound to.
        row: the row's number.
        hidden_states: [1, 1, hidden], as they are now.
        allowed: bool [1, choices], what the next router may choose.
    """

    def __init__(
        self, cache: KvCache, row: int, hidden_states: Array, angles: Mapping[str, Array], choices: int
    ) -> None:
        self.buffers, self.row = cache.buffers, row
        self.hidden_states, self.allowed = hidden_states[None].copy(), np.ones((1, choices), np.bool_)
        self._forced, self._gates = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self._angles = {name: part.copy() for name, part in angles.items()}
        self._position, self._length = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        self._last, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._hop = np.zeros((), np.int64)
        self._routers: dict[int, Prepared] = {}
        self._layers: dict[int, Prepared] = {}

    def begin(self, position: int, hidden_states: Array, angles: Mapping[str, Array]) -> None:
        """Take the next token, whose every choice is allowed."""
        self.hidden_states[0], self._position[...], self.allowed[...] = hidden_states, position, True
        for name, part in angles.items():
            self._angles[name][...] = part

    def decided(self, engine: Engine, forced: int, exits: bool | None) -> dict[str, Array] | None:
        """Run a hop's router and return its results, which its next run overwrites; None if it cannot be bound.

        Args:
            engine: the router's engine.
            forced: the choice; -1 leaves it to the router.
            exits: whether the token may exit; None where there is no exit.
        """
        call = self._routers.get(id(engine))
        if call is None:
            inputs = {"hidden_states": self.hidden_states, "allowed": self.allowed, "forced_choices": self._forced}
            call = engine.prepare(inputs, NO_CACHES, shared=True)
            if call is None:
                return None
            self._routers[id(engine)] = call
        if exits is not None:
            self.allowed[0, -1] = exits
        self._forced[0] = forced
        return call.run()

    def run(self, engine: Engine, layer: int, place: int, length: int, hop: int, gates: Array | None) -> bool:
        """Run a layer on the token and a place's cache of ``length`` entries; false if it cannot be bound."""
        call = self._layers.get(layer)
        if call is None:
            inputs = {
                "hidden_states": self.hidden_states,
                "gates": self._gates,
                "position_ids": self._position,
                "cache_lengths": self._length,
                "last_index": self._last,
                "total_length": self._total,
                "step": self._hop,
                **self._angles,
            }
            call = engine.prepare(inputs, Caches(self.buffers, slice(self.row, self.row + 1), place), shared=True)
            if call is None:
                return False
            self._layers[layer] = call
        call.move(place)
        self._length[0], self._last[0], self._total[...], self._hop[...] = length, length, length + 1, hop
        if gates is not None:
            self._gates[...] = gates
        self.hidden_states[...] = call.run()["hidden_states_out"]
        return True


__all__ = ["OneToken", "Path"]
