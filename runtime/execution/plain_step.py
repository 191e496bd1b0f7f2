"""Consecutive decode steps of the same rows at one depth, with inputs and caches bound once to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from dynexport.runtime.engines.engine import Prepared
from dynexport.runtime.execution.batch import Call
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.execution.whole_step import WholeStep

Array = np.ndarray
Key: TypeAlias = tuple[int, int, str]


class PlainStep:
    """A decode step of adjacent rows, bound to their caches; a run writes only the inputs that change.

    Args:
        running: the whole-step program.
        cache: the rows' cache.
        call: the step's call.
        prepared: the engine's bound call.

    Attributes:
        buffers: the cache's buffers at the time of binding; after they have grown, the step must be bound again.
    """

    def __init__(self, running: WholeStep, cache: KvCache, call: Call, prepared: Prepared) -> None:
        self.buffers, self._rows, self._counts = cache.buffers, call.rows, call.counts
        self._places = running.places
        self._entries = running.entries(call)
        self._prepared = prepared
        self._ids, self._positions, self._lengths = (
            prepared.inputs[name] for name in ("input_ids", "position_ids", "cache_lengths")
        )

    @classmethod
    def bound(cls, running: object, call: Call, cache: KvCache) -> PlainStep | None:
        """Return the bound step of a call; None if the cache records decisions or the engine cannot bind calls."""
        if not isinstance(running, WholeStep) or cache.logs is not None:
            return None
        prepared = running.prepared(cache, call)
        return None if prepared is None else cls(running, cache, call, prepared)

    def run(self, cache: KvCache, ids: Array) -> Array:
        """Run the step and commit its entries.

        Args:
            cache: the cache that the step is bound to.
            ids: token ids, int64 [rows].

        Returns:
            Logits, float32 [rows, vocab], in memory that the next run overwrites.

        Raises:
            DynexportError: when the engine fails.
        """
        self._ids[:, 0] = ids
        self._positions[:, 0] = cache.positions[self._rows]
        lengths = cache.lengths[:, self._rows]
        self._lengths[...] = lengths if self._places is None else lengths[self._places]
        logits = self._prepared.run()["logits"]
        cache.commit(self._rows, self._counts, self._entries, None)
        return logits[:, 0]


class PlainSteps:
    """The bound step of every cache, for the rows and the depth of its latest decode step."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[KvCache, tuple[Key | None, PlainStep | None]] = WeakKeyDictionary()

    def get(self, cache: KvCache, key: Key, bound: Callable[[], PlainStep | None]) -> PlainStep | None:
        """Return the cache's bound step for some rows at a depth; None for the first of consecutive steps.

        Args:
            cache: the cache.
            key: the first row, the number of rows and the depth's name.
            bound: binds a step; returns None if that is not possible.
        """
        known, step = self._known.get(cache, (None, None))
        if known != key:
            self._known[cache] = key, None
        elif step is None or step.buffers is not cache.buffers:
            step = bound()
            self._known[cache] = key, step
        return step if known == key else None


__all__ = ["PlainStep", "PlainSteps"]
