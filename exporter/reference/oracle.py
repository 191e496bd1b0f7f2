"""The interface between verification and the PyTorch reference, the same for every strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, Reference
from dynexport.exporter.reference.rows import RowPaths, RowRoutes
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.manifest import Depth


@dataclass(frozen=True)
class Case:
    """One sequence of tokens to compare, split into prompt and generated tokens.

    Attributes:
        tokens: all token ids, prompt and generated.
        prompted: (start, stop) of each prompt part, in order; the first starts at 0. Tokens outside of them count as
            generated and are fed one by one.
        depth: the layers that generated tokens run, where no router decides.
        forced: int64 [R, length], decisions that replace the routers'; None: the routers decide.
    """

    tokens: tuple[int, ...]
    prompted: tuple[tuple[int, int], ...]
    depth: Depth
    forced: NDArray[np.int64] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """PyTorch's result for one case.

    Attributes:
        logits: float32 [length or fewer, vocab], of the last tokens or of the positions asked for.
        routes: the routers' decisions; None for a model without routers.
    """

    logits: FloatArray
    routes: RowRoutes | RowPaths | None = None


class Oracle(ABC):
    """A PyTorch model that gives the expected results of a strategy.

    Attributes:
        loaded_by: the loader that read the checkpoint, for reports.
    """

    loaded_by: str

    @abstractmethod
    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        """Return the teacher-forced result of every case.

        Args:
            cases: sequences to run.
            at: positions to compute logits for, in cases of equal length; empty: every position. Routes always cover
                every token.

        Raises:
            DynexportError: for an unknown token id, or more tokens than the model has positions for.
        """

    @abstractmethod
    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        """Return the hidden states after the embedding and every layer: float32 [1 + layers, length, hidden] each."""


class KeptOracle(Oracle):
    """An oracle for strategies without routers: a token's position in the case determines its layers.

    Args:
        weights: the model with its weights.
        runs: (case, layers) -> bool [layers, length], which tokens run in which layer; None: every token runs in
            every layer.
    """

    def __init__(self, weights: Weights, runs: Callable[[Case, int], BoolArray] | None = None) -> None:
        self._reference = Reference(weights, weights.source)
        self._runs_of = runs
        self.loaded_by = weights.loaded_by

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        logits = self._reference.logits([case.tokens for case in cases], self._runs(cases), at=at)
        return [Answer(values) for values in logits]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        after = self._reference.layer_outputs([case.tokens for case in cases], self._runs(cases))
        return with_embedding(self._reference, cases, after)

    def _runs(self, cases: Sequence[Case]) -> list[BoolArray] | None:
        return None if self._runs_of is None else [self._runs_of(case, self._reference.layers) for case in cases]


def forced_decisions(cases: Sequence[Case], dtype: type[np.generic]) -> list[NDArray[Any]] | None:
    """Return the forced decisions of the cases, or None; either all cases have them or none does."""
    told = [case.forced.astype(dtype) for case in cases if case.forced is not None]
    return told or None


def with_embedding(reference: Reference, cases: Sequence[Case], after: Sequence[FloatArray]) -> list[FloatArray]:
    """Prepend the embedding's output to the hidden states; a pass that skips every layer returns it."""
    nowhere = [np.zeros((reference.layers, len(case.tokens)), np.bool_) for case in cases]
    untouched = reference.layer_outputs([case.tokens for case in cases], nowhere)
    return [np.concatenate([first[:1], later]) for first, later in zip(untouched, after, strict=True)]


__all__ = ["Answer", "Case", "KeptOracle", "Oracle", "RowPaths", "RowRoutes", "forced_decisions", "with_embedding"]
