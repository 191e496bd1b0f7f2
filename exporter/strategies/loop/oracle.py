"""Run a looped model in PyTorch for verification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray
from dynexport.exporter.reference.oracle import Answer, Case, Oracle, with_embedding
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.loop.reference import LoopReference
from dynexport.runtime.bundle.contract import Loop


class LoopOracle(Oracle):
    """The PyTorch reference of a looped model: all tokens of a case run the loops of its depth."""

    def __init__(self, weights: Weights, contract: Loop) -> None:
        self.loaded_by = weights.loaded_by
        self._reference = LoopReference(weights, contract)

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        return [Answer(v) for v in self._reference.logits([case.tokens for case in cases], self._runs(cases), at=at)]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        after = self._reference.layer_outputs([case.tokens for case in cases], self._runs(cases))
        return with_embedding(self._reference, cases, after)

    def _runs(self, cases: Sequence[Case]) -> list[BoolArray]:
        runs = [np.zeros((self._reference.layers, len(case.tokens)), np.bool_) for case in cases]
        for there, case in zip(runs, cases, strict=True):
            there[list(case.depth.keep)] = True
        return runs


__all__ = ["LoopOracle"]
