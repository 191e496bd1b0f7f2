"""Steps of a model over a cache: prompts, then single tokens; in all layers, a kept set, or where routers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from dynexport.runtime.bundle.checks import (
    checked_count,
    checked_decisions,
    checked_ids,
    checked_kind,
    checked_list,
    checked_rows,
    shown,
)
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest, Speedup
from dynexport.runtime.engines.engine import Caches, Engine
from dynexport.runtime.execution.cache import Cache, Entries
from dynexport.runtime.execution.loaded import Loaded, uses_cache
from dynexport.runtime.execution.routes import RowLog, StepRoutes

Array = np.ndarray
Tokens = Sequence[int] | Array

# Long prompts go in pieces: the scores of a piece against everything before it are what takes memory.
CHUNK = 1024


class Decoder(Loaded):
    """A bundle's graphs, loaded. Prompt and decode graphs of a static bundle are loaded when first needed."""

    _cache_kind: ClassVar[type[Cache]] = Cache

    def _begin(self) -> None:
        self._masks: dict[tuple[int, ...], Array] = {}
        self._deciders = len(self.manifest.routed.layers) if self.manifest.routed else 0
        for graph in self.manifest.graphs:
            self._check_outputs(graph, "logits", *(StepRoutes.OUTPUTS if self.manifest.routed else ()))

    def cache(self, rows: int, slots: int, *, record: bool = False, room: int | None = None) -> Cache:
        """Room for ``rows`` sequences of ``slots`` tokens; at most the model's context.

        Args:
            room: tokens that there is memory for at first, more when they come; None for all. On a GPU always all.
        """
        return Cache(self.manifest, rows, self._slots(slots), record=record, room=self._first_room(room))

    @uses_cache
    def prefill(
        self,
        cache: Cache,
        prompts: Sequence[Tokens],
        *,
        chunk: int = CHUNK,
        all_logits: bool = False,
        logits_at: Sequence[Array] | None = None,
        forced: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Run one prompt per row on top of what the cache holds: in every layer, or where its routers say.

        Prompts that fit into one chunk on an empty cache run as one right-padded batch; others row by row. A prompt
        whose tokens compete for a layer (``prefill: topk``) is never cut.

        Args:
            logits_at: int64 [K] per row, ascending places in its prompt: logits of these tokens only, if any.
            forced: bool [R, len] per row, decisions of routed layers to make instead of their routers'; or int64, where
                -1 leaves one to the router.

        Returns:
            Per row float32 [1, vocab], the logits of its last token; or [len, vocab] with ``all_logits``; or [K, vocab]
            with ``logits_at``.

        Raises:
            DynexportError: for an empty prompt, a token outside the vocabulary, a prompt that does not fit, an argument
                of another type or shape, a cache that another thread is using, or a route that the contract calls an
                error.
        """
        rows = checked_prompts(self.manifest, prompts, cache)
        cache.reserve(int(cache.positions.max()) + max(map(len, rows)))
        wishes = self._wishes(rows, forced)
        wanted = wanted_places(rows, all_logits, logits_at)
        chunk = self._piece(rows, checked_count("chunk", chunk), all_logits or logits_at is not None)
        if self._run_together(cache, rows, chunk):
            return self._prefill_batch(cache, rows, wishes, wanted)
        with cache.as_it_was_on_error():
            return [
                self._prefill_row(cache.row(i), row, wish, chunk, places)
                for i, (row, wish, places) in enumerate(zip(rows, wishes, wanted, strict=True))
            ]

    @uses_cache
    def step(
        self, cache: Cache, tokens: Tokens, speedup: Speedup, live: Array | None = None, *, forced: Array | None = None
    ) -> Array:
        """Feed one generated token per row through the kept layers.

        Args:
            tokens: int64 [rows].
            live: bool [rows]; rows that have ended are computed along but leave no entry.
            forced: bool or int64 [R, rows], as for ``prefill``.

        Returns:
            float32 [rows, vocab].

        Raises:
            DynexportError: when a live row has no slot left; otherwise as ``prefill``.
        """
        tokens, live = checked_step(self.manifest, tokens, live, cache)
        cache.reserve(int(cache.positions.max()) + 1)
        active = self._active(speedup)
        ids = tokens.reshape(-1, 1)
        counts = np.ones(len(ids), np.int64) if live is None else live.astype(np.int64)
        lengths = cache.lengths if live is None else cache.written_lengths()
        inputs = self._inputs(ids, cache.positions, lengths, active, np.zeros_like(ids))
        if self.manifest.has_routers:
            wish = self._undecided(1)[:, None] if forced is None else self._decided(forced, len(ids))[:, :, None]
            inputs |= self._routing_inputs(ids, counts, wish, is_prompt=False)
        results = self._engine_for(speedup).run(inputs, Caches(cache.buffers))
        self._advance(cache, active, counts, results)
        return results["logits"][:, 0]

    def _slots(self, wanted: int) -> int:
        """Tokens that a row may have: at most the model's context."""
        return min(checked_count("slots", wanted), self.manifest.model.max_length)

    def _run_together(self, cache: Cache, rows: list[Array], chunk: int) -> bool:
        """Whether the engine takes prompts as one batch."""
        return len(rows) > 1 and not cache.positions.any() and max(map(len, rows)) <= chunk

    def _piece(self, rows: list[Array], chunk: int, all_logits: bool) -> int:
        """How many tokens of a prompt a run may take: of one whose tokens compete for a layer, all."""
        limits = [self.manifest.limit(dimension) for dimension in (("S", "K") if all_logits else ("S",))]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if not (isinstance(self.manifest.contract, Mod) and self.manifest.contract.prefill == "topk"):
            return chunk if limit is None else min(chunk, limit)
        longest = max(map(len, rows))
        if limit is not None and longest > limit:
            raise DynexportError(
                f"prompt: expected at most {limit} tokens, which the bundle's engines are for where top-k decides, "
                f"found {longest}; convert it again with --max-prompt {longest}"
            )
        return longest

    def _active(self, speedup: Speedup) -> Array:
        """bool [layers], computed once for every kept set. Raises DynexportError for what is none of this model."""
        checked_kind("speedup", speedup, Speedup, "one of Bundle.speedup")
        if speedup.keep not in self._masks:
            layers = self.manifest.model.layers
            for layer in speedup.keep:
                checked_count("speedup: a kept layer", layer, 0, layers - 1)
            self._masks[speedup.keep] = np.isin(np.arange(layers), speedup.keep)
        return self._masks[speedup.keep]

    def _undecided(self, tokens: int) -> Array:
        """int64 [R, tokens], the decisions left to the routers."""
        return np.full((self._deciders, tokens), -1, np.int64)

    def _wishes(self, rows: list[Array], forced: Sequence[Array] | None) -> list[Array]:
        """int64 [R, len] per row, what a caller decides."""
        if forced is None:
            return [self._undecided(len(row)) for row in rows]
        return [
            self._decided(wish, len(row))
            for wish, row in zip(checked_for_rows("forced", forced, len(rows)), rows, strict=True)
        ]

    def _decided(self, forced: Array, count: int) -> Array:
        """What a caller decides for so many tokens, int64 [R, count]."""
        if not self._deciders:
            raise DynexportError(f"forced: expected None, as {self.bundle.path} has no routers; found decisions")
        wish = checked_decisions("forced", forced, (self._deciders, count))
        self._check_wish(wish)
        return wish

    def _check_wish(self, wish: Array) -> None:
        """Raise DynexportError for what no router decides."""
        if wish.min(initial=0) < -1 or wish.max(initial=0) > 1:
            raise DynexportError(
                f"forced: expected 1 to run, 0 to skip or -1 to leave it to the router, found "
                f"{wish[(wish < -1) | (wish > 1)][0]}"
            )

    def _prefill_batch(self, cache: Cache, rows: list[Array], wishes: list[Array], wanted: list[Array]) -> list[Array]:
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)
        wish = np.zeros((len(wishes[0]), len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)], wish[:, i, : len(row)] = row, wishes[i]
        sizes = np.array([len(row) for row in rows], np.int64)
        most = max(1, *map(len, wanted))  # the graph wants one place at least
        places = np.stack([np.resize(row, most) for row in wanted])
        logits = self._run_prompt(cache, ids, sizes, wish, places)
        return [logits[i, : len(row)] for i, row in enumerate(wanted)]

    def _prefill_row(self, cache: Cache, row: Array, wish: Array, chunk: int, wanted: Array) -> Array:
        pieces: list[Array] = []
        start = 0
        while start < len(row):
            limit = self.manifest.routed.chunk if self.manifest.routed and cache.positions.any() else None
            stop = start + min(chunk, limit or chunk)
            ids = row[None, start:stop]
            size = ids.shape[1]
            inside = wanted[(wanted >= start) & (wanted < start + size)] - start
            places = inside if len(inside) else np.array([size - 1])
            logits = self._run_prompt(cache, ids, np.array([size]), wish[:, None, start:stop], places[None])[0]
            pieces.append(logits[: len(inside)])
            start = stop
        return pieces[-1] if len(pieces) == 1 else np.concatenate(pieces)

    def _run_prompt(self, cache: Cache, ids: Array, sizes: Array, wish: Array, wanted: Array) -> Array:
        everything = np.ones(self.manifest.model.layers, bool)
        inputs = self._inputs(ids, cache.positions, cache.lengths, everything, wanted)
        if self.manifest.has_routers:
            inputs |= self._routing_inputs(ids, sizes, wish, is_prompt=True)
        results = self._engine(self.manifest.graphs[0]).run(inputs, Caches(cache.buffers))
        self._advance(cache, everything, sizes, results)
        return results["logits"]

    def _inputs(self, ids: Array, positions: Array, lengths: Array, active: Array, wanted: Array) -> dict[str, Array]:
        """Inputs for all layers of the model."""
        position_ids = positions[:, None] if ids.shape[1] == 1 else positions[:, None] + np.arange(ids.shape[1])
        return {
            "input_ids": ids,
            # Only padding and ended rows ever reach past the model's last position.
            "position_ids": np.minimum(position_ids, self.manifest.model.max_length - 1),
            "cache_lengths": lengths,
            "layer_active": active,
            "logits_indices": wanted,
        }

    def _routing_inputs(self, ids: Array, counts: Array, wish: Array, *, is_prompt: bool) -> dict[str, Array]:
        forced = np.broadcast_to(wish, (len(wish), *ids.shape))
        return {"token_counts": counts, "forced_routes": forced, "is_prompt": np.array(is_prompt)}

    def _advance(self, cache: Cache, active: Array, counts: Array, results: dict[str, Array]) -> None:
        """Count the new entries: of active layers one for each of ``counts`` tokens, of routed ones for those chosen.

        Nothing is counted when a route is an error: what the step has written is then never read.
        """
        routed, contract = self.manifest.routed, self.manifest.contract
        routes = None
        if routed is not None and isinstance(contract, Mod):
            routes = StepRoutes.of(results)
            routes.check(contract, routed.slots, counts)
            cache.lengths[list(routed.layers)] += routes.chosen.sum(2) - counts
            cache.overflow += routes.overflow
        cache.lengths[active] += counts
        cache.positions += counts
        if cache.logs is not None:
            self._record(cache.logs, active, counts, routes)

    def _record(self, logs: list[RowLog], active: Array, counts: Array, routes: StepRoutes | None) -> None:
        for row, (log, count) in enumerate(zip(logs, counts, strict=True)):
            ran = np.repeat(active[:, None], count, axis=1)
            if routes is not None and self.manifest.routed is not None:
                ran[list(self.manifest.routed.layers)] = routes.chosen[:, row, :count]
                log.scores.append(routes.scores[:, row, :count])
                log.margins.append(routes.margins[:, row, :count])
            log.ran.append(ran)

    def _engine_for(self, speedup: Speedup) -> Engine:
        """The conditional graph serves every kept set; without one, the graph that holds just these layers, if there
        are two of them the one that does nothing but decode."""
        first = self.manifest.graphs[0]
        if first.conditional:
            return self._engine(first)
        for graph in sorted(self.manifest.graphs, key=lambda graph: any(p.name == "prefill" for p in graph.profiles)):
            if graph.layers == speedup.keep:
                return self._engine(graph)
        raise DynexportError(f"{self.bundle.path}: no graph for speedup {speedup.name}; convert again with it")


