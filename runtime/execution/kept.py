"""Keep the first tokens of a run and drop the others, as if they had never run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache, Mark


def keep_first(
    executor: Executor, cache: KvCache, mark: Mark, tokens: Sequence[int], depth: Depth, decisions: Decisions | None
) -> None:
    """Keep the first generated tokens that ran since a mark, and drop those after them.

    Where the entries of the kept tokens do not come first in their caches, or are not known, the tokens run again.

    Args:
        executor: ran the tokens.
        cache: the row's cache.
        mark: the row's mark before the tokens ran.
        tokens: ids of the tokens to keep, at least one.
        depth: the depth that they ran at.
        decisions: the routers' decisions for all tokens of the row that ran; None without routers.

    Raises:
        DynexportError: as for ``Executor.run``.
    """
    cache.truncate(mark.row, mark)
    active = np.isin(np.arange(executor.manifest.model.layers), depth.keep)
    found = executor.reader.first(decisions, len(tokens), active)
    if found is None:
        executor.run(cache, Batch([mark.row], [tokens], "decode", depth, [np.zeros(0, np.int64)]))
        return
    entries, kept = found
    rows, counts = slice(mark.row, mark.row + 1), np.array([len(tokens)])
    cache.commit(rows, counts, entries[:, None], [kept] if executor.reader.rows or cache.logs is not None else None)


__all__ = ["keep_first"]
