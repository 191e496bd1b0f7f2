"""Traces to draw, made up: what matters here is how they look, not where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dynexport.exporter.trace import Token, Trace
from dynexport.runtime.bundle.manifest import FULL, LayerRouting, PathRouting
from dynexport.runtime.execution.decisions import Decisions

MakeTrace = Callable[..., Trace]


@pytest.fixture
def make_trace() -> MakeTrace:
    """A trace of random routes."""

    def make(
        layers: int, routed: Sequence[int], prompt: int, new: int, words: Sequence[str | None] = (" word",)
    ) -> Trace:
        random, count = np.random.default_rng(0), prompt + new
        scores = random.normal(size=(len(routed), count)).astype(np.float32)
        ran = np.ones((layers, count), bool)
        ran[list(routed)] = scores > 0.5
        tokens = [Token(id=i, text=words[i % len(words)], is_prompt=i < prompt) for i in range(count)]
        decisions = Decisions(
            ran,
            ran[list(routed)].astype(np.int64),
            scores,
            np.abs(scores - 0.5),
            np.full(len(routed), 2, np.int64),
        )
        routing = LayerRouting(layers=tuple(routed), overflow="residual") if routed else None
        return Trace.of(decisions, routing, tokens, strategy="mod" if routed else "dense", speedup=FULL)

    return make


@pytest.fixture
def path_trace() -> Trace:
    """Three tokens of which one turns back, one stays in its layer, and one leaves at once."""
    path = np.array([[2, 1, 3], [0, 1, -1], [3, 1, -1]])
    ran = np.array([[layer in column for column in path.T] for layer in range(3)])
    zeros = np.zeros(path.shape, np.float32)
    tokens = [Token(id=i, text=" word", is_prompt=i < 2) for i in range(3)]
    decisions = Decisions(ran, path, zeros, zeros, np.zeros(1, np.int64))
    routing = PathRouting(hops=3, min_hops=0, exit=True, reuse=True, places="hops")
    return Trace.of(decisions, routing, tokens, strategy="radial", speedup=FULL)
