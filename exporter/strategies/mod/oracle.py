"""Run a Mixture-of-Depths model in PyTorch for verification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.exporter.reference.hugging_face import FloatArray, Reference
from dynexport.exporter.reference.oracle import Answer, Case, Oracle, forced_decisions, with_embedding
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.runtime.bundle.contract import Mod


class RoutedOracle(Oracle):
    """The PyTorch reference of a Mixture-of-Depths bundle."""

    def __init__(self, weights: Weights, contract: Mod, max_length: int) -> None:
        self.loaded_by = weights.loaded_by
        self._routed = ModReference(weights, contract, max_length)
        self._unrouted = Reference(weights, weights.source)

    def answers(self, cases: Sequence[Case], *, at: Sequence[int] = ()) -> list[Answer]:
        tokens, prompted = [case.tokens for case in cases], [case.prompted for case in cases]
        logits, routes = self._routed.routed_logits(tokens, prompted, forced_decisions(cases, np.bool_), at=at)
        return [Answer(values, row) for values, row in zip(logits, routes, strict=True)]

    def hidden_states(self, cases: Sequence[Case]) -> list[FloatArray]:
        tokens, prompted = [case.tokens for case in cases], [case.prompted for case in cases]
        after, _ = self._routed.routed_layer_outputs(tokens, prompted, forced_decisions(cases, np.bool_))
        return with_embedding(self._unrouted, cases, after)


__all__ = ["RoutedOracle"]
