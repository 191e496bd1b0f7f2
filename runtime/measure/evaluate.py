"""Perplexity on a text, through the very path that serves: a prompt, then one step per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind, checked_list, is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.decoders import AnyDecoder, open_decoder


class Evaluation(BaseModel):
    """Perplexity at one kept set over ``tokens`` decoded tokens, and its natural logarithm.

    Attributes:
        name: of the kept set; "routed" where routers choose among all layers.
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
    speedups: Sequence[Depth],
    window: int = 256,
    prompt_tokens: int = 64,
    max_tokens: int = 2048,
    batch: int = 8,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Teacher-forced loss of every token of a window after its prompt.

    The text is cut into windows. The first ``prompt_tokens`` of each run as a prompt does, at full depth or where
    routers say; each later token is predicted from a decode step in the kept layers (the first of them from the prompt
    itself).

    Args:
        ids: the text.
        speedups: kept sets to compare, on the same tokens.
        max_tokens: use at most so many tokens of the text.
        batch: windows that run together, at most as many as the bundle takes; it does not change the result.
        backend, threads: as for ``engine_opener``.
        progress: called with steps done and in all.

    Raises:
        DynexportError: when the text is shorter than a window, has tokens that the model lacks, or a size is out of
            range.
    """
    decoder = open_decoder(bundle, threads, backend=backend)
    batch = rows_together(bundle, batch)
    limit = bundle.manifest.model.max_length
    if not (is_integer(prompt_tokens) and is_integer(window) and 1 <= prompt_tokens < window <= limit):
        raise DynexportError(
            f"window: expected 1 <= prompt_tokens < window <= {limit}, found {shown(prompt_tokens)} and {shown(window)}"
        )
    speedups = checked_list("speedups", speedups, "those of Bundle.depth")
    if not speedups:
        raise DynexportError("speedups: expected at least one, found none")
    for speedup in speedups:
        checked_kind("speedups", speedup, Depth, "those of Bundle.depth")
    windows = text_windows(ids, window, max_tokens, bundle.manifest.model.vocab_size)
    groups = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    total = len(speedups) * len(groups)
    results = []
    for number, speedup in enumerate(speedups):
        losses, depths = [], []
        for done, group in enumerate(groups, start=1):
            loss, depth = _losses(decoder, group, prompt_tokens, speedup)
            losses.append(loss.ravel())
            depths.append(depth)
            if progress is not None:
                progress(number * len(groups) + done, total)
        mean = float(np.concatenate(losses).mean())
        results.append(
            Evaluation(
                name="routed" if bundle.manifest.has_routers else speedup.name,
                layers=len(speedup.keep),
                depth=float(np.concatenate(depths).mean()),
                perplexity=_exp(mean),
                mean_loss=mean,
                tokens=len(windows) * (window - prompt_tokens),
            )
        )
    return results


def rows_together(bundle: Bundle, wanted: int) -> int:
    """How many windows run together: as many as wanted, but no more than engines are built for.

    Raises:
        DynexportError: when less than one is wanted.
    """
    wanted = checked_count("batch", wanted)
    return min(wanted, bundle.manifest.limit("B") or wanted)


def text_windows(ids: Iterable[int], window: int, max_tokens: int, vocabulary: int) -> np.ndarray:
    """The beginning of a text, cut.

    Args:
        ids: the text.
        window: tokens per row, at least 1.
        max_tokens: use at most so many tokens of the text.
        vocabulary: token ids that the model has.

    Returns:
        int64 [windows, window], at least one.

    Raises:
        DynexportError: when the text is shorter than a window, or has tokens that the model lacks.
    """
    if not is_integer(max_tokens) or max_tokens < window:
        raise DynexportError(f"max_tokens: expected at least one window of {window}, found {shown(max_tokens)}")
    listed = checked_list("text", ids, "token ids")
    count = min(len(listed), max_tokens) // window
    if count < 1:
        raise DynexportError(f"text: expected at least one window of {window} tokens, found {len(listed)} tokens")
    return checked_ids("text", listed[: count * window], vocabulary).reshape(count, window)


def _losses(decoder: AnyDecoder, windows: np.ndarray, prompt: int, speedup: Depth) -> tuple[np.ndarray, np.ndarray]:
    """Of every token after the prompt, -log p; and the layers that those fed back ran in.

    Returns:
        float64 [rows, window - prompt], and the mean depth of each row, float64 [rows].
    """
    rows, length = windows.shape
    cache = decoder.cache(rows, length)
    logits = np.concatenate(decoder.prefill(cache, list(windows[:, :prompt])))
    losses = [_negative_log_likelihood(logits, windows[:, prompt])]
    entries = cache.lengths.sum(axis=0)
    for position in range(prompt, length - 1):
        logits = decoder.step(cache, windows[:, position], speedup)
        losses.append(_negative_log_likelihood(logits, windows[:, position + 1]))
    fed = length - 1 - prompt
    depth = (cache.lengths.sum(axis=0) - entries) / fed if fed else np.full(rows, np.nan)
    return np.stack(losses, axis=1), depth


def _negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(values - top).sum(axis=-1))
    return np.asarray(log_sum - values[np.arange(len(targets)), targets])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
