"""What routers decided about the tokens of one row."""

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
    """Which tokens of a row ran in each routed layer.

    Attributes:
        chosen: bool [routed layers, tokens], which tokens ran.
        score: float32 [routed layers, tokens], the router's r.
        margin: float32 [routed layers, tokens], |sigmoid(logit) - threshold|; for tokens that top-k decides, the
            distance of r to the other side, infinite where all are chosen.
        overflow: int64 [routed layers], tokens that were chosen and found the cache full.
    """

    chosen: BoolArray
    score: FloatArray
    margin: FloatArray
    overflow: IntArray

    @property
    def decisions(self) -> BoolArray:
        """What was decided, for each routed layer and token."""
        return self.chosen

    @property
    def runs(self) -> int:
        """How often a token ran in a routed layer."""
        return int(self.chosen.sum())


@dataclass
class RowPaths:
    """Which layers the tokens of a row went through.

    Where a token had left before, or had nothing left to choose, ``path`` is -1.

    Attributes:
        path: int64 [max_steps, tokens], the chosen layer of each step; as many as there are layers: exit. Of an
            engine's single graph also ``TURNED_AWAY``, where the layer was full and the token did not run.
        score: float32 [max_steps, tokens], of the choice; 0 where there was none.
        margin: float32 [max_steps, tokens], the best allowed score minus the second; infinite where there were not two.
        probability: float32 [max_steps, tokens], of the choice among the allowed ones; 0 where there was none.
        depth: int64 [tokens], layers that ran.
    """

    path: IntArray
    score: FloatArray
    margin: FloatArray
    probability: FloatArray
    depth: IntArray

    @property
    def decisions(self) -> IntArray:
        """What was decided, for each step and token."""
        return self.path

    @property
    def runs(self) -> int:
        """How often a token ran in a layer."""
        return int(self.depth.sum())

    @property
    def overflow(self) -> IntArray:
        """How often a full layer turned a token away, int64 [1]."""
        return np.array([(self.path == TURNED_AWAY).sum()])

    @classmethod
    def empty(cls, steps: int, tokens: int) -> RowPaths:
        """Nobody has chosen anything."""
        zeros = np.zeros((steps, tokens), np.float32)
        return cls(
            path=np.full((steps, tokens), GONE, np.int64),
            score=zeros,
            margin=np.full_like(zeros, np.inf),
            probability=zeros.copy(),
            depth=np.zeros(tokens, np.int64),
        )


__all__ = ["GONE", "IntArray", "RowPaths", "RowRoutes"]
