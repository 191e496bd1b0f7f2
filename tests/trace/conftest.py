"""Traces to draw, made up: what matters here is how they look, not where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dynexport.exporter.trace import Depth, RoutedLayer, Token, Trace
from dynexport.runtime.execution.routes import RowLog

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
        depth = Depth(
            tokens=count,
            layers=layers,
            layers_per_token=float(ran.sum() / count),
            routed=tuple(RoutedLayer(layer=i, rate=float(ran[i].mean()), overflow=2) for i in routed),
        )
        log = RowLog([ran], [scores], [np.abs(scores - 0.5)]) if routed else RowLog([ran])
        return Trace.from_log(log, tokens, depth, strategy="mod" if routed else "dense", speedup="dense")

    return make


@pytest.fixture
def path_trace() -> Trace:
    """Three tokens of which one turns back, one stays in its layer, and one leaves at once."""
    path = np.array([[2, 1, 3], [0, 1, -1], [3, 1, -1]])
    ran = np.array([[layer in column for column in path.T] for layer in range(3)])
    zeros = np.zeros(path.shape, np.float32)
    tokens = [Token(id=i, text=" word", is_prompt=i < 2) for i in range(3)]
    depth = Depth(tokens=3, layers=3, layers_per_token=5 / 3, routed=())
    log = RowLog([ran], [zeros], [zeros], [path])
    return Trace.from_log(log, tokens, depth, strategy="radial", speedup="dense")
