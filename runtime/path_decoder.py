"""Steps of a Radial Network: the runtime follows each token's path, and calls the graph of the layer that it chose.

Tokens of a step are grouped by layer, and each group runs once; attention brings them together row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.contract import Radial
from dynexport.runtime.decoder import CHUNK, Tokens, check_threads, checked_prompt
from dynexport.runtime.engines.onnxruntime import Attention, Part
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph, Role, Speedup
from dynexport.runtime.path_cache import PathCache

Array = np.ndarray


@dataclass
class _Walk:
    """Tokens on their way, N of any rows in one line: rows one after the other, each in the order of its positions.

    Attributes:
        rows, positions: int64 [N].
        hidden_states: float32 [N, hidden].
        forced: int64 [max_steps, N], -1 where the router decides.
        alive: bool [N], those that have not left.
        visited: bool [N, layers].
        path: int64 [max_steps, N], the layer of every step; the number of layers for leaving there, -1 after that.
        scores, margins: float32 [max_steps, N], of the choice; 0 and infinity where there was none.
    """

    rows: Array
    positions: Array
    hidden_states: Array
    forced: Array
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


class PathDecoder:
    """A bundle's set of graphs, loaded; it decodes as ``Decoder`` does.

    Args:
        threads: intra-op threads of ONNX Runtime; None lets it take one per physical core.

    Raises:
        DynexportError: for a number of threads that makes no sense, or a graph that is missing.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        check_threads(threads)
        assert isinstance(bundle.manifest.contract, Radial)
        self.bundle, self.manifest, self.threads = bundle, bundle.manifest, threads
        self.contract = bundle.manifest.contract
        self._layers = self.manifest.model.layers
        self._embedding, self._head = self._part("embedding"), self._part("head")
        steps = range(self.contract.max_steps)
        shared = self._part("router") if self.contract.router.shared else None
        self._routers = [shared or self._part("router", step=step) for step in steps]
        self._before = [self._part("before_attention", layer) for layer in range(self._layers)]
        self._after = [self._part("after_attention", layer) for layer in range(self._layers)]
        self._attention = Attention(*self._graph("attention"), threads)

    def cache(self, rows: int, slots: int, *, record: bool = False) -> PathCache:
        """Room for ``rows`` sequences of ``slots`` tokens; at most the model's context."""
        slots = min(slots, self.manifest.model.max_length)
        return PathCache(self.manifest, self.contract, rows, slots, record=record)

    def prefill(
        self,
        cache: PathCache,
        prompts: Sequence[Tokens],
        *,
        chunk: int = CHUNK,
        all_logits: bool = False,
        forced: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Run one prompt per row on top of what the cache holds; arguments and errors as for ``Decoder.prefill``.

        Args:
            forced: int64 [max_steps, len] per row: a layer, the number of layers to leave, -1 to let the router decide.
        """
        rows = [
            checked_prompt(self.manifest, prompt, int(seen), cache.slots)
            for prompt, seen in zip(prompts, cache.positions, strict=True)
        ]
        pieces: list[list[Array]] = [[] for _ in rows]
        with cache.as_it_was_on_error():
            for start in range(0, max(map(len, rows)), chunk):
                parts = [row[start : start + chunk] for row in rows]
                wish = None
                if forced is not None:
                    wish = np.concatenate([path[:, start : start + chunk] for path in forced], axis=1)
                hidden_states = np.split(self._walk(cache, parts, wish), np.cumsum([len(part) for part in parts])[:-1])
                for row, part in enumerate(parts):
                    last = start + len(part) == len(rows[row])
                    if len(part) and (all_logits or last):
                        wanted = hidden_states[row] if all_logits else hidden_states[row][-1:]
                        pieces[row].append(self._logits(wanted))
        return [np.concatenate(found) for found in pieces]

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
        fed = np.ones(cache.rows, bool) if live is None else live
        if (cache.positions[fed] >= cache.slots).any():
            raise DynexportError(f"cache: all {cache.slots} slots of a row are used; the context is exhausted")
        ids = np.asarray(tokens, np.int64)
        parts = [ids[row : row + 1] if fed[row] else ids[:0] for row in range(cache.rows)]
        with cache.as_it_was_on_error():
            hidden_states = self._walk(cache, parts, None if forced is None else forced[:, fed])
        logits = np.zeros((cache.rows, self.manifest.model.vocab_size), np.float32)
        logits[fed] = self._logits(hidden_states)
        return logits

    def _walk(self, cache: PathCache, parts: Sequence[Array], forced: Array | None) -> Array:
        """Take every row's tokens to the end of their paths: hidden states float32 [N, hidden]."""
        counts = np.array([len(part) for part in parts])
        rows = np.repeat(np.arange(len(parts)), counts)
        positions = np.concatenate(
            [seen + np.arange(count) for seen, count in zip(cache.positions, counts, strict=True)]
        )
        (hidden_states,) = self._embedding(np.concatenate(parts)[None], positions[None])
        if forced is None:
            forced = np.full((self.contract.max_steps, len(rows)), -1)
        walk = _Walk(rows, positions, hidden_states[0], forced)
        walk.begin(self.contract.max_steps, self._layers)
        for step in range(self.contract.max_steps):
            tokens, layers, gates = self._choose(walk, step)
            if len(tokens):
                self._run(cache, walk, step, tokens, layers, gates)
            if not walk.alive.any():
                break
        cache.positions += counts
        self._record(cache, walk)
        return walk.hidden_states

    def _choose(self, walk: _Walk, step: int) -> tuple[Array, Array, Array]:
        """Who runs where in this step: indices of tokens, their layers, and what their gates are."""
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
            return tokens, tokens, np.zeros(0, np.float32)
        wishes = self._wishes(walk, step, tokens, allowed.shape[1])
        choices, scores, margins, gates = self._routers[step](walk.hidden_states[tokens][None], allowed, wishes)
        self._check_scores(scores, walk, step, tokens)
        walk.path[step, tokens], walk.margins[step, tokens] = choices, margins
        walk.scores[step, tokens] = scores[np.arange(len(tokens)), choices]
        stays = choices < self._layers
        walk.alive[tokens[~stays]] = False
        walk.visited[tokens[stays], choices[stays]] = True
        return tokens[stays], choices[stays], gates[stays]

    def _wishes(self, walk: _Walk, step: int, tokens: Array, choices: int) -> Array:
        wishes: Array = walk.forced[step, tokens]
        if len(wrong := wishes[(wishes < -1) | (wishes >= choices)]):
            raise DynexportError(
                f"forced path: step {step}: expected a layer 0..{self._layers - 1}"
                f"{f', {self._layers} to leave' if self.contract.exit else ''} or -1, found {wrong[0]}"
            )
        return wishes

    def _check_scores(self, scores: Array, walk: _Walk, step: int, tokens: Array) -> None:
        broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(broken):
            token = tokens[broken[0]]
            raise DynexportError(
                f"step {step}: row {walk.rows[token]}, position {walk.positions[token]}: expected router scores, found "
                "NaN or infinity; the hidden states before it overflow"
            )

    def _run(self, cache: PathCache, walk: _Walk, step: int, tokens: Array, layers: Array, gates: Array) -> None:
        """Run tokens in the layers that they chose, and write down their hidden states."""
        groups = {int(layer): np.flatnonzero(layers == layer) for layer in np.unique(layers)}
        hidden_states, positions = walk.hidden_states[tokens], walk.positions[tokens]
        prepared: list[Array] = []
        for layer, group in groups.items():
            found = self._before[layer](hidden_states[group][None], positions[None, group])
            if not prepared:
                prepared = [np.empty((len(tokens), part.shape[2]), np.float32) for part in found]
            for whole, part in zip(prepared, found, strict=True):
                whole[group] = part[0]
        attended = np.empty_like(prepared[0])
        if self.contract.cache_policy == "step":
            self._attend(cache, step, step, walk.rows[tokens], positions, prepared, attended, np.arange(len(tokens)))
        else:
            for layer, group in groups.items():
                self._attend(cache, layer, step, walk.rows[tokens], positions, prepared, attended, group)
        for layer, group in groups.items():
            inputs = [hidden_states[group][None], attended[group][None]]
            if self.contract.gate == "probability":
                inputs.append(gates[group])
            walk.hidden_states[tokens[group]] = self._after[layer](*inputs)[0][0]

    def _attend(
        self,
        cache: PathCache,
        place: int,
        step: int,
        rows: Array,
        positions: Array,
        prepared: Sequence[Array],
        attended: Array,
        group: Array,
    ) -> None:
        """Attention of a group in one place's cache: one token of every row at once, else row by row."""
        together = len(group) == cache.rows and np.array_equal(rows[group], np.arange(cache.rows))
        batches = (
            [(slice(0, cache.rows), group[:, None])]
            if together
            else [(slice(row, row + 1), group[rows[group] == row][None]) for row in np.unique(rows[group])]
        )
        for chosen, index in batches:
            lengths = cache.lengths[place, chosen]
            buffers = cache.room(place, int(lengths.max()) + index.shape[1])
            views = {part: buffer[chosen] for part, buffer in buffers.items()}
            inputs = {
                "query": prepared[0][index],
                "key": prepared[1][index],
                "value": prepared[2][index],
                "position_ids": positions[index],
                "cache_lengths": lengths,
                "step": np.array(step),
            }
            attended[index] = self._attention.run(views, inputs)
            cache.lengths[place, chosen] += index.shape[1]

    def _logits(self, hidden_states: Array) -> Array:
        """float32 [n, vocab] of hidden states [n, hidden]."""
        (logits,) = self._head(hidden_states[None])
        return np.asarray(logits[0])

    def _record(self, cache: PathCache, walk: _Walk) -> None:
        for row, log in enumerate(cache.logs or ()):
            mine = walk.rows == row
            log.ran.append(walk.visited[mine].T)
            log.scores.append(walk.scores[:, mine])
            log.margins.append(walk.margins[:, mine])
            log.paths.append(walk.path[:, mine])

    def _part(self, role: Role, layer: int | None = None, *, step: int | None = None) -> Part:
        return Part(*self._graph(role, layer, step=step), self.threads)

    def _graph(self, role: Role, layer: int | None = None, *, step: int | None = None) -> tuple[Path, Graph]:
        for graph in self.manifest.graphs:
            if graph.role == role and graph.step == step and (layer is None or graph.layers == (layer,)):
                return self.bundle.path / graph.file, graph
        which = "" if layer is None else f" of layer {layer}"
        raise DynexportError(f"{self.bundle.path}: expected a graph for {role}{which}, found none; convert again")


__all__ = ["PathDecoder"]
