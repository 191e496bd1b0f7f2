"""Perplexity on a text, through the very path that serves: a prompt, then one decode step per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind, checked_list, is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.compared import rows_together, text_windows

Array = np.ndarray


class Evaluation(BaseModel):
    """Perplexity at one depth over ``tokens`` decoded tokens, and its natural logarithm.

    Attributes:
        name: of the depth; "routed" where routers choose among all layers.
        layers: that a token may run in.
        depth: layers that a decoded token did run in, on average; NaN where none was fed back.
    """

    name: str
    layers: int
    depth: float
    perplexity: float
    mean_loss: float
    tokens: int


def evaluate(
    bundle: Bundle,
    ids: Sequence[int],
    *,
    depths: Sequence[Depth],
    window: int = 256,
    prompt_tokens: int = 64,
    max_tokens: int = 2048,
    batch: int = 8,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Measure the teacher-forced loss of every token of a window after its prompt.

    The text is cut into windows. The first ``prompt_tokens`` of each run as a prompt does; each later one is predicted
    from a decode step in the kept layers, or where routers say (the first of them from the prompt itself).

    Args:
        ids: the text.
        depths: to compare, on the same tokens.
        max_tokens: use at most so many tokens of the text.
        batch: windows that run together, at most as many as the bundle takes; it does not change the result.
        backend, threads: as for ``Executor``.
        progress: called with groups of windows done and in all.

    Raises:
        DynexportError: when the text is shorter than a window, has tokens that the model lacks, or a size is out of
            range.
    """
    executor = Executor(bundle, threads, backend=backend)
    batch = rows_together(bundle, batch)
    _check_window(bundle, prompt_tokens, window)
    depths = _checked_depths(depths)
    windows = text_windows(ids, window, max_tokens, bundle.manifest.model.vocab_size)
    groups = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    results = []
    for number, depth in enumerate(depths):
        losses, layers = [], []
        for done, group in enumerate(groups, start=1):
            loss, ran = _losses(executor, group, prompt_tokens, depth)
            losses.append(loss.ravel())
            layers.append(ran.ravel())
            if progress is not None:
                progress(number * len(groups) + done, len(depths) * len(groups))
        results.append(_evaluation(bundle, depth, np.concatenate(losses), np.concatenate(layers)))
    return results


def _check_window(bundle: Bundle, prompt: int, window: int) -> None:
    limit = bundle.manifest.model.max_length
    if not (is_integer(prompt) and is_integer(window) and 1 <= prompt < window <= limit):
        raise DynexportError(
            f"window: expected 1 <= prompt_tokens < window <= {limit}, found {shown(prompt)} and {shown(window)}"
        )


def _checked_depths(depths: Sequence[Depth]) -> list[Depth]:
    found = checked_list("depths", depths, "those of Bundle.depth")
    if not found:
        raise DynexportError("depths: expected at least one, found none")
    for depth in found:
        checked_kind("depths", depth, Depth, "those of Bundle.depth")
    return found


def _evaluation(bundle: Bundle, depth: Depth, losses: Array, layers: Array) -> Evaluation:
    mean = float(losses.mean())
    return Evaluation(
        name=depth.name if bundle.manifest.routing is None else "routed",
        layers=len(depth.keep),
        depth=float(layers.mean()) if len(layers) else math.nan,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        mean_loss=mean,
        tokens=len(losses),
    )


def _losses(executor: Executor, windows: Array, prompt: int, depth: Depth) -> tuple[Array, Array]:
    """Of every token after the prompt, -log p; and in how many layers those that were fed back ran.

    Returns:
        float64 [rows, window - prompt], and int64 [rows, window - prompt - 1].
    """
    rows, length = windows.shape
    cache = executor.full_cache(rows, length, record=True)
    logits = np.concatenate(executor.prefill(cache, list(windows[:, :prompt]), depth=depth))
    losses = [_negative_log_likelihood(logits, windows[:, prompt])]
    marks = [cache.mark(row) for row in range(rows)]
    for position in range(prompt, length - 1):
        logits = executor.step(cache, windows[:, position], depth)
        losses.append(_negative_log_likelihood(logits, windows[:, position + 1]))
    assert cache.logs is not None
    fed = [executor.reader.joined(cache.logs[mark.row][mark.steps :]) for mark in marks]
    return np.stack(losses, axis=1), np.stack([executor.reader.layers_run(row) for row in fed])


def _negative_log_likelihood(logits: Array, targets: Array) -> Array:
    values = logits.astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(values - top).sum(axis=-1))
    return np.asarray(log_sum - values[np.arange(len(targets)), targets])


__all__ = ["Evaluation", "evaluate"]
