"""Choose the next token of each row of a batch; every row has its own options."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.bundle.checks import checked_count, checked_kind, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.constraint import Constraint
from dynexport.runtime.generation.filters import draw, largest_ids, log_of_sum
from dynexport.runtime.generation.history import History
from dynexport.runtime.generation.sampling import Sampling


class NoTokenLeft(DynexportError):
    """A row's options and its schema forbid every token."""


class Choice(NamedTuple):
    """A chosen token.

    Attributes:
        token: the token's id.
        logprob: its log probability before sampling options; None if ``Sampling.logprobs`` is None.
        top: (token id, log probability) of the ``Sampling.logprobs`` most probable tokens, most probable first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class RowSampler:
    """The state of one row: its random generator and its tokens so far.

    Its choices depend only on its seed, its seed index, its own logits and its own tokens.

    Args:
        sampling: the row's options.
        seed_index: selects one of a seed's independent random sequences, so that rows with one seed differ.
        eos: ids that end the row, for ``min_new_tokens`` and ``bad_words_ids``.
        vocabulary: the vocabulary's size, to check the ids of ``sampling``; None if it is not known.
        constraint: limits the row's text; None for any text. No other row may use it.

    Raises:
        DynexportError: for an argument of another type, or an id outside the vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        seed_index: int = 0,
        eos: Iterable[int] = (),
        vocabulary: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        checked_kind("sampling", sampling, Sampling, "a Sampling")
        eos = tuple(eos)
        self.sampling, self.constraint = sampling, constraint
        self.ends = np.array(eos, np.int64)
        self._vocabulary: int | None = None
        if vocabulary is not None:
            self.check_ids(vocabulary)
        self.greedy = sampling.temperature == 0
        self.history = History(sampling, eos) if sampling.adjusts else None
        self.plain = self.greedy and self.history is None and sampling.logprobs is None and constraint is None
        self._seed_index = checked_count("seed_index", seed_index, 0)
        self._generator: np.random.Generator | None = None
        self._drawn: deque[float] = deque()  # random numbers that were looked at and not used

    def check_ids(self, vocabulary: int) -> None:
        """Check the ids of the options against a vocabulary's size. Raises as ``Sampling.check_ids``."""
        if vocabulary != self._vocabulary:
            self.sampling.check_ids(vocabulary)
            self._vocabulary = vocabulary

    @property
    def is_complete(self) -> bool:
        """True if no token can continue the text of the row's schema."""
        return self.constraint is not None and self.constraint.complete

    def see_prompt(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Add the prompt's tokens, in order; ``choose`` adds the generated ones."""
        if self.history is not None:
            self.history.see_prompt(tokens)

    def uniform(self) -> float:
        """Return the row's next random number, in [0, 1)."""
        return self._drawn.popleft() if self._drawn else self._random()

    def upcoming(self, index: int) -> float:
        """Return the random number that ``uniform`` will return after ``index`` others."""
        while len(self._drawn) <= index:
            self._drawn.append(self._random())
        return self._drawn[index]

    def _random(self) -> float:
        if self._generator is None:
            seed = None if self.sampling.seed is None else int(self.sampling.seed)
            sequence = np.random.SeedSequence(seed, spawn_key=(self._seed_index,))
            self._generator = np.random.default_rng(sequence)
        return self._generator.random()


def choose(logits: NDArray[np.float32], rows: Sequence[RowSampler]) -> list[Choice]:
    """Choose the next token of every row.

    Args:
        logits: float32 ``[rows, vocab]``; minus infinity excludes a token.
        rows: the state of each row; the chosen token is added to it.

    Returns:
        One choice per row. Among equally probable tokens, greedy choice takes the lowest id.

    Raises:
        DynexportError: for another shape or type, a NaN logit, a row whose largest logit is infinite, or a row whose
            tokens are all forbidden.
    """
    _check_shape(logits, len(rows))
    tokens, largest = _most_probable(logits)
    if all(row.plain for row in rows):
        return [Choice(token) for token in tokens]
    each = zip(logits, rows, tokens, largest, strict=True)
    with np.errstate(over="ignore"):  # overflow to minus infinity is intended
        return [_choose(index, *one) for index, one in enumerate(each)]


def scored(logits: NDArray[np.float32], tokens: Sequence[int], count: int) -> list[Choice]:
    """Return given tokens as choices, with their log probabilities.

    Args:
        logits: float32 [n, vocab].
        tokens: one id per row.
        count: number of the most probable tokens to report in each row.

    Raises:
        DynexportError: as for ``choose``.
    """
    _check_shape(logits, len(tokens))
    _, largest = _most_probable(logits)
    return [_with_logprobs(*one, count) for one in zip(logits, largest, tokens, strict=True)]


def _most_probable(logits: NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """Return the id and the value of each row's largest logit."""
    tokens: list[int] = logits.argmax(axis=1).tolist()  # argmax returns the index of a NaN if there is one
    largest = [float(row[token]) for row, token in zip(logits, tokens, strict=True)]
    if not all(map(math.isfinite, largest)):
        _refuse(largest)
    return tokens, largest


def _choose(index: int, logits: NDArray[np.float32], row: RowSampler, token: int, largest: float) -> Choice:
    """Choose the token of one row; ``token`` is the id of its largest logit."""
    if row.plain:
        return Choice(token)
    adjusted, adjusted_largest = logits, largest
    if row.history is not None:
        row.check_ids(logits.size)
        adjusted = row.history.adjusted(logits)
    if row.constraint is not None:
        adjusted = row.constraint.masked(adjusted, row.ends)
    if adjusted is not logits:
        token = int(adjusted.argmax())
        adjusted_largest = float(adjusted[token])
        if not np.isfinite(adjusted_largest):
            raise NoTokenLeft(
                f"logits: row {index}: expected a token that may be generated, found all of them forbidden or out of "
                "range after biases, penalties and the schema; forbid fewer"
            )
    if not row.greedy:
        token = draw(adjusted, adjusted_largest, row.sampling, row.uniform())
    if row.history is not None:
        row.history.push(token)
    if row.constraint is not None and token not in row.ends:
        row.constraint.push(token)
    return _with_logprobs(logits, largest, token, row.sampling.logprobs)


def _with_logprobs(logits: NDArray[np.float32], largest: float, token: int, count: int | None) -> Choice:
    if count is None:
        return Choice(token)
    total = log_of_sum(logits, largest)
    ids = largest_ids(logits, count).tolist() if count else []
    return Choice(token, float(logits[token]) - total, tuple((top, float(logits[top]) - total) for top in ids))


class Sampler:
    """Chooses one token per row and step, with the same options for every row."""

    def __init__(
        self, sampling: Sampling, rows: int, *, eos: Iterable[int] = (), vocabulary: int | None = None
    ) -> None:
        """Prepare ``rows`` rows; the other arguments and errors are those of ``RowSampler``."""
        eos = tuple(eos)
        count = checked_count("rows", rows)
        self._rows = [RowSampler(sampling, seed_index=row, eos=eos, vocabulary=vocabulary) for row in range(count)]

    def see(self, row: int, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Add a row's prompt tokens, in order; the chosen tokens are added automatically."""
        self._rows[row].see_prompt(tokens)

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return int64 ``[rows]``; arguments and errors as for ``choose``."""
        return np.array([choice.token for choice in choose(logits, self._rows)], np.int64)


def _check_shape(logits: NDArray[np.float32], rows: int) -> None:
    if not isinstance(logits, np.ndarray) or logits.dtype.kind != "f":
        found = logits.dtype if isinstance(logits, np.ndarray) else shown(logits)
        raise DynexportError(f"logits: expected floating-point numbers in an array, found {found}")
    if logits.ndim != 2 or logits.shape[0] != rows or logits.shape[1] == 0:
        raise DynexportError(f"logits: expected shape [{rows}, vocab], found {list(logits.shape)}")


def _refuse(largest: Sequence[float]) -> None:
    """Raise DynexportError for the first row whose largest logit is NaN or infinite."""
    row = next(row for row, value in enumerate(largest) if not math.isfinite(value))
    raise DynexportError(
        f"logits: row {row}: expected a finite largest logit and no NaN, found {largest[row]}; "
        "the model's arithmetic has overflowed or its weights are corrupt"
    )


__all__ = ["Choice", "NoTokenLeft", "RowSampler", "Sampler", "choose", "scored"]
