"""Log probabilities of given tokens after a prompt, as an evaluation of a model needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import CHUNK, Batch, Tokens
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.model import Model, Prompt, WantedDepth
from dynexport.runtime.generation.request import TokenLogprobs
from dynexport.runtime.generation.sampler import scored
from dynexport.runtime.generation.sampling import MOST_LOGPROBS

Array = np.ndarray
# Tokens per call: their logits are the most memory that a call takes, 13 MB for a vocabulary of 49,152.
_CHUNK = 64


def score(
    model: Model, prompt: Prompt, continuation: Prompt, *, depth: WantedDepth = None, logprobs: int = 0
) -> list[TokenLogprobs]:
    """Return the log probability of each token of a continuation, given the prompt and the tokens before it.

    The continuation runs as generated tokens do: in the layers that the depth keeps or that routers choose. Several of
    its tokens share a call. To score a text from its beginning, give its first token as the prompt.

    Args:
        model: the model.
        prompt: text or token ids, at least one token.
        continuation: text, without begin and end tokens, or token ids. A text's tokens are its own: tokenize both
            together if the tokenizer could join them.
        depth: as for ``Model.generate``.
        logprobs: how many of the most probable tokens to report at each place, 0 to 20.

    Returns:
        One per token of the continuation.

    Raises:
        DynexportError: for a prompt that is empty, has unknown tokens or exceeds the context together with the
            continuation, or for an argument of another type or out of its range.
    """
    checked_kind("model", model, Model, "a Model")
    count, chosen = checked_count("logprobs", logprobs, 0, MOST_LOGPROBS), model.depth(depth)
    before, ids = _ids(model, "prompt", prompt), _ids(model, "continuation", continuation)
    limit, total = model.bundle.manifest.model.max_length, len(before) + len(ids)
    if total > limit:
        raise DynexportError(f"prompt: expected at most {limit} tokens together with the continuation, found {total}")
    if not len(ids):
        return []
    executor, scores = model.executor, []
    cache = executor.full_cache(1, total)
    for _, logits, targets in predicted(executor, cache, [(before, ids)], chosen, _CHUNK):
        scores += scored(logits, targets.tolist(), count)
    return [TokenLogprobs(each.logprob, each.top) for each in scores if each.logprob is not None]


def predicted(
    executor: Executor, cache: KvCache, pairs: Sequence[tuple[Tokens, Tokens]], depth: Depth, chunk: int
) -> Iterator[tuple[int, Array, Array]]:
    """Run contexts as prompts and continuations as generated tokens; yield what predicts the continuations' tokens.

    The last token of a continuation does not run.

    Args:
        executor: runs the bundle.
        cache: a cache of the executor whose rows are all acquired, one for each pair.
        pairs: token ids of contexts, each with at least one, and of continuations.
        depth: the depth of all rows.
        chunk: the largest number of a continuation's tokens in one call.

    Yields:
        A row, the logits of some tokens in it, float32 [n, vocab], and the tokens that follow these, int64 [n]. The
        tokens of a row come in order.

    Raises:
        DynexportError: as for ``Executor.run``.
    """
    targets = [np.asarray(ids, np.int64) for _, ids in pairs]
    logits = executor.prefill(cache, [context for context, _ in pairs], depth=depth, chunk=CHUNK)
    for row, values in enumerate(logits):
        if len(targets[row]):
            yield row, values, targets[row][:1]
    for start in range(0, max(map(len, targets)) - 1, chunk):
        rows = [row for row, ids in enumerate(targets) if len(ids) > start + 1]
        fed = [targets[row][start : min(start + chunk, len(targets[row]) - 1)] for row in rows]
        result = executor.run(cache, Batch(rows, fed, "decode", depth, "all", chunk=chunk))
        for row, ids, values in zip(rows, fed, result.logits, strict=True):
            yield row, values, targets[row][start + 1 : start + 1 + len(ids)]


def log_probabilities(logits: Array, tokens: Array) -> Array:
    """Return the natural logarithm of each token's probability, float64 [n].

    Args:
        logits: [n, vocab].
        tokens: one id per row, int64 [n].
    """
    values = logits.astype(np.float64)
    largest = values.max(axis=-1, keepdims=True)
    log_sum = largest[:, 0] + np.log(np.exp(values - largest).sum(axis=-1))
    return np.asarray(values[np.arange(len(tokens)), tokens] - log_sum)


def _ids(model: Model, name: str, tokens: Prompt) -> Array:
    if isinstance(tokens, str):
        tokens = model.text.encode(tokens, add_special_tokens=name == "prompt")
    return checked_ids(name, tokens, model.bundle.manifest.model.vocab_size)


__all__ = ["log_probabilities", "predicted", "score"]