def wanted_places(rows: Sequence[Array], all_logits: bool, logits_at: Sequence[Array] | None) -> list[Array]:
    """Per row, int64 [K], the places in its prompt whose logits are wanted: all, the given ones, or the last.

    Raises:
        DynexportError: for what is no ascending place of a row's prompt.
    """
    if logits_at is not None:
        given = zip(checked_for_rows("logits_at", logits_at, len(rows)), rows, strict=True)
        return [_checked_places(places, len(row)) for places, row in given]
    return [np.arange(len(row)) if all_logits else np.array([len(row) - 1]) for row in rows]


def _checked_places(places: Any, tokens: int) -> Array:
    """Ascending places among so many tokens, int64 [K]."""
    found = [checked_count("logits_at", place, 0, tokens - 1) for place in checked_list("logits_at", places, "places")]
    if sorted(set(found)) != found:
        raise DynexportError(f"logits_at: expected ascending places, found {shown(found)}")
    return np.array(found, np.int64)


def checked_prompts(manifest: Manifest, prompts: Sequence[Tokens], cache: Entries) -> list[Array]:
    """One prompt for every row of a cache, on top of what it holds; as ``checked_prompt``."""
    return [
        checked_prompt(manifest, prompt, int(seen), cache.slots)
        for prompt, seen in zip(checked_for_rows("prompts", prompts, cache.rows), cache.positions, strict=True)
    ]


