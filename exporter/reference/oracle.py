"""What verification asks of the PyTorch golden: the same few questions, whatever the strategy."""

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
    """One sequence, and which of its tokens are prompt.

    Attributes:
        tokens: all of them.
        prompted: (start, stop) of what is given as prompt, in order, the first from 0; what lies outside was
            generated, and is fed token by token.
        depth: where generated tokens run, unless routers say.
        forced: int64 [R, length], decisions to make instead of the routers'; None leaves all to them.
    """

    tokens: tuple[int, ...]
    prompted: tuple[tuple[int, int], ...]
    depth: Depth
    forced: NDArray[np.int64] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """What PyTorch makes of a case.

    Attributes:
        logits: float32 [length or fewer, vocab], after each of the last tokens.
        routes: what routers decided; None where there are none.
    """

    logits: FloatArray
    routes: RowRoutes | RowPaths | None = None


class Oracle(ABC):
    """A model in PyTorch.

    Attributes:
        loaded_by: who has read the checkpoint, for reports.
    """

    loaded_by: str

    @abstractmethod
    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        """Teacher-forced answers.

        Args:
            at: compute logits of the tokens at these positions only, all cases then being of one length; empty: for
                all. Routes are told of all tokens.

        Raises:
            DynexportError: for tokens that the model does not have, or too many.
        """

    @abstractmethod
    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        """After the embedding and after every layer, float32 [1 + layers, length, hidden] per case."""


class KeptOracle(Oracle):
    """Every token runs in layers that follow from its place in the case alone.

    Args:
        runs: (case, layers) -> bool [layers, length], which tokens run in which layer; None: all in all.
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
    """The decisions that all of these cases, or none, come with."""
    told = [case.forced.astype(dtype) for case in cases if case.forced is not None]
    return told or None


def with_embedding(reference: Reference, cases: Sequence[Case], after: Sequence[FloatArray]) -> list[FloatArray]:
    """What no layer touches is the embedding."""
    nowhere = [np.zeros((reference.layers, len(case.tokens)), np.bool_) for case in cases]
    untouched = reference.layer_outputs([case.tokens for case in cases], nowhere)
    return [np.concatenate([first[:1], later]) for first, later in zip(untouched, after, strict=True)]


__all__ = ["Answer", "Case", "KeptOracle", "Oracle", "RowPaths", "RowRoutes", "forced_decisions", "with_embedding"]
