"""Run a graph that computes a whole step: token ids in, logits out, with all KV caches of the call's rows."""

from __future__ import annotations

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph, LayerRouting, Manifest, PathRouting
from dynexport.runtime.engines.engine import Caches, Engine, Prepared
from dynexport.runtime.execution.batch import Call, CallResult
from dynexport.runtime.execution.decisions import DecisionReader, Decisions
from dynexport.runtime.execution.kv_cache import KvCache

Array = np.ndarray


class WholeStep:
    """The engine of a whole-step graph.

    Args:
        manifest: the bundle's manifest.
        engine: the graph's engine.

    Raises:
        DynexportError: for a graph that lacks an output or a cache.
    """

    def __init__(self, manifest: Manifest, engine: Engine) -> None:
        graph = self.graph = engine.graph
        self._engine, self._manifest, self._reader = engine, manifest, DecisionReader(manifest)
        self._places = list(graph.places or ())
        self._all_places = len(self._places) == len(manifest.caches)
        self._layers = None if len(graph.layers) == manifest.model.layers else list(graph.layers)
        self._added: dict[int, tuple[Array, Array]] = {}
        self._has = {spec.name for spec in graph.inputs}
        check_outputs(graph, "logits", *self._reader.outputs)
        found = len({name.partition(".")[0] for name in graph.caches})
        stored = [cache for cache in manifest.caches if cache.parts and cache.place in self._places]
        if found != len(stored):
            raise DynexportError(f"{graph.file}: expected {len(stored)} caches, found {found}; convert again")

    @property
    def places(self) -> list[int] | None:
        """The places of the graph's caches; None if it has those of all places."""
        return None if self._all_places else self._places

    def prepared(self, cache: KvCache, call: Call) -> Prepared | None:
        """Bind a call's inputs and caches for many runs; return None if the engine cannot."""
        inputs = self._inputs(cache, call, cache.positions[call.rows])
        return self._engine.prepare(inputs, Caches(cache.buffers, call.rows))

    def run(self, cache: KvCache, call: Call) -> CallResult:
        """Run one call; the executor commits the entries that it wrote.

        Raises:
            DynexportError: when the engine fails, or for a route that the contract defines as an error.
        """
        positions = cache.positions[call.rows]
        caches = Caches(cache.buffers, call.rows)
        results = self._engine.run(self._inputs(cache, call, positions), caches, lasting=call.lasting)
        logits = results["logits"][:, : call.wanted.shape[1]]
        if self._manifest.routing is None:
            return CallResult(logits, self.entries(call), self._unrouted(cache, call))
        entries, decisions = self._reader.read(results, call.counts, positions, call.active, call.rows.start)
        return CallResult(logits, entries, decisions)

    def entries(self, call: Call) -> Array:
        """Return the new entries without routers, int64 [places, B]: one per token in each active layer."""
        if id(call.active) not in self._added:  # the executor makes one mask per set of layers
            self._added[id(call.active)] = call.active, call.active.astype(np.int64)[:, None]
        entries: Array = self._added[id(call.active)][1] * call.counts
        return entries

    def _unrouted(self, cache: KvCache, call: Call) -> list[Decisions] | None:
        """Return the decisions to record without routers; None if the cache does not record."""
        if cache.logs is None:
            return None
        return [self._reader.unrouted(call.active, int(count)) for count in call.counts]

    def _inputs(self, cache: KvCache, call: Call, positions: Array) -> dict[str, Array]:
        tokens, position_ids = call.ids.shape[1], positions[:, None]
        if tokens > 1:
            position_ids = position_ids + np.arange(tokens)
        if tokens > 1 or not all(call.counts.tolist()):
            # Only padding and rows without tokens can exceed the model's last position.
            position_ids = np.minimum(position_ids, self._manifest.model.max_length - 1)
        lengths = cache.lengths[:, call.rows]
        inputs = {
            "input_ids": call.ids,
            "position_ids": position_ids,
            "cache_lengths": lengths if self._all_places else lengths[self._places],
        }
        if "logits_indices" in self._has:
            inputs["logits_indices"] = self._wanted(call)
        if "layer_active" in self._has:
            inputs["layer_active"] = call.active if self._layers is None else call.active[self._layers]
        if isinstance(self._manifest.routing, LayerRouting):
            inputs |= {"token_counts": call.counts, "forced_routes": call.forced}
            if "is_prompt" in self._has:
                inputs["is_prompt"] = np.array(call.is_prompt)
        elif isinstance(self._manifest.routing, PathRouting):
            inputs |= {"token_counts": call.counts, "forced_paths": call.forced}
        return inputs

    def _wanted(self, call: Call) -> Array:
        """Return the indices of the tokens that get logits; an engine's profiles have at least one."""
        if call.wanted.shape[1] or not self.graph.profiles:
            return call.wanted
        last: Array = np.maximum(call.counts - 1, 0)[:, None]
        return last


def check_outputs(graph: Graph, *wanted: str) -> None:
    """Raise DynexportError for a graph that lacks an output."""
    if missing := set(wanted) - {spec.name for spec in graph.outputs}:
        raise DynexportError(f"{graph.file}: expected an output {min(missing)}, found none; convert again")


__all__ = ["WholeStep", "check_outputs"]