def checked_for_rows(name: str, values: Sequence[Any], rows: int) -> list[Any]:
    """One value for each row. Raises DynexportError for another number of them."""
    found = checked_list(name, values, f"{rows}, one a row")
    if len(found) != rows:
        raise DynexportError(f"{name}: expected {rows}, one for each row of the cache, found {len(found)}")
    return found


def checked_step(manifest: Manifest, tokens: Tokens, live: Array | None, cache: Entries) -> tuple[Array, Array | None]:
    """One token of each row as int64 [rows], and which rows go on as bool [rows], None for all.

    Raises:
        DynexportError: for other shapes, what is no token, or a row that goes on and has no slot left.
    """
    ids = checked_ids("tokens", tokens, manifest.model.vocab_size)
    if len(ids) != cache.rows:
        raise DynexportError(f"tokens: expected {cache.rows}, one for each row of the cache, found {len(ids)}")
    if live is not None:
        live = checked_rows("live", live, cache.rows)
    cache.check_room(live)
    return ids, live


def checked_prompt(manifest: Manifest, prompt: Tokens, seen: int, slots: int) -> Array:
    """A prompt as int64 [len].

    Args:
        seen: tokens of the row before it.
        slots: tokens that a row may have.

    Raises:
        DynexportError: for an empty prompt, a token outside the vocabulary, or a prompt that does not fit.
    """
    ids = checked_ids("prompt", prompt, manifest.model.vocab_size)
    if len(ids) == 0:
        raise DynexportError("prompt: expected at least one token, found none")
    if seen + len(ids) > slots:
        raise DynexportError(
            f"prompt: expected at most {slots - seen} tokens to fit the context of {slots}, found {len(ids)}"
        )
    return ids
