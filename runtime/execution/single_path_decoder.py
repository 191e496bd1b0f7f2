"""Steps of a Radial Network in a single graph, which follows the paths itself: the runtime only counts what it did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import SingleGraph
from dynexport.runtime.execution.cache import Cache
from dynexport.runtime.execution.decoder import CHUNK, Decoder, Tokens
from dynexport.runtime.execution.path_cache import SinglePathCache
from dynexport.runtime.execution.routes import StepPaths, check_forced_paths

Array = np.ndarray


class SinglePathDecoder(Decoder):
    """A bundle's single graph, loaded; arguments and errors as for ``Decoder``.

    Where layers have no room for all tokens, those that run together compete for it: a prompt in pieces, or a row
    beside others, may go other ways than at once or alone.
    """

    _cache_kind = SinglePathCache

    def _begin(self) -> None:
        super()._begin()
        contract, single = self.manifest.contract, self.manifest.single_graph
        assert isinstance(contract, Radial) and isinstance(single, SingleGraph)
        self.contract, self._chunk, self._layers = contract, single.chunk, self.manifest.model.layers
        self._deciders = contract.max_steps
        (graph,) = self.manifest.graphs
        self._check_outputs(graph, "logits", "overflow", *StepPaths.OUTPUTS)

    def cache(self, rows: int, slots: int, *, record: bool = False, room: int | None = None) -> SinglePathCache:
        """Room for ``rows`` sequences of ``slots`` tokens; at most the model's context; ``room`` as for ``Decoder``."""
        slots, room = self._slots(slots), self._first_room(room)
        return SinglePathCache(self.manifest, self.contract, rows, slots, record=record, room=room)

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
        """Run one prompt per row, in pieces of at most as many tokens as the caches have room for beside entries.

        Args:
            forced: int64 [max_steps, len] per row: a layer, the number of layers to leave, -1 to let the router decide.
        """
        chunk = min(checked_count("chunk", chunk), self._chunk)
        return super().prefill(cache, prompts, chunk=chunk, all_logits=all_logits, logits_at=logits_at, forced=forced)

    def _run_together(self, cache: Cache, rows: list[Array], chunk: int) -> bool:
        # A layer's cache is appended to in every step; attention takes several tokens of rows together on empty ones.
        return self.contract.cache_policy == "step" and super()._run_together(cache, rows, chunk)

    def _check_wish(self, wish: Array) -> None:
        check_forced_paths(self.contract, self._layers, wish)

    def _routing_inputs(self, ids: Array, counts: Array, wish: Array, *, is_prompt: bool) -> dict[str, Array]:
        return {"token_counts": counts, "forced_paths": np.broadcast_to(wish, (len(wish), *ids.shape))}

    def _advance(self, cache: Cache, active: Array, counts: Array, results: dict[str, Array]) -> None:
        """Count the entries of tokens that ran; nothing where a score is no number."""
        found = StepPaths.of(results)
        found.check(counts, cache.positions)
        cache.lengths += found.entries(self.contract, self._layers)
        cache.overflow += results["overflow"]
        cache.positions += counts
        if cache.logs is not None:
            found.record(cache.logs, counts, self._layers)


__all__ = ["SinglePathDecoder"]
