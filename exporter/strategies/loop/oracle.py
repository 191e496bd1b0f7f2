"""Run a looped model in PyTorch for verification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray
from dynexport.exporter.reference.oracle import Answer, Case, Oracle, forced_decisions, with_embedding
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.loop.reference import LoopReference
from dynexport.runtime.bundle.contract import Loop


class LoopOracle(Oracle):
    """The PyTorch reference of a looped model: tokens run the loops of the case, or the exit rule decides."""

    def __init__(self, weights: Weights, contract: Loop) -> None:
        self.loaded_by = weights.loaded_by
        self._reference, self._leaves = LoopReference(weights, contract), contract.exit.rule != "none"

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        tokens = [case.tokens for case in cases]
        if not self._leaves:
            return [Answer(values) for values in self._reference.logits(tokens, self._runs(cases), at=at)]
        logits, routes = self._reference.routed_logits(tokens, forced_decisions(cases, np.bool_), at=at)
        return [Answer(values, row) for values, row in zip(logits, routes, strict=True)]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        tokens = [case.tokens for case in cases]
        if self._leaves:
            after = self._reference.routed_layer_outputs(tokens, forced_decisions(cases, np.bool_))
        else:
            after = self._reference.layer_outputs(tokens, self._runs(cases))
        return with_embedding(self._reference, cases, after)

    def _runs(self, cases: Sequence[Case]) -> list[BoolArray]:
        runs = [np.zeros((self._reference.layers, len(case.tokens)), np.bool_) for case in cases]
        for there, case in zip(runs, cases, strict=True):
            there[list(case.depth.keep)] = True
        return runs


__all__ = ["LoopOracle"]
