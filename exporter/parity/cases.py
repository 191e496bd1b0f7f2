"""Sequences to compare, and how engine and reference run the same one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dynexport.exporter.parity.metrics import FloatArray
from dynexport.exporter.reference import BoolArray, unified_skip_runs
from dynexport.runtime.cache import Cache
from dynexport.runtime.decoder import CHUNK, Decoder
from dynexport.runtime.manifest import Speedup

Prompt: TypeAlias = Sequence[int]


@dataclass(frozen=True)
class Case:
    """One sequence, and which of its tokens are prompt.

    Attributes:
        tokens: all of them.
        prompted: (start, stop) of what is given as prompt, in order, the first from 0; what lies outside was
            generated, and is fed token by token.
        speedup: where generated tokens run.
    """

    tokens: tuple[int, ...]
    prompted: tuple[tuple[int, int], ...]
    speedup: Speedup

    def runs(self, layers: int) -> BoolArray:
        """Which tokens run in which layer, for the reference: bool [layers, length]."""
        (_, first), *later = self.prompted
        return unified_skip_runs(first, len(self.tokens), self.speedup.keep, layers, segments=later)


Score: TypeAlias = Callable[[Sequence[Case]], list[FloatArray]]
"""The reference: per case float32 [length, vocab]."""


def replay(
    decoder: Decoder, cases: Sequence[Case], *, cache: Cache | None = None, chunk: int = CHUNK
) -> list[FloatArray]:
    """Run cases through the engine as one batch, with their own tokens whatever it would have chosen.

    Args:
        cases: of one speedup; prompts may differ in length, what is generated may not. Only a single case may have
            later prompts.
        cache: an empty one to use; None makes one.
        chunk: prompts go in pieces of this many tokens.

    Returns:
        Per case float32 [length, vocab]: the logits after every token.
    """
    first = cases[0]
    cache = cache or decoder.cache(len(cases), max(len(case.tokens) for case in cases))
    pieces: list[list[FloatArray]] = []
    done = np.zeros(len(cases), np.int64)
    ends = [start for start, _ in first.prompted[1:]] + [len(first.tokens)]
    for index, end in enumerate(ends):
        prompts = [case.tokens[slice(*case.prompted[index])] for case in cases]
        pieces.append(decoder.prefill(cache, prompts, chunk=chunk, all_logits=True))
        done += [len(prompt) for prompt in prompts]
        for _ in range(end - first.prompted[index][1]):
            logits = decoder.step(cache, [case.tokens[at] for case, at in zip(cases, done, strict=True)], first.speedup)
            pieces.append(list(logits[:, None]))
            done += 1
    return [np.concatenate(row) for row in zip(*pieces, strict=True)]


def generate(
    decoder: Decoder, cache: Cache, logits: FloatArray, speedup: Speedup, count: int
) -> tuple[list[list[int]], list[FloatArray]]:
    """Continue greedily.

    Args:
        logits: float32 [rows, vocab], after the last token so far.
        count: tokens to feed back.

    Returns:
        Per row the tokens fed, and float32 [count, vocab], the logits after each.
    """
    fed, found = [], []
    for _ in range(count):
        fed.append(logits.argmax(axis=-1))
        logits = decoder.step(cache, fed[-1], speedup)
        found.append(logits)
    if not fed:
        return [[] for _ in logits], [logits[:0] for _ in logits]
    return np.stack(fed, axis=1).tolist(), list(np.stack(found, axis=1))
