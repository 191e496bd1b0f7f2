"""Log probabilities of given tokens after a prompt, as an evaluation of a model needs them."""

from __future__ import annotations

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.batch import Batch
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
    executor = model.executor
    cache = executor.full_cache(1, total)
    logits = executor.run(cache, Batch([0], [before], "prompt", chosen)).logits[0]
    scores = scored(logits, ids[:1].tolist(), count)
    for start in range(0, len(ids) - 1, _CHUNK):
        fed = ids[start : min(start + _CHUNK, len(ids) - 1)]
        logits = executor.run(cache, Batch([0], [fed], "decode", chosen, "all")).logits[0]
        scores += scored(logits, ids[start + 1 : start + 1 + len(fed)].tolist(), count)
    return [TokenLogprobs(each.logprob, each.top) for each in scores if each.logprob is not None]


def _ids(model: Model, name: str, tokens: Prompt) -> Array:
    if isinstance(tokens, str):
        tokens = model.text.encode(tokens, add_special_tokens=name == "prompt")
    return checked_ids(name, tokens, model.bundle.manifest.model.vocab_size)


__all__ = ["score"]
