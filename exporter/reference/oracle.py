"""What verification asks of the PyTorch golden: the same few questions, whatever the strategy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray, Reference
from dynexport.exporter.reference.mod import ModReference, RowRoutes
from dynexport.exporter.reference.radial import RadialReference, Room, RowPaths
from dynexport.exporter.reference.unified_skip import unified_skip_runs
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.contract import Mod, Radial
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
    """All tokens in all layers, or those of a kept set."""

    def __init__(self, weights: Weights) -> None:
        self._reference = Reference(weights, weights.source)
        self.loaded_by = weights.loaded_by

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        logits = self._reference.logits([case.tokens for case in cases], self._runs(cases), at=at)
        return [Answer(values) for values in logits]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        after = self._reference.layer_outputs([case.tokens for case in cases], self._runs(cases))
        return _with_embedding(self._reference, cases, after)

    def _runs(self, cases: Sequence[Case]) -> list[BoolArray]:
        return [_kept_runs(case, self._reference.layers) for case in cases]


class RoutedOracle(Oracle):
    """Routed layers run the tokens that their routers choose."""

    def __init__(self, weights: Weights, contract: Mod, max_length: int) -> None:
        self.loaded_by = weights.loaded_by
        self._routed = ModReference(weights, contract, max_length)
        self._unrouted = Reference(weights, weights.source)

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        tokens, prompted = [case.tokens for case in cases], [case.prompted for case in cases]
        logits, routes = self._routed.routed_logits(tokens, prompted, _forced(cases, np.bool_), at=at)
        return [Answer(values, row) for values, row in zip(logits, routes, strict=True)]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        tokens, prompted = [case.tokens for case in cases], [case.prompted for case in cases]
        after, _ = self._routed.routed_layer_outputs(tokens, prompted, _forced(cases, np.bool_))
        return _with_embedding(self._unrouted, cases, after)


class RadialOracle(Oracle):
    """Tokens go from layer to layer as the router says.

    Args:
        single: of a bundle in one graph, in which tokens of a prompt compete for room where it has a capacity below 1.
            Every case is a row that runs alone.
    """

    def __init__(
        self, weights: Weights, contract: Radial, layer_capacity: float = 1.0, chunk: int | None = None
    ) -> None:
        self.loaded_by = weights.loaded_by
        self._capacity, self._chunk = Fraction(str(layer_capacity)), chunk
        self._routed = RadialReference(weights, contract)
        self._unrouted = Reference(weights, weights.source)

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        tokens = [case.tokens for case in cases]
        logits, paths = self._routed.routed_logits(tokens, _forced(cases, np.int64), at=at, room=self._room(cases))
        return [Answer(values, row) for values, row in zip(logits, paths, strict=True)]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        """After the embedding and after every step, float32 [1 + max_steps, length, hidden] per case."""
        tokens, forced = [case.tokens for case in cases], _forced(cases, np.int64)
        after, _ = self._routed.routed_step_outputs(tokens, forced, room=self._room(cases))
        return _with_embedding(self._unrouted, cases, after)

    def _room(self, cases: Sequence[Case]) -> list[list[Room]] | None:
        """What layers take of every run of a prompt; a token alone always has room."""
        if self._capacity == 1 or self._chunk is None:
            return None
        share, chunk = self._capacity, self._chunk
        return [
            [
                (begin, end := min(begin + chunk, stop), max(1, math.ceil(share * (end - begin))))
                for start, stop in case.prompted
                for begin in range(start, stop, chunk)
            ]
            for case in cases
        ]


def _forced(cases: Sequence[Case], dtype: type[np.generic]) -> list[NDArray[Any]] | None:
    """The decisions that all of these cases, or none, come with."""
    told = [case.forced.astype(dtype) for case in cases if case.forced is not None]
    return told or None


def _with_embedding(reference: Reference, cases: Sequence[Case], after: Sequence[FloatArray]) -> list[FloatArray]:
    """What no layer touches is the embedding."""
    nowhere = [np.zeros((reference.layers, len(case.tokens)), np.bool_) for case in cases]
    untouched = reference.layer_outputs([case.tokens for case in cases], nowhere)
    return [np.concatenate([first[:1], later]) for first, later in zip(untouched, after, strict=True)]


def _kept_runs(case: Case, layers: int) -> BoolArray:
    """Which tokens run in which layer: bool [layers, length]."""
    (_, first), *later = case.prompted
    return unified_skip_runs(first, len(case.tokens), case.depth.keep, layers, segments=later)


__all__ = [
    "Answer",
    "Case",
    "KeptOracle",
    "Oracle",
    "RadialOracle",
    "RoutedOracle",
    "RowPaths",
    "RowRoutes",
]
