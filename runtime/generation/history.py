"""Adjust a row's logits by its tokens so far: biases, penalties and forbidden tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.generation.sampling import Sampling


class History:
    """The tokens of one row and the changes to its logits that depend on them.

    Args:
        sampling: the row's options, already checked.
        eos: ids that end the row; ``min_new_tokens`` forbids them.
    """

    def __init__(self, sampling: Sampling, eos: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._eos = np.array(tuple(eos), np.int64)
        self._tokens = _Ids()
        self._generated = 0
        # Each distinct token's index in _distinct and the number of times it was generated.
        self._places: dict[int, int] = {}
        self._distinct = _Ids()
        self._counts = _Ids()
        self._biased = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        single, self._words = _by_last_prefix_token(sampling.bad_words_ids, frozenset(self._eos.tolist()))
        self._never = np.array((*sampling.suppress_tokens, *single), np.int64)
        self._not_first = np.array(sampling.begin_suppress_tokens, np.int64)

    def see_prompt(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Add the prompt's tokens, in order."""
        for token in tokens:
            self._take(int(token))

    def push(self, token: int) -> None:
        """Add a generated token."""
        self._generated += 1
        place = self._take(token)
        self._counts.values[place] += 1

    def adjusted(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of the logits [vocab] with biases and penalties; forbidden tokens get minus infinity."""
        sampling, row = self._sampling, row.copy()
        row[self._biased] += self._bias
        # A prompt may contain ids beyond the head's vocabulary.
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
        """Add a token and return its index among the distinct ones."""
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
    """A growable int64 array."""

    def __init__(self) -> None:
        self._buffer = np.empty(64, np.int64)
        self._length = 0

    @property
    def values(self) -> NDArray[np.int64]:
        """The values, as a view."""
        return self._buffer[: self._length]

    def append(self, value: int) -> None:
        """Append a value."""
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = value
        self._length += 1


def _completes_a_repeat(tokens: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the tokens that followed earlier occurrences of the last ``size - 1`` tokens."""
    # A token can complete a repeat only if size - 1 tokens come before it.
    places = np.arange(size - 1, len(tokens))
    for back in range(1, size):
        places = places[tokens[places - back] == tokens[-back]] if len(places) else places
    return tokens[places]


def _by_last_prefix_token(
    words: Sequence[tuple[int, ...]], eos: frozenset[int]
) -> tuple[tuple[int, ...], dict[int, list[tuple[int, ...]]]]:
    """Return the one-token words that are not in ``eos``, and the longer words by their second-to-last token."""
    longer: dict[int, list[tuple[int, ...]]] = {}
    for word in words:
        if len(word) > 1:
            longer.setdefault(word[-2], []).append(word)
    return tuple(word[0] for word in words if len(word) == 1 and word[0] not in eos), longer


__all__ = ["History"]
