"""Run a Radial Network in PyTorch for verification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dynexport.exporter.reference.hugging_face import FloatArray, Reference
from dynexport.exporter.reference.oracle import Answer, Case, Oracle, forced_decisions, with_embedding
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.exporter.strategies.radial.reference_choices import Room
from dynexport.runtime.bundle.contract import Radial


class RadialOracle(Oracle):
    """The PyTorch reference of a Radial bundle; every case is a row that runs alone.

    Args:
        weights: the checkpoint's weights.
        contract: the bundle's contract.
        layer_capacity: share of a call's tokens that every layer has room for.
        chunk: the largest number of a prompt's tokens in one call; None for any number.
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
        logits, paths = self._routed.routed_logits(
            tokens, forced_decisions(cases, np.int64), at=at, room=self._room(cases)
        )
        return [Answer(values, row) for values, row in zip(logits, paths, strict=True)]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        """Return hidden states after the embedding and every hop, float32 [1 + max_steps, length, hidden] per case."""
        tokens, forced = [case.tokens for case in cases], forced_decisions(cases, np.int64)
        after, _ = self._routed.routed_step_outputs(tokens, forced, room=self._room(cases))
        return with_embedding(self._unrouted, cases, after)

    def _room(self, cases: Sequence[Case]) -> list[list[Room]] | None:
        """Return the layers' room for each chunk of a prompt; None if all tokens have room."""
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


__all__ = ["RadialOracle"]
