"""What the library refuses, each in one line that names what was expected and what was found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from conftest import LIBRARY
from product_models import BlockCase, HalfCase, model

from dynexport.plugins.cpu_library import CpuLibrary, find_library

Run = Callable[..., np.ndarray]


@pytest.fixture
def case() -> BlockCase:
    return BlockCase.drawn(np.random.default_rng(1), rows=20, blocks=3, size=32, bits=4)


def changed(made: bytes, name: str, value: int) -> bytes:
    whole = onnx.load_from_string(made)
    for attribute in next(node for node in whole.graph.node if node.domain == "dynexport").attribute:
        if attribute.name == name:
            attribute.i = value
    return whole.SerializeToString()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("N", 0, "N: expected 1.."),
        ("N", -5, "N: expected 1.."),
        ("N", 33, r"quantized: expected uint8 \[3, blocks"),
        ("N", 1 << 39, "quantized: expected uint8"),
        ("bits", 5, "bits: expected 4 or 8, found 5"),
        ("bits", 2, r"bits: expected 4..8, found 2"),
        ("zero", 256, r"zero: expected 0..255, found 256"),
        ("zero", -1, r"zero: expected 0..255, found -1"),
    ],
)
@pytest.mark.parametrize("call", ["block_matmul", "block_gather"])
def test_attributes(run: Run, case: BlockCase, call: str, name: str, value: int, said: str) -> None:
    x = np.zeros((2, 96), np.float32) if call == "block_matmul" else np.zeros(2, np.int64)
    with pytest.raises(Exception, match=said):
        run(changed(model(call, case, x.shape), name, value), x)


@pytest.mark.parametrize("columns", [95, 97, 0, 32])
def test_columns_that_are_no_whole_blocks(run: Run, case: BlockCase, columns: int) -> None:
    with pytest.raises(Exception, match=rf"x: expected float32 \[.., 96\], found \[2, {columns}\]"):
        run(model("block_matmul", case, (2, columns)), np.zeros((2, columns), np.float32))


@pytest.mark.parametrize(
    ("part", "made", "said"),
    [
        (0, np.zeros((2, 3, 4, 16, 8), np.uint8), "quantized: expected uint8"),
        (0, np.zeros((2, 0, 4, 16, 4), np.uint8), "quantized: expected uint8"),
        (0, np.zeros((2, 3, 4, 64), np.uint8), "quantized: expected uint8"),
        (1, np.zeros((2, 2, 16), np.float32), r"scales: expected float32 or float16 \[2, 3, 16\], found \[2, 2, 16\]"),
        (1, np.zeros((2, 3, 16), np.float64), "scales: expected float32 or float16"),
        (2, np.zeros((2, 3, 1), np.float32), "minima: expected the type of scales"),
        (2, np.ones((1, 1, 1), np.float32), "minima: expected the type of scales, and .*, or one zero"),
        (2, np.zeros((2, 3, 16), np.float16), "minima: expected the type of scales"),
    ],
)
def test_parts(run: Run, part: int, made: np.ndarray, said: str) -> None:
    case = BlockCase.drawn(np.random.default_rng(1), rows=20, blocks=3, size=32, bits=4, dtype=np.float32)
    parts = case.parts()
    parts[part] = made

    class Other(BlockCase):
        def parts(self) -> list[np.ndarray]:
            return parts

    other = Other(case.q, case.scale, case.minimum, case.bits, case.zero)
    with pytest.raises(Exception, match=said):
        run(model("block_matmul", other, (2, 96)), np.zeros((2, 96), np.float32))


@pytest.mark.parametrize("kind", [BlockCase, HalfCase])
@pytest.mark.parametrize("index", [20, -21, 1 << 62, -(1 << 63)])
def test_indices_outside(run: Run, kind: type, index: int) -> None:
    case = BlockCase.drawn(np.random.default_rng(1), rows=20) if kind is BlockCase else HalfCase(np.ones((20, 4), "f2"))
    call = "block_gather" if kind is BlockCase else "half_gather"
    with pytest.raises(Exception, match=rf"indices: expected -20..19, found {index}"):
        run(model(call, case, (2,)), np.array([0, index]))


def test_half_matrices(run: Run) -> None:
    class Odd(HalfCase):
        def parts(self) -> list[np.ndarray]:
            return [np.zeros((1, 3, 16, 1), np.float16)]

    class Single(HalfCase):
        def parts(self) -> list[np.ndarray]:
            return [np.zeros((1, 4, 16, 1), np.float32)]

    for case in (Odd(np.zeros((5, 3), "f2")), Single(np.zeros((5, 4), "f2"))):
        with pytest.raises(Exception, match=r"weights: expected bfloat16 \[1, K / 2, 16, 2\], or float16"):
            run(model("half_matmul", case, (2, case.columns)), np.zeros((2, case.columns), np.float32))


def test_kernels_that_do_not_run_here(monkeypatch: pytest.MonkeyPatch, run: Run, case: BlockCase) -> None:
    monkeypatch.setenv("DYNEXPORT_CPU_KERNELS", "avx1024")
    with pytest.raises(Exception, match="DYNEXPORT_CPU_KERNELS: expected avx512-bf16, avx512-vnni, avx2 or portable"):
        run(model("block_matmul", case, (2, 96)), np.zeros((2, 96), np.float32))


def test_library_is_found() -> None:
    found = find_library()
    assert isinstance(found, CpuLibrary)
    assert found.path == LIBRARY and found.version == "0.1.0"
    assert found.kernels in ("avx512-bf16", "avx512-vnni", "avx2", "portable")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "turned off by DYNEXPORT_CPU_OPERATORS"),
        ("/nowhere", "expected a file at /nowhere"),
        (__file__, "expected"),
    ],
)
def test_library_is_not_found(value: str, said: str) -> None:
    program = "from dynexport.plugins.cpu_library import find_library; print(find_library())"
    environment = os.environ | {"DYNEXPORT_CPU_OPERATORS": value}
    made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said in made.stdout and made.stdout.count("\n") == 1
