"""Find layers of a bundle that draft well: those without which the model's choices change least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.draft_length import CallTimes, best_count
from dynexport.runtime.generation.drafts import Proposal
from dynexport.runtime.generation.speculation import MOST_DRAFTS, depth_of_layers

Array = np.ndarray
# Tokens that run at once at a draft's depth; in a step with drafts about as many do.
_DRAFTED = 8


class DraftLayers:
    """Compares the choices of some layers with those of the full model, on continuations of prompts.

    Args:
        executor: runs the bundle's graphs.
        prompts: token ids, int64 [n] each.
        answers: the full model's greedy continuations, of at least two tokens each.
    """

    def __init__(self, executor: Executor, prompts: Sequence[Array], answers: Sequence[Sequence[int]]) -> None:
        self._executor = executor
        self._answers = [list(answer[: _DRAFTED + 1]) for answer in answers]
        longest = max(len(prompt) for prompt in prompts) + _DRAFTED
        self._cache: KvCache = executor.full_cache(len(prompts), longest)
        executor.prefill(self._cache, list(prompts))
        self._marks = [self._cache.mark(row) for row in range(len(prompts))]

    def agreement(self, keep: Sequence[int]) -> float:
        """Return the share of tokens for which these layers choose what the full model chooses."""
        depth = depth_of_layers(self._executor.manifest, keep)
        fed = [answer[:-1] for answer in self._answers]
        result = self._executor.run(self._cache, Batch(range(len(fed)), fed, "decode", depth, "all"))
        for mark in self._marks:
            self._cache.truncate(mark.row, mark)
        chosen = np.concatenate([logits.argmax(axis=-1) for logits in result.logits])
        return float((chosen == np.concatenate([answer[1:] for answer in self._answers])).mean())

    def search(self, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[Depth, float]:
        """Return the layers whose drafts are expected to save most time, and their agreement.

        Layers are left out in the order of the harm that leaving out each of them alone does.

        Raises:
            DynexportError: for fewer than two layers, of which none can be left out.
        """
        layers = self._executor.manifest.model.layers
        if layers < 2:
            raise DynexportError("calibrate: expected at least 2 layers, so that some can draft, found 1")
        total = layers + layers - 1
        alone = []
        for layer in range(layers):
            alone.append(self.agreement([other for other in range(layers) if other != layer]))
            progress(layer + 1, total)
        order = sorted(range(layers), key=lambda layer: -alone[layer])
        best, best_speed = (order[1:], alone[order[0]]), 0.0
        for left_out in range(1, layers):
            keep = order[left_out:]
            rate = self.agreement(keep)
            progress(layers + left_out, total)
            if (speed := _expected_speed(rate, len(keep) / layers)) > best_speed:
                best, best_speed = (keep, rate), speed
        return depth_of_layers(self._executor.manifest, best[0]), best[1]


def _expected_speed(rate: float, share: float) -> float:
    """Return tokens per plain step's time, by acceptance and the time of a draft as a share of a plain step's."""
    calls = CallTimes()
    calls.add(1, 1.0)
    chances = Proposal.alike(rate, MOST_DRAFTS).chances
    count = best_count([chances], calls, share) or 1  # of those that draft, even if none should
    return sum(rate**index for index in range(count + 1)) / (calls.of(1 + count) + count * share)


__all__ = ["DraftLayers"]
