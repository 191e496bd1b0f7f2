"""The routers' decisions about the tokens of one row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference.hugging_face import BoolArray, FloatArray
from dynexport.runtime.execution.decisions import TURNED_AWAY

IntArray = NDArray[np.int64]

GONE = -1


@dataclass
class RowRoutes:
    """The tokens of a row that ran in each routed layer.

    Attributes:
        chosen: bool [routed layers, tokens], True for a token that ran.
        score: float32 [routed layers, tokens], the router's score r.
        margin: float32 [routed layers, tokens], |sigmoid(logit) - threshold|; for tokens routed by top-k, the distance
            of r to the nearest score with the other decision, infinite where all tokens are chosen.
        overflow: int64 [routed layers], number of chosen tokens that found the cache full.
    """

    chosen: BoolArray
    score: FloatArray
    margin: FloatArray
    overflow: IntArray

    @property
    def decisions(self) -> BoolArray:
        """Return the decision of each routed layer and token."""
        return self.chosen

    @property
    def runs(self) -> int:
        """Return the number of pairs (routed layer, token) that ran."""
        return int(self.chosen.sum())


@dataclass
class RowPaths:
    """The Radial paths of the tokens of a row.

    Attributes:
        path: int64 [max_steps, tokens], the layer chosen at each hop; the number of layers stands for the exit, and -1
            for a hop without a choice. In the single graph of an engine, also ``TURNED_AWAY``: the layer was full and
            the token did not run.
        score: float32 [max_steps, tokens], the score of the choice; 0 where there was none.
        margin: float32 [max_steps, tokens], the best allowed score minus the second; infinite with fewer than two.
        probability: float32 [max_steps, tokens], the probability of the choice among the allowed ones; 0 where there
            was none.
        depth: int64 [tokens], number of layers that ran.
    """

    path: IntArray
    score: FloatArray
    margin: FloatArray
    probability: FloatArray
    depth: IntArray

    @property
    def decisions(self) -> IntArray:
        """Return the decision of each hop and token."""
        return self.path

    @property
    def runs(self) -> int:
        """Return the number of layer runs, over all tokens."""
        return int(self.depth.sum())

    @property
    def overflow(self) -> IntArray:
        """Return the number of hops that found the layer full, int64 [1]."""
        return np.array([(self.path == TURNED_AWAY).sum()])

    @classmethod
    def empty(cls, steps: int, tokens: int) -> RowPaths:
        """Return the state before the first hop: no choices, depth 0."""
        zeros = np.zeros((steps, tokens), np.float32)
        return cls(
            path=np.full((steps, tokens), GONE, np.int64),
            score=zeros,
            margin=np.full_like(zeros, np.inf),
            probability=zeros.copy(),
            depth=np.zeros(tokens, np.int64),
        )


__all__ = ["GONE", "IntArray", "RowPaths", "RowRoutes"]
