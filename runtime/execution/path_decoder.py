"""Steps of a Radial Network: the runtime follows each token's path, and calls the graph of the layer that it chose.

Tokens of a step are grouped by layer, and each group runs once; attention brings them together row by row.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_decisions
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph, Role, Speedup
from dynexport.runtime.engines.engine import Caches, Engine
from dynexport.runtime.execution.decoder import (
    CHUNK,
    Tokens,
    checked_for_rows,
    checked_prompts,
    checked_step,
    wanted_places,
)
from dynexport.runtime.execution.loaded import Loaded, uses_cache
from dynexport.runtime.execution.path_cache import PathCache, check_places
from dynexport.runtime.execution.routes import StepPaths, check_forced_paths

Array = np.ndarray


@dataclass
class _Walk:
    """Tokens on their way, N of any rows in one line: rows one after the other, each in the order of its positions.

    Attributes:
        rows, positions: int64 [N].
        hidden_states: [N, hidden].
        angles: "cos" and "sin" [1, N, rotary dim / 2], where positions are rotary.
        forced: int64 [max_steps, N], -1 where the router decides.
        one_each: whether they are one token of every row.
        alive: bool [N], those that have not left.
        visited: bool [N, layers].
        path: int64 [max_steps, N], the layer of every step; the number of layers for leaving there, -1 after that.
        scores, margins: float32 [max_steps, N], of the choice; 0 and infinity where there was none.
    """

    rows: Array
    positions: Array
    hidden_states: Array
    angles: dict[str, Array]
    forced: Array
    one_each: bool
    alive: Array = field(init=False)
    visited: Array = field(init=False)
    path: Array = field(init=False)
    scores: Array = field(init=False)
    margins: Array = field(init=False)

    def begin(self, steps: int, layers: int) -> None:
        """Nobody has gone anywhere yet."""
        count = len(self.rows)
        self.alive = np.ones(count, bool)
        self.visited = np.zeros((count, layers), bool)
        self.path = np.full((steps, count), -1, np.int64)
        self.scores = np.zeros((steps, count), np.float32)
        self.margins = np.full((steps, count), np.inf, np.float32)


class PathDecoder(Loaded):
    """A bundle's set of graphs, loaded, and the graph of a whole decode step where there is one; it decodes as
    ``Decoder`` does.

    Raises:
        DynexportError: as ``Loaded``; also when a graph is missing.
    """

    _cache_kind = PathCache

    def _begin(self) -> None:
        assert isinstance(self.manifest.contract, Radial)
        self.contract = self.manifest.contract
        self._layers = self.manifest.model.layers
        self._embedding, self._head = self._part("embedding"), self._part("head")
        steps = range(self.contract.max_steps)
        shared = self._part("router") if self.contract.router.shared else None
        self._routers = [shared or self._part("router", step=step) for step in steps]
        self._before = [self._part("before_attention", layer) for layer in range(self._layers)]
        self._after = [self._part("after_attention", layer) for layer in range(self._layers)]
        self._attention = self._part("attention")
        self._decode = self._whole_step()
        self._walking = threading.Lock()

    def cache(self, rows: int, slots: int, *, record: bool = False, room: int | None = None) -> PathCache:
        """Room for ``rows`` sequences of ``slots`` tokens; at most the model's context; ``room`` as for ``Decoder``."""
        slots, room = min(checked_count("slots", slots), self.manifest.model.max_length), self._first_room(room)
        return PathCache(self.manifest, self.contract, rows, slots, record=record, room=room)

    @uses_cache
    def prefill(
        self,
        cache: PathCache,
        prompts: Sequence[Tokens],
        *,
        chunk: int = CHUNK,
        all_logits: bool = False,
        logits_at: Sequence[Array] | None = None,
        forced: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Run one prompt per row on top of what the cache holds; arguments and errors as for ``Decoder.prefill``.

        Args:
            forced: int64 [max_steps, len] per row: a layer, the number of layers to leave, -1 to let the router decide.
        """
        rows = checked_prompts(self.manifest, prompts, cache)
        if self._decode is not None:
            cache.reserve(int(cache.positions.max()) + max(map(len, rows)))
        paths = self._paths(rows, forced)
        wanted = wanted_places(rows, all_logits, logits_at)
        chunk = self._piece(len(rows), checked_count("chunk", chunk))
        pieces: list[list[Array]] = [[] for _ in rows]
        with cache.as_it_was_on_error():
            for start in range(0, max(map(len, rows)), chunk):
                parts = [row[start : start + chunk] for row in rows]
                wish = np.concatenate([path[:, start : start + chunk] for path in paths], axis=1)
                hidden_states = np.split(self._walk(cache, parts, wish), np.cumsum([len(part) for part in parts])[:-1])
                for row, part in enumerate(parts):
                    inside = wanted[row][(wanted[row] >= start) & (wanted[row] < start + len(part))] - start
                    if len(inside):
                        pieces[row].append(self._logits(hidden_states[row][inside]))
        nothing = np.zeros((0, self.manifest.model.vocab_size), np.float32)
        return [np.concatenate(found or [nothing]) for found in pieces]

    @uses_cache
    def step(
        self,
        cache: PathCache,
        tokens: Tokens,
        speedup: Speedup,
        live: Array | None = None,
        *,
        forced: Array | None = None,
    ) -> Array:
        """Feed one generated token per row; arguments and errors as for ``Decoder.step``.

        Args:
            forced: int64 [max_steps, rows], as for ``prefill``.
        """
        ids, live = checked_step(self.manifest, tokens, live, cache)
        wish = self._path(forced, cache.rows)
        if self._decode is not None:
            cache.reserve(int(cache.positions.max()) + 1)
            return self._step_at_once(self._decode, cache, ids, live, wish)
        fed = np.ones(cache.rows, bool) if live is None else live
        parts = [ids[row : row + 1] if fed[row] else ids[:0] for row in range(cache.rows)]
        with cache.as_it_was_on_error():
            hidden_states = self._walk(cache, parts, wish[:, fed])
        logits = np.zeros((cache.rows, self.manifest.model.vocab_size), np.float32)
        logits[fed] = self._logits(hidden_states)
        return logits

    def _step_at_once(self, engine: Engine, cache: PathCache, ids: Array, live: Array | None, wish: Array) -> Array:
        """The same by the graph of all steps; rows that have ended are computed along but leave no entry."""
        counts = np.ones(cache.rows, np.int64) if live is None else live.astype(np.int64)
        inputs = {
            "input_ids": ids[:, None],
            # Only rows that have ended ever reach past the model's last position, and a cache's last slot.
            "position_ids": np.minimum(cache.positions, self.manifest.model.max_length - 1)[:, None],
            "cache_lengths": cache.written_lengths(),
            "token_counts": counts,
            "forced_paths": wish[:, :, None],
        }
        results = engine.run(inputs, Caches(cache.together))
        found = StepPaths.of(results)
        found.check(counts, cache.positions)
        cache.lengths += found.entries(self.contract, self._layers)
        cache.positions += counts
        if cache.logs is not None:
            found.record(cache.logs, counts, self._layers)
        return results["logits"][:, 0]

    def _paths(self, rows: list[Array], forced: Sequence[Array] | None) -> list[Array]:
        """int64 [max_steps, len] per row, what a caller decides; -1 where the router does."""
        wishes = [None] * len(rows) if forced is None else checked_for_rows("forced", forced, len(rows))
        return [self._path(wish, len(row)) for wish, row in zip(wishes, rows, strict=True)]

    def _path(self, forced: Array | None, count: int) -> Array:
        """The same for so many tokens, int64 [max_steps, count]."""
        shape = (self.contract.max_steps, count)
        if forced is None:
            return np.full(shape, -1)
        path = checked_decisions("forced", forced, shape)
        check_forced_paths(self.contract, self._layers, path)
        return path

    def _piece(self, rows: int, chunk: int) -> int:
        """How many tokens of every row may go together: as attention takes of one, and all other graphs of a line."""
        lines = [graph.limit("N") for graph in self.manifest.graphs if graph.role != "head"]
        limits = [self._attention.graph.limit("C"), *(max(1, line // rows) for line in lines if line)]
        return min([chunk, *(limit for limit in limits if limit)])

    def _walk(self, cache: PathCache, parts: Sequence[Array], forced: Array) -> Array:
        """Take every row's tokens to the end of their paths: hidden states float32 [N, hidden]."""
        counts = np.array([len(part) for part in parts])
        rows = np.repeat(np.arange(len(parts)), counts)
        positions = np.concatenate(
            [seen + np.arange(count) for seen, count in zip(cache.positions, counts, strict=True)]
        )
        embedded = self._embedding.run({"input_ids": np.concatenate(parts)[None], "position_ids": positions[None]})
        hidden_states = embedded.pop("hidden_states_out")[0]
        walk = _Walk(rows, positions, hidden_states, embedded, forced, one_each=bool((counts == 1).all()))
        walk.begin(self.contract.max_steps, self._layers)
        with self._walking:  # what layers give lies in memory that the next run writes over, whoever's it is
            for step in range(self.contract.max_steps):
                tokens, layers, gates = self._choose(walk, step)
                if len(tokens):
                    self._run(cache, walk, step, tokens, layers, gates)
                if not walk.alive.any():
                    break
        cache.positions += counts
        self._record(cache, walk)
        return walk.hidden_states

    def _choose(self, walk: _Walk, step: int) -> tuple[Array, Array, Array | None]:
        """Who runs where in this step: indices of tokens, their layers, and their gates where the contract has any."""
        tokens = np.flatnonzero(walk.alive)
        allowed = np.ones((len(tokens), self.contract.choices(self._layers)), bool)
        if self.contract.exit and step < self.contract.min_steps:
            allowed[:, self._layers] = False
        if not self.contract.allow_reuse:
            allowed[:, : self._layers] &= ~walk.visited[tokens]
            stuck = ~allowed.any(axis=1)
            walk.alive[tokens[stuck]] = False
            tokens, allowed = tokens[~stuck], allowed[~stuck]
        if not len(tokens):
            return tokens, tokens, None
        wishes = walk.forced[step, tokens]
        inputs = {"hidden_states": walk.hidden_states[None, tokens], "allowed": allowed, "forced_choices": wishes}
        found = self._routers[step].run(inputs, lasting=False)
        choices, scores, gates = found["choices"], found["scores"], found.get("probabilities")
        self._check_scores(scores, walk, step, tokens)
        walk.path[step, tokens], walk.margins[step, tokens] = choices, found["margins"]
        walk.scores[step, tokens] = scores[np.arange(len(tokens)), choices]
        stays = choices < self._layers
        walk.alive[tokens] = stays
        walk.visited[tokens[stays], choices[stays]] = True
        return tokens[stays], choices[stays], None if gates is None else gates[stays]

    def _check_scores(self, scores: Array, walk: _Walk, step: int, tokens: Array) -> None:
        if np.isfinite(scores).all():
            return
        token = tokens[np.argwhere(~np.isfinite(scores))[0, 0]]
        raise DynexportError(
            f"step {step}: row {walk.rows[token]}, position {walk.positions[token]}: expected router scores, found "
            "NaN or infinity; the hidden states before it overflow"
        )

    def _run(self, cache: PathCache, walk: _Walk, step: int, tokens: Array, layers: Array, gates: Array | None) -> None:
        """Run tokens in the layers that they chose, and write down their hidden states."""
        groups = _groups(layers)
        prepared = self._prepared(walk, tokens, groups)
        prepared["position_ids"] = walk.positions[tokens]
        attended = np.empty_like(prepared["query"])
        by_layer = self.contract.cache_policy == "layer"
        for place, group in groups if by_layer else [(step, np.arange(len(tokens)))]:
            for chosen, index in _batches(cache, walk, tokens, group):
                inputs = {name: part[index] for name, part in prepared.items()}
                attended[index] = self._attend(cache, place, step, chosen, inputs)
        for layer, group in groups:
            inputs = {"hidden_states": walk.hidden_states[None, tokens[group]], "attention": attended[None, group]}
            if gates is not None:
                inputs["gates"] = gates[group]
            found = self._after[layer].run(inputs, lasting=False)
            walk.hidden_states[tokens[group]] = found["hidden_states_out"][0]

    def _prepared(self, walk: _Walk, tokens: Array, groups: list[tuple[int, Array]]) -> dict[str, Array]:
        """query, key and value [tokens, ..] of everyone's own layer."""
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

    def _attend(self, cache: PathCache, place: int, step: int, chosen: slice, inputs: dict[str, Array]) -> Array:
        """Attention [b, C, ..] of C tokens of each of some rows in one place's cache.

        Args:
            inputs: query, key, value [b, C, ..] and position_ids [b, C].
        """
        lengths, count = cache.lengths[place, chosen], inputs["query"].shape[1]
        last = lengths + (count - 1)
        total = int(last.max()) + 1
        told = {
            "cache_lengths": lengths,
            "last_index": last.astype(np.int32),
            "total_length": np.array(total, np.int32),
            "step": np.array(step),
        }
        caches = Caches(cache.room(place, total), chosen, place)
        attended = self._attention.run(inputs | told, caches, lasting=False)["attention"]
        lengths += count
        return attended

    def _logits(self, hidden_states: Array) -> Array:
        """float32 [n, vocab] of hidden states [n, hidden], as many at a time as the head takes."""
        most = self._head.graph.limit("N") or len(hidden_states)
        parts = [hidden_states[None, start : start + most] for start in range(0, len(hidden_states), most)]
        logits: list[Array] = [self._head.run({"hidden_states": part})["logits"][0] for part in parts]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _record(self, cache: PathCache, walk: _Walk) -> None:
        for row, log in enumerate(cache.logs or ()):
            mine = walk.rows == row
            log.ran.append(walk.visited[mine].T)
            log.scores.append(walk.scores[:, mine])
            log.margins.append(walk.margins[:, mine])
            log.paths.append(walk.path[:, mine])

    def _part(self, role: Role, layer: int | None = None, *, step: int | None = None) -> Engine:
        return self._engine(self._graph(role, layer, step=step))

    def _whole_step(self) -> Engine | None:
        """The graph of a whole decode step, where the bundle has one."""
        if all(graph.role != "decode" for graph in self.manifest.graphs):
            return None
        engine = self._part("decode")
        check_places(engine.graph, self.contract.max_steps)
        self._check_outputs(engine.graph, "logits", *StepPaths.OUTPUTS)
        return engine

    def _graph(self, role: Role, layer: int | None = None, *, step: int | None = None) -> Graph:
        for graph in self.manifest.graphs:
            if graph.role == role and graph.step == step and (layer is None or graph.layers == (layer,)):
                return graph
        which = "" if layer is None else f" of layer {layer}"
        raise DynexportError(f"{self.bundle.path}: expected a graph for {role}{which}, found none; convert again")


def _groups(layers: Array) -> list[tuple[int, Array]]:
    """Every layer that was chosen, and the places of those who did."""
    if len(layers) == 1:
        return [(int(layers[0]), np.arange(1))]
    return [(int(layer), np.flatnonzero(layers == layer)) for layer in np.unique(layers)]


def _batches(cache: PathCache, walk: _Walk, tokens: Array, group: Array) -> list[tuple[slice, Array]]:
    """What attends at once: one token of every row, else row by row; rows, and places in ``tokens`` [rows, C]."""
    if walk.one_each and len(group) == cache.rows:
        return [(slice(0, cache.rows), group[:, None])]
    rows = walk.rows[tokens[group]]
    return [(slice(row, row + 1), group[rows == row][None]) for row in np.unique(rows).tolist()]


__all__ = ["PathDecoder"]
