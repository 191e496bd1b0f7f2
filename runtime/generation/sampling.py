"""Choosing the next token of each row from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.bundle.checks import checked_count, checked_kind, is_integer, is_number, shown
from dynexport.runtime.bundle.errors import DynexportError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: as transformers does, in its order (repetition_penalty, temperature, top_k, top_p, min_p).

    Of equally probable tokens at the edge of a filter those with the lowest ids stay, so that top_k is never exceeded
    and top_k=1 is greedy; transformers keeps all of them under top_k, and leaves it open which under top_p.

    Attributes:
        temperature: 0 takes the most probable token; above 0 one is drawn from softmax(logits / temperature).
        top_p: draw from the smallest set of most probable tokens whose probability is at least this, 0 < top_p <= 1.
        top_k: draw from this many most probable tokens, before ``top_p``; 0 means all.
        min_p: draw only from tokens at least ``min_p`` times as probable as the most probable one, after ``top_p``.
        repetition_penalty: logits of tokens that the row has already, its prompt included, are divided by it where
            positive and multiplied by it where negative, greedy or not (Keskar et al. 2019, arXiv:1909.05858); 1 is
            none, and below 1 repeats are favoured.
        seed: makes the draws repeatable; None takes fresh entropy.

    Raises:
        DynexportError: when a field is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature_fits = is_number(self.temperature) and self.temperature >= 0
        _check("temperature", self.temperature, temperature_fits, "a finite number >= 0")
        _check("top_p", self.top_p, is_number(self.top_p) and 0 < self.top_p <= 1, "0 < top_p <= 1")
        _check("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "an integer >= 0")
        _check("min_p", self.min_p, is_number(self.min_p) and 0 <= self.min_p <= 1, "0 <= min_p <= 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, is_number(penalty) and penalty > 0, "a finite number > 0")
        seed_fits = self.seed is None or (is_integer(self.seed) and self.seed >= 0)
        _check("seed", self.seed, seed_fits, "an integer >= 0, or none")


class Sampler:
    """Draws one token a row and step; a row's draws depend on its seed, its index, its own logits and tokens only."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        """Prepare the generators of ``rows`` rows."""
        checked_kind("sampling", sampling, Sampling, "a Sampling")
        self._sampling = sampling
        seed = None if sampling.seed is None else int(sampling.seed)
        seeds = np.random.SeedSequence(seed).spawn(checked_count("rows", rows))
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        self._seen: list[set[int]] = [set() for _ in self._generators]

    def see(self, row: int, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Take token ids that a row has already, for ``repetition_penalty``; chosen ones are taken by themselves."""
        self._seen[row].update(map(int, tokens))

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Choose the next token of every row.

        Args:
            logits: float32 ``[rows, vocab]``; minus infinity excludes a token.

        Returns:
            int64 ``[rows]``. Of equally probable tokens, greedy choice takes the lowest id.

        Raises:
            DynexportError: when the shape or type is another one, a logit is NaN, or a row's largest is not finite.
        """
        if not isinstance(logits, np.ndarray) or not np.issubdtype(logits.dtype, np.floating):
            found = logits.dtype if isinstance(logits, np.ndarray) else shown(logits)
            raise DynexportError(f"logits: expected floating-point numbers in an array, found {found}")
        rows = len(self._generators)
        if logits.ndim != 2 or logits.shape[0] != rows or logits.shape[1] == 0:
            raise DynexportError(f"logits: expected shape [{rows}, vocab], found {list(logits.shape)}")
        _check_finite(logits)
        if self._sampling.repetition_penalty == 1:
            return self._choose(logits)
        tokens = self._choose(self._penalised(logits))
        for seen, token in zip(self._seen, tokens, strict=True):
            seen.add(int(token))
        return tokens

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``[rows, vocab]`` with those of seen tokens made smaller; ids beyond the vocabulary have none."""
        penalty, penalised = self._sampling.repetition_penalty, logits.copy()
        for row, seen in zip(penalised, self._seen, strict=True):
            ids = np.fromiter(seen, np.int64, len(seen))
            ids = ids[ids < row.size]
            row[ids] = np.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
        return penalised

    def _choose(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        if self._sampling.temperature == 0:
            return np.asarray(np.argmax(logits, axis=1), dtype=np.int64)
        chosen = [self._draw(row, generator) for row, generator in zip(logits, self._generators, strict=True)]
        return np.array(chosen, dtype=np.int64)

    def _draw(self, row: NDArray[np.float32], generator: np.random.Generator) -> int:
        candidates, probabilities = distribution(row, self._sampling)
        cumulative = np.cumsum(probabilities)
        cumulative /= cumulative[-1]  # the last is then exactly 1, above every draw
        return int(candidates[np.searchsorted(cumulative, generator.random(), side="right")])


def distribution(row: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """What a row's token is drawn from.

    Args:
        row: [vocab], logits whose largest is finite.
        sampling: its temperature is above 0.

    Returns:
        Token ids, ascending, and the probability of each among all that were there before ``top_p`` and ``min_p``.
    """
    candidates = _top_k(row, sampling.top_k)
    probabilities = _softmax(row[candidates], sampling.temperature)
    if sampling.top_p < 1:
        kept = _top_p(probabilities, sampling.top_p)
        candidates, probabilities = candidates[kept], probabilities[kept]
    if sampling.min_p > 0:
        likely = probabilities >= sampling.min_p * probabilities.max()
        candidates, probabilities = candidates[likely], probabilities[likely]
    return candidates, probabilities


def _top_k(row: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Indices of the ``count`` largest logits, ascending; of equal ones the lowest indices; all when 0."""
    if count == 0 or count >= row.size:
        return np.arange(row.size)
    # The full sort that stable ties call for is needed only among those that reach the k-th largest.
    reaching = np.flatnonzero(row >= np.partition(row, -count)[-count])
    order = np.argsort(-row[reaching], kind="stable")
    return np.sort(reaching[order[:count]])


def _top_p(probabilities: NDArray[np.float64], threshold: float) -> NDArray[np.intp]:
    """Indices of the smallest set whose probability is at least ``threshold``, ascending; never empty."""
    # All tokens below this share of the rest add up to less than the rest, so none of them is needed: this
    # spares a sort of the whole vocabulary.
    likely = np.flatnonzero(probabilities >= (1 - threshold) / probabilities.size)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    reached = int(np.searchsorted(np.cumsum(probabilities[order]), threshold, side="left"))
    return np.sort(order[: reached + 1])


def _softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to minus infinity, which is meant
        weights = np.exp((exact - exact.max()) / temperature)
    return np.asarray(weights / weights.sum())


def _check_finite(logits: NDArray[np.float32]) -> None:
    largest = logits.max(axis=1)  # NaN where any logit is NaN
    for row in np.flatnonzero(~np.isfinite(largest)):
        raise DynexportError(
            f"logits: row {row}: expected a finite largest logit and no NaN, found {largest[row]}; "
            "the model's arithmetic has overflowed or its weights are corrupt"
        )


def _check(field: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise DynexportError(f"{field}: expected {expected}, found {shown(value)}")
