"""Run a set of graphs hop by hop: tokens are grouped by their chosen layer, and each group runs in one call.

In attention, a token attends to the other tokens of its row, whichever layers they chose.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from dynexport.runtime.bundle.manifest import Graph, GraphSet, Manifest, PathRouting
from dynexport.runtime.engines.engine import Caches, Engine
from dynexport.runtime.execution.batch import Call, CallResult
from dynexport.runtime.execution.decisions import DecisionReader, Decisions, nan_in_hop
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.execution.one_token import OneToken

Array = np.ndarray


@dataclass
class _Walk:
    """The state of one call: its N tokens, concatenated row by row in the order of their positions.

    Attributes:
        rows: int64 [N], each token's row in the cache.
        positions: int64 [N].
        hidden_states: [N, hidden].
        angles: "cos" and "sin" [1, N, rotary dim / 2] with rotary positions, else empty.
        forced: int64 [hops, N], -1 where the router decides.
        lengths: int64 [places, rows of the cache], number of entries, including those of this call.
        one_each: true where every row of the call has exactly one token.
        alive: bool [N], true until the token exits.
        visited: bool [N, layers], true for layers that the token ran.
        path: int64 [hops, N], the layer of every hop; the number of layers for an exit, -1 after it.
        scores: float32 [hops, N], the score of each choice; 0 after the exit.
        margins: float32 [hops, N], the distance to the next best choice; infinity after the exit.
    """

    rows: Array
    positions: Array
    hidden_states: Array
    angles: dict[str, Array]
    forced: Array
    lengths: Array
    one_each: bool
    alive: Array = field(init=False)
    visited: Array = field(init=False)
    path: Array = field(init=False)
    scores: Array = field(init=False)
    margins: Array = field(init=False)

    def begin(self, layers: int) -> None:
        """Set the fields that hops update to their initial values."""
        shape = self.forced.shape
        self.alive = np.ones(shape[1], bool)
        self.visited = np.zeros((shape[1], layers), bool)
        self.path = np.full(shape, -1, np.int64)
        self.scores = np.zeros(shape, np.float32)
        self.margins = np.full(shape, np.inf, np.float32)


class RunningSet:
    """The engines of a set of graphs.

    Args:
        manifest: the bundle's manifest.
        found: the set's entry in the manifest.
        engines: the engines of the set's graphs, by graph name.
        walking: a lock that is held while hops run; sets with the same engines share it.
    """

    def __init__(
        self, manifest: Manifest, found: GraphSet, engines: dict[str, Engine], walking: threading.Lock
    ) -> None:
        assert isinstance(manifest.routing, PathRouting)
        self._routing, self._reader = manifest.routing, DecisionReader(manifest)
        self._layers, self._vocabulary = manifest.model.layers, manifest.model.vocab_size
        self._embedding, self._head = engines[found.embedding], engines[found.head]
        self._routers = [engines[name] for name in found.routers]
        self._before = [engines[name] for name in found.before_attention]
        self._after = [engines[name] for name in found.after_attention]
        self._attention = engines[found.attention]
        self._whole = [engines[name] for name in found.layers]
        self._one_token = OneToken(self._routing, self._layers, self._routers, self._whole) if self._whole else None
        self._walking = walking

    @property
    def graph(self) -> Graph:
        """The graph whose sizes limit the number of a row's tokens in a call."""
        return self._attention.graph

    def run(self, cache: KvCache, call: Call) -> CallResult:
        """Run one call; arguments and errors as for ``WholeStep.run``."""
        assert call.forced is not None
        before = cache.lengths[:, call.rows].copy()
        real = np.arange(call.ids.shape[1]) < call.counts[:, None]
        rows = np.repeat(np.arange(call.rows.start, call.rows.stop), call.counts)
        positions = (cache.positions[call.rows, None] + np.arange(call.ids.shape[1]))[real]
        embedded = self._embedding.run({"input_ids": call.ids[real][None], "position_ids": positions[None]})
        walk = _Walk(
            rows,
            positions,
            embedded.pop("hidden_states_out")[0],
            embedded,
            call.forced[:, real],
            cache.lengths.copy(),
            one_each=bool((call.counts == 1).all()),
        )
        walk.begin(self._layers)
        with self._walking:  # the next run of an engine, from any thread, overwrites its outputs' memory
            path = None
            if self._one_token is not None and len(rows) == 1:
                path = self._one_token.run(cache, call.rows.start, walk.hidden_states, walk.angles, walk.forced)
            if path is not None:
                walk.hidden_states, walk.path = path.hidden_states, path.layers
                walk.scores, walk.margins = path.scores, path.margins
                return CallResult(self._wanted_logits(walk, call), path.entries, self._decisions(walk, call))
            for hop in range(self._routing.hops):
                tokens, layers, gates = self._choose(walk, hop)
                if len(tokens):
                    self._run_hop(cache, walk, hop, tokens, layers, gates)
                if not walk.alive.any():
                    break
        entries = walk.lengths[:, call.rows] - before
        return CallResult(self._wanted_logits(walk, call), entries, self._decisions(walk, call))

    def _choose(self, walk: _Walk, hop: int) -> tuple[Array, Array, Array | None]:
        """Run the hop's router; return the indices of the tokens that run a layer, their layers and their gates."""
        tokens = np.flatnonzero(walk.alive)
        allowed = np.ones((len(tokens), self._layers + self._routing.exit), bool)
        if self._routing.exit and hop < self._routing.min_hops:
            allowed[:, self._layers] = False
        if not self._routing.reuse:
            allowed[:, : self._layers] &= ~walk.visited[tokens]
            stuck = ~allowed.any(axis=1)
            walk.alive[tokens[stuck]] = False
            tokens, allowed = tokens[~stuck], allowed[~stuck]
        if not len(tokens):
            return tokens, tokens, None
        inputs = {
            "hidden_states": walk.hidden_states[None, tokens],
            "allowed": allowed,
            "forced_choices": walk.forced[hop, tokens],
        }
        found = self._routers[hop].run(inputs, lasting=False)
        choices, scores, gates = found["choices"], found["scores"], found.get("probabilities")
        if not np.isfinite(scores).all():
            token = tokens[np.argwhere(~np.isfinite(scores))[0, 0]]
            raise nan_in_hop(hop, int(walk.rows[token]), int(walk.positions[token]))
        walk.path[hop, tokens], walk.margins[hop, tokens] = choices, found["margins"]
        walk.scores[hop, tokens] = scores[np.arange(len(tokens)), choices]
        stays = choices < self._layers
        walk.alive[tokens] = stays
        walk.visited[tokens[stays], choices[stays]] = True
        return tokens[stays], choices[stays], None if gates is None else gates[stays]

    def _run_hop(
        self, cache: KvCache, walk: _Walk, hop: int, tokens: Array, layers: Array, gates: Array | None
    ) -> None:
        """Run each token's layer and replace its hidden state by the layer's output."""
        groups = _groups(layers)
        if self._whole and len(groups) == 1 and walk.one_each and len(tokens) == len(walk.rows):
            self._run_layer(cache, walk, hop, groups[0][0], gates)
            return
        prepared = self._prepared(walk, tokens, groups)
        attended = np.empty_like(prepared["query"])
        prepared["position_ids"] = walk.positions[tokens]
        by_layer = self._routing.places == "layers"
        # Each attention call reads one cache: the hop's, or a layer's.
        for place, group in groups if by_layer else [(hop, np.arange(len(tokens)))]:
            for rows, index in _batches(walk, tokens, group):
                inputs = {name: part[index] for name, part in prepared.items()}
                attended[index] = self._attend(cache, walk.lengths, place, hop, rows, inputs)
        for layer, group in groups:
            inputs = {"hidden_states": walk.hidden_states[None, tokens[group]], "attention": attended[None, group]}
            if gates is not None:
                inputs["gates"] = gates[group]
            found = self._after[layer].run(inputs, lasting=False)
            walk.hidden_states[tokens[group]] = found["hidden_states_out"][0]

    def _run_layer(self, cache: KvCache, walk: _Walk, hop: int, layer: int, gates: Array | None) -> None:
        """Run a whole layer on all rows, which have one token each."""
        rows = slice(int(walk.rows[0]), int(walk.rows[-1]) + 1)
        place = layer if self._routing.places == "layers" else hop
        inputs = {"hidden_states": walk.hidden_states[:, None], "position_ids": walk.positions[:, None]}
        inputs |= {name: part[0][:, None] for name, part in walk.angles.items()}
        if gates is not None:
            inputs["gates"] = gates
        results = self._appended(self._whole[layer], cache, walk.lengths, place, hop, rows, inputs)
        walk.hidden_states = results["hidden_states_out"][:, 0].copy()

    def _prepared(self, walk: _Walk, tokens: Array, groups: list[tuple[int, Array]]) -> dict[str, Array]:
        """Run each token's layer up to attention; return query, key and value [tokens, ..]."""
        prepared: dict[str, Array] = {}
        for layer, group in groups:
            mine = tokens[group]
            angles = {name: part[:, mine] for name, part in walk.angles.items()}
            found = self._before[layer].run({"hidden_states": walk.hidden_states[None, mine], **angles}, lasting=False)
            for name, part in found.items():
                if name not in prepared:
                    prepared[name] = np.empty((len(tokens), part.shape[2]), part.dtype)
                prepared[name][group] = part[0]
        return prepared

    def _attend(
        self, cache: KvCache, lengths: Array, place: int, hop: int, rows: slice, inputs: dict[str, Array]
    ) -> Array:
        """Return attention [b, C, ..] of C tokens per row, over the cache of one place; arguments as below."""
        return self._appended(self._attention, cache, lengths, place, hop, rows, inputs)["attention"]

    @staticmethod
    def _appended(
        engine: Engine,
        cache: KvCache,
        lengths: Array,
        place: int,
        hop: int,
        rows: slice,
        inputs: dict[str, Array],
    ) -> dict[str, Array]:
        """Run a graph that appends C tokens per row to the cache of one place, and return its results.

        Args:
            engine: the graph's engine.
            cache: the cache that attention reads and extends.
            lengths: int64 [places, rows of the cache], number of entries; updated in place.
            place: the cache's number.
            hop: the hop's number.
            rows: the b rows of the cache.
            inputs: the graph's other inputs; position_ids int64 [b, C].
        """
        mine, count = lengths[place, rows], inputs["position_ids"].shape[1]
        last = mine + (count - 1)
        total = int(last.max()) + 1
        cache.check_entries(place, total)
        told = {
            "cache_lengths": mine,
            "last_index": last.astype(np.int32),
            "total_length": np.array(total, np.int32),
            "step": np.array(hop),
        }
        results = engine.run(inputs | told, Caches(cache.buffers, rows, place), lasting=False)
        mine += count
        return results

    def _wanted_logits(self, walk: _Walk, call: Call) -> Array:
        """Return the logits that the call asks for, float32 [B, K, vocab]; zeros for rows without tokens."""
        if not call.wanted.shape[1]:
            return np.zeros((len(call.counts), 0, self._vocabulary), np.float32)
        first = np.cumsum(call.counts) - call.counts
        with_tokens = np.flatnonzero(call.counts)
        places = (first[:, None] + call.wanted)[with_tokens].ravel()
        found = self._logits(walk.hidden_states[places])
        logits = np.zeros((len(call.counts), call.wanted.shape[1], found.shape[1]), np.float32)
        logits[with_tokens] = found.reshape(len(with_tokens), call.wanted.shape[1], -1)
        return logits

    def _logits(self, hidden_states: Array) -> Array:
        """Return the logits of hidden states [n, hidden], float32 [n, vocab]; the head's limit sets the chunk."""
        most = self._head.graph.limit("N") or len(hidden_states)
        parts = [hidden_states[None, start : start + most] for start in range(0, len(hidden_states), most)]
        logits: list[Array] = [self._head.run({"hidden_states": part})["logits"][0] for part in parts]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _decisions(self, walk: _Walk, call: Call) -> list[Decisions]:
        ends = np.cumsum(call.counts)
        nothing = np.zeros(1, np.int64)  # no token finds a layer full
        return [
            self._reader.of_row(walk.path[:, a:b], walk.scores[:, a:b], walk.margins[:, a:b], nothing, call.active)
            for a, b in zip(ends - call.counts, ends, strict=True)
        ]


def _groups(layers: Array) -> list[tuple[int, Array]]:
    """Return every chosen layer with the indices of the tokens that chose it."""
    if len(layers) == 1:
        return [(int(layers[0]), np.arange(1))]
    return [(int(layer), np.flatnonzero(layers == layer)) for layer in np.unique(layers)]


def _batches(walk: _Walk, tokens: Array, group: Array) -> list[tuple[slice, Array]]:
    """Return the calls of attention, each as its rows and indices into ``tokens`` [rows, C].

    One call runs all rows where each has one token; else each row has a call of its own.
    """
    if walk.one_each and len(group) == len(walk.rows):
        return [(slice(int(walk.rows[0]), int(walk.rows[-1]) + 1), group[:, None])]
    rows = walk.rows[tokens[group]]
    return [(slice(row, row + 1), group[rows == row][None]) for row in np.unique(rows).tolist()]


__all__ = ["RunningSet"]
