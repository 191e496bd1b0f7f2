"""The floor of a decode step: the arithmetic of bytes."""

from __future__ import annotations

import pytest

from dynexport.runtime import Bundle
from dynexport.runtime.measure.cost import ideal_speedup, step_bytes


def test_weights_are_read_once_and_caches_once_a_row(bundle: Bundle) -> None:
    cost = bundle.manifest.cost
    assert step_bytes(bundle.manifest, [], 100) == cost.shared
    assert step_bytes(bundle.manifest, [1, 3], 0) == cost.shared + cost.layers[1] + cost.layers[3]
    grown = step_bytes(bundle.manifest, [1, 3], 10, rows=4) - step_bytes(bundle.manifest, [1, 3], 0, rows=4)
    assert grown == 4 * 10 * 2 * cost.kv_per_token


def test_a_longer_context_brings_the_ideal_nearer_to_the_ratio_of_layers(bundle: Bundle) -> None:
    ideals = [ideal_speedup(bundle.manifest, (0, 7), context) for context in (0, 100, 10**9)]
    assert ideals == sorted(ideals)
    assert ideals[-1] == pytest.approx(4, rel=1e-3)
    assert ideal_speedup(bundle.manifest, range(8), 50) == 1
