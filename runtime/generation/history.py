"""What the tokens of a row so far do to its next logits: biases, penalties and forbidden tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.generation.sampling import Sampling


class History:
    """The tokens of one row, and the changes to its logits that follow from them.

    Args:
        sampling: which changes; it has been checked.
        eos: ids that end the row, which ``min_new_tokens`` forbids.
    """

    def __init__(self, sampling: Sampling, eos: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._eos = np.array(tuple(eos), np.int64)
        self._tokens = _Ids()
        self._generated = 0
        # Each distinct token: its place in _distinct, and how often it was generated.
        self._places: dict[int, int] = {}
        self._distinct = _Ids()
        self._counts = _Ids()
        self._biased = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        single, self._words = _by_last_prefix_token(sampling.bad_words_ids, frozenset(self._eos.tolist()))
        self._never = np.array((*sampling.suppress_tokens, *single), np.int64)
        self._not_first = np.array(sampling.begin_suppress_tokens, np.int64)

    def see_prompt(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Take tokens that come before the generated ones, in their order."""
        for token in tokens:
            self._take(int(token))

    def push(self, token: int) -> None:
        """Take a generated token."""
        self._generated += 1
        place = self._take(token)
        self._counts.values[place] += 1

    def adjusted(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of the logits [vocab] with biases, penalties and, at forbidden tokens, minus infinity."""
        sampling, row = self._sampling, row.copy()
        row[self._biased] += self._bias
        # A prompt may have ids that the head gives no logit for.
        known = self._distinct.values < row.size
        ids, counts = self._distinct.values[known], self._counts.values[known]
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            row[ids] = np.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            penalties = sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
            row[ids] -= penalties.astype(row.dtype)
        for forbidden in self._forbidden():
            row[forbidden[forbidden < row.size]] = -np.inf
        return row

    def _take(self, token: int) -> int:
        """Note a token; return its place among the distinct ones."""
        self._tokens.append(token)
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._distinct.values):
            self._distinct.append(token)
            self._counts.append(0)
        return place

    def _forbidden(self) -> Iterator[NDArray[np.int64]]:
        sampling = self._sampling
        if self._generated < sampling.min_new_tokens:
            yield self._eos
        if self._generated == 0:
            yield self._not_first
        yield self._never
        tokens = self._tokens.values
        if sampling.no_repeat_ngram_size:
            yield _completes_a_repeat(tokens, sampling.no_repeat_ngram_size)
        if self._words and len(tokens):
            words = self._words.get(int(tokens[-1]), ())
            ends = [word[-1] for word in words if tuple(tokens[-(len(word) - 1) :]) == word[:-1]]
            yield np.array(ends, np.int64)


class _Ids:
    """An int64 array that grows at its end."""

    def __init__(self) -> None:
        self._buffer = np.empty(64, np.int64)
        self._length = 0

    @property
    def values(self) -> NDArray[np.int64]:
        """A view of what is there."""
        return self._buffer[: self._length]

    def append(self, value: int) -> None:
        """Put a value behind the others."""
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = value
        self._length += 1


def _completes_a_repeat(tokens: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the tokens that followed earlier occurrences of the last ``size - 1`` tokens."""
    # Places whose token may be forbidden: those with size - 1 tokens before them.
    places = np.arange(size - 1, len(tokens))
    for back in range(1, size):
        places = places[tokens[places - back] == tokens[-back]] if len(places) else places
    return tokens[places]


def _by_last_prefix_token(
    words: Sequence[tuple[int, ...]], eos: frozenset[int]
) -> tuple[tuple[int, ...], dict[int, list[tuple[int, ...]]]]:
    """Return words of one token, without those that end a row, and the longer ones by their last token but one."""
    longer: dict[int, list[tuple[int, ...]]] = {}
    for word in words:
        if len(word) > 1:
            longer.setdefault(word[-2], []).append(word)
    return tuple(word[0] for word in words if len(word) == 1 and word[0] not in eos), longer


__all__ = ["History"]
