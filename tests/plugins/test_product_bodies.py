"""The bodies of the CPU operators, run by ONNX Runtime without a library, against plain numpy."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from product_models import BlockCase, HalfCase, model

CASES = {"block": BlockCase, "half": HalfCase}


def run(made: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("seed", range(40))
def test_product_is_that_of_the_dequantised_matrix(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    case = CASES[kind].drawn(random)
    lead = [(), (1,), (3,), (2, 5), (0, 4)][seed % 5]
    x = random.normal(size=(*lead, case.columns)).astype(np.float32)
    found = run(model(f"{kind}_matmul", case, x.shape), x)
    np.testing.assert_allclose(found, x @ case.weight().T, rtol=1e-4, atol=1e-2 if kind == "block" else 1e-4)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_the_dequantised_matrix(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    case = CASES[kind].drawn(random)
    rows = len(case.weight())
    indices = random.integers(-rows, rows, [(), (4,), (2, 3), (0,)][seed % 4])
    found = run(model(f"{kind}_gather", case, indices.shape), indices)
    np.testing.assert_allclose(found, case.weight()[indices], rtol=1e-6, atol=1e-5)
