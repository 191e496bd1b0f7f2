"""Perplexity on a text, computed as a request runs: a prefill, then one decode step per token."""

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
from dynexport.runtime.generation.scoring import log_probabilities, predicted
from dynexport.runtime.measure.compared import rows_together, text_windows

Array = np.ndarray


class Evaluation(BaseModel):
    """Perplexity of a bundle at one depth.

    Attributes:
        name: name of the depth; "routed" for a bundle with routers.
        layers: number of layers that a token may run.
        depth: mean number of layers that a decoded token ran; NaN where no decode step was needed.
        perplexity: exp(``mean_loss``).
        mean_loss: mean negative log-likelihood of a predicted token, in nats.
        tokens: number of predicted tokens.
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
    """Return the perplexity of a text at each of several depths, with teacher forcing.

    The text is cut into windows. The first ``prompt_tokens`` tokens of a window are its prompt. The prefill predicts
    the next token; decode steps in the kept layers, or in the layers that routers choose, predict the others.

    Args:
        bundle: the bundle to evaluate.
        ids: token ids of the text.
        depths: depths to compare on the same tokens, from ``Bundle.depth``.
        window: tokens per window.
        prompt_tokens: prompt tokens per window.
        max_tokens: maximum number of tokens to use, from the text's beginning.
        batch: windows that run together, limited to the rows that the bundle accepts; it does not change the result.
        backend: as for ``Executor``.
        threads: as for ``Executor``.
        progress: called after every batch of windows with the number of batches done and the total.

    Raises:
        DynexportError: the text is shorter than a window, has token ids that the model lacks, or a size is out of
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
    """Return -log p of every token after the prompt, and the number of layers that each decoded token ran.

    Returns:
        float64 [rows, window - prompt] and int64 [rows, window - prompt - 1].
    """
    rows, length = windows.shape
    cache = executor.full_cache(rows, length, record=True)
    losses: list[list[Array]] = [[] for _ in range(rows)]
    pairs = [(ids[:prompt], ids[prompt:]) for ids in windows]
    for row, logits, targets in predicted(executor, cache, pairs, depth, chunk=1):
        losses[row].append(-log_probabilities(logits, targets))
    assert cache.logs is not None
    layers = [executor.reader.layers_run(executor.reader.joined(log))[prompt:] for log in cache.logs]
    return np.stack([np.concatenate(row) for row in losses]), np.stack(layers)


__all__ = ["Evaluation", "evaluate"]
