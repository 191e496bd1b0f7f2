"""Decode steps of the same rows at one depth, one after the other: what changes between them is written in place."""

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
    """One token of each of some rows side by side, bound to their caches.

    Attributes:
        buffers: the caches that it is bound to; where they have grown, it is of no use any more.
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
        """Return one for a call; None where its steps are recorded, or the engine binds nothing for many runs."""
        if not isinstance(running, WholeStep) or cache.logs is not None:
            return None
        prepared = running.prepared(cache, call)
        return None if prepared is None else cls(running, cache, call, prepared)

    def run(self, cache: KvCache, ids: Array) -> Array:
        """Run it with token ids int64 [rows], and commit: float32 [rows, vocab] that the next run writes over.

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
    """The bound steps of caches: of each, the one for the rows and the depth that it runs now."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[KvCache, tuple[Key | None, PlainStep | None]] = WeakKeyDictionary()

    def get(self, cache: KvCache, key: Key, bound: Callable[[], PlainStep | None]) -> PlainStep | None:
        """Return the bound step of some rows at a depth, from the second step in a row on; None before.

        Args:
            bound: makes one, where there can be one.
        """
        known, step = self._known.get(cache, (None, None))
        if known != key:
            self._known[cache] = key, None
        elif step is None or step.buffers is not cache.buffers:
            step = bound()
            self._known[cache] = key, step
        return step if known == key else None


__all__ = ["PlainStep", "PlainSteps"]
