"""The kernels of every instruction set against numpy, over random shapes and kinds of matrices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from conftest import session_options
from product_models import BlockCase, HalfCase, model, rounded

Run = Callable[..., np.ndarray]
# Tiles have 16, 12, 8, or 1 to 7 rows.
LEADS = [(), (1,), (2,), (3,), (2, 5), (6,), (31,), (0, 4), (1, 4), (7,), (21,), (40,)]
SEEDS = range(12)
EACH = 30  # cases for each seed: a thousand in all for every operator


def drawn_input(random: np.random.Generator, lead: tuple[int, ...], columns: int) -> np.ndarray:
    x = random.normal(size=(*lead, columns)) * np.exp(random.normal(size=(*lead, 1)) * 3)
    x[random.random(x.shape) < 0.1] = 0
    if random.random() < 0.2:
        x[..., :16] = 0  # a block of zeros
    return x.astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_matmul(run: Run, kernels: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(EACH):
        case = BlockCase.drawn(random)
        x = drawn_input(random, LEADS[i % len(LEADS)], case.columns)
        found = run(model("block_matmul", case, x.shape, constant=i % 3 > 0), x, **inputs(case, i % 3 == 0))
        assert found.dtype == np.float32 and found.shape == (*x.shape[:-1], len(case.q))
        size, weight = case.q.shape[2], case.weight()
        # The sum's own rounding, in proportion to what is added.
        added = np.abs(rounded(x, size)) @ (np.abs(weight) + 2 * case.zero * spread(case)).T
        np.testing.assert_array_less(np.abs(found - rounded(x, size) @ weight.T), 1e-5 * added + 1e-12)
        # And by the meaning of the operator: no value of x is moved by more than half a step of its block.
        step = np.abs(x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // size, size)).max(axis=-1) / 127
        moved = np.repeat(step, size, axis=-1) * 0.5001 @ np.abs(weight).T
        np.testing.assert_array_less(np.abs(found - x.astype(np.float64) @ weight.T), moved + 1e-5 * added + 1e-12)


def spread(case: BlockCase) -> np.ndarray:
    return np.repeat(np.abs(case.scale.astype(np.float64)), case.q.shape[2], axis=1)


def inputs(case: BlockCase | HalfCase, given: bool) -> dict[str, np.ndarray]:
    return {f"part{i}": part for i, part in enumerate(case.parts())} if given else {}


@pytest.mark.parametrize("seed", SEEDS)
def test_half_matmul(run: Run, kernels: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(EACH):
        case = HalfCase.drawn(random)
        x = drawn_input(random, LEADS[i % len(LEADS)], case.columns)
        found = run(model("half_matmul", case, x.shape), x)
        if kernels == "avx512-bf16" and case.values.dtype == ml_dtypes.bfloat16:
            x = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # as this processor's instruction needs it
        added = np.abs(x.astype(np.float64)) @ np.abs(case.weight()).T
        np.testing.assert_array_less(np.abs(found - x.astype(np.float64) @ case.weight().T), 2e-6 * added + 1e-12)


@pytest.mark.parametrize("kind", [BlockCase, HalfCase])
@pytest.mark.parametrize("seed", SEEDS)
def test_gather(run: Run, kernels: str, kind: type, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(EACH):
        case = kind.drawn(random)
        rows = len(case.weight())
        indices = random.integers(-rows, rows, LEADS[i % len(LEADS)])
        found = run(model("block_gather" if kind is BlockCase else "half_gather", case, indices.shape), indices)
        np.testing.assert_allclose(found, case.weight()[indices], rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("call", ["block", "half"])
def test_kernel_and_body_agree(run: Run, kernels: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    case = BlockCase.drawn(random, rows=70, blocks=8) if call == "block" else HalfCase.drawn(random)
    x = random.normal(size=(9, case.columns)).astype(np.float32)
    made = model(f"{call}_matmul", case, x.shape)
    body = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    kernel = run(made, x)
    assert np.linalg.norm(kernel - body) < 0.02 * np.linalg.norm(body)
    assert call == "half" or not np.array_equal(kernel, body)  # the kernel rounds x, so it did run


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("call", ["block", "half"])
def test_what_is_not_finite_stays_in_its_row(run: Run, kernels: str, call: str, bad: float) -> None:
    random = np.random.default_rng(6)
    case = BlockCase.drawn(random) if call == "block" else HalfCase.drawn(random)
    for rows in (1, 2, 21):
        x = random.normal(size=(rows, case.columns)).astype(np.float32)
        good = run(model(f"{call}_matmul", case, x.shape), x)
        x[0, case.columns // 2] = bad
        found = run(model(f"{call}_matmul", case, x.shape), x)
        assert not np.isfinite(found[0]).any()
        np.testing.assert_array_equal(found[1:], good[1:])


def test_rows_do_not_depend_on_their_neighbours(run: Run, kernels: str) -> None:
    case = BlockCase.drawn(np.random.default_rng(7), rows=50)
    x = np.random.default_rng(8).normal(size=(300, case.columns)).astype(np.float32)
    together = run(model("block_matmul", case, x.shape), x)
    for r in (0, 15, 16, 255, 256, 299):
        alone = run(model("block_matmul", case, (1, case.columns)), x[r : r + 1])
        np.testing.assert_allclose(together[r], alone[0], rtol=1e-6, atol=1e-4)


def test_threads_and_calls_at_once(kernels: str) -> None:
    random = np.random.default_rng(9)
    case = BlockCase.drawn(random, rows=1000, blocks=8, size=32)
    made = model("block_matmul", case, (33, case.columns))
    one = onnxruntime.InferenceSession(made, session_options(1))
    two = onnxruntime.InferenceSession(made, session_options(2))
    xs = [random.normal(size=(33, case.columns)).astype(np.float32) for _ in range(8)]
    wanted = [one.run(None, {"x": x})[0] for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(lambda x: two.run(None, {"x": x})[0], xs), wanted, strict=True):
                np.testing.assert_array_equal(found, right)


def test_every_kernel_rounds_alike(run: Run, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BlockCase.drawn(np.random.default_rng(10), bits=8, size=32, rows=40, blocks=1)
    x = np.random.default_rng(11).normal(size=(5, 32)).astype(np.float32)
    own = run(model("block_matmul", case, x.shape), x)
    monkeypatch.setenv("DYNEXPORT_CPU_KERNELS", "portable")
    np.testing.assert_allclose(own, run(model("block_matmul", case, x.shape), x), rtol=1e-5, atol=1e-4)
