"""CachedAttention of every instruction set, and its body, against numpy over a thousand random calls each."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from attention_models import AttentionCase, attention_model, expected
from conftest import session_options

SEEDS = range(12)
EACH = 85
BODY = range(4)


def ran(case: AttentionCase, options: onnxruntime.SessionOptions | None, *, shared: bool = False) -> list[np.ndarray]:
    """Run one call; with ``shared``, the caches' outputs are their inputs."""
    session = onnxruntime.InferenceSession(attention_model(case), options, providers=["CPUExecutionProvider"])
    if not shared:
        return session.run(None, case.inputs)
    bound, values = session.io_binding(), {}
    given = {name: array.copy() for name, array in case.inputs.items()}  # an OrtValue keeps no reference to its memory
    for name, array in given.items():
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        bound.bind_ortvalue_input(name, values[name])
    for name in ("key", "value"):
        bound.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
    bound.bind_output("output", "cpu")
    session.run_with_iobinding(bound)
    return [bound.get_outputs()[-1].numpy(), given["past_key"], given["past_value"]]


def compare(case: AttentionCase, found: list[np.ndarray]) -> None:
    output, *present = expected(case)
    np.testing.assert_allclose(found[0], output, rtol=0, atol=(case.inputs["past_key"].dtype == np.int8) * 3e-2 + 3e-4)
    for cache, wanted in zip(found[1:], present, strict=True):
        assert cache.dtype == wanted.dtype
        if cache.dtype == np.int8:  # a tie may be rounded otherwise, as scores are of float32
            assert np.abs(cache.astype(int) - wanted).max() <= 1 and (cache != wanted).mean() < 1e-3
        else:
            rtol = 1e-3 if cache.dtype == np.float16 else 1e-6
            np.testing.assert_allclose(cache, wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("seed", SEEDS)
def test_kernel(kernels: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(EACH):
        case = AttentionCase.drawn(random)
        compare(case, ran(case, session_options(1 + i % 2), shared=i % 3 > 0))


@pytest.mark.parametrize("seed", BODY)
def test_body(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(EACH):
        case = AttentionCase.drawn(random)
        compare(case, ran(case, None))
