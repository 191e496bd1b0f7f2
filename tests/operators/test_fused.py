"""The operators that join products with norms, gates and sums, against numpy, over random shapes and kinds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import session_options
from product_models import BlockCase, HalfCase, rounded

from dynexport.plugins.fused import FUSED
from dynexport.plugins.graph import add_functions

Array = np.ndarray
Case = BlockCase | HalfCase
SEEDS, EACH = range(6), 20
LEADS = [(), (1,), (2,), (3,), (2, 5), (6,), (1, 31), (0, 4), (300,), (7,), (21,), (4,)]
EPSILON = 1e-3


def drawn(random: np.random.Generator, kind: str, rows: int, columns: int, **fixed: Any) -> Case:
    """A matrix [rows, columns] of a random kind."""
    if kind == "Half":
        dtype = fixed.get("dtype") or (ml_dtypes.bfloat16 if random.random() < 0.5 else np.float16)
        return HalfCase((random.normal(size=(rows, columns)) / columns**0.5).astype(dtype))
    size = fixed.get("size") or (32 if columns % 32 == 0 and random.random() < 0.5 else 16)
    made = BlockCase.drawn(random, rows=rows, blocks=columns // size, size=size)
    minimum = None if made.minimum is None else made.minimum / 4
    scale = made.scale / (1 << made.bits)
    return BlockCase(made.q, scale, minimum, made.bits, fixed.get("zero", made.zero))


@dataclass(frozen=True)
class Layer:
    """The matrices of a call of AfterAttention."""

    kind: str
    norm: Array
    matrices: dict[str, Case]

    @classmethod
    def drawn(cls, random: np.random.Generator, kind: str) -> Layer:
        hidden, inner, width = (16 * int(random.integers(1, 9)) for _ in range(3))
        if kind == "Half":
            inner -= 2 * int(random.integers(0, 8))
        gate = drawn(random, kind, inner, hidden)
        alike: dict[str, Any] = {"dtype": gate.values.dtype} if isinstance(gate, HalfCase) else {}
        if isinstance(gate, BlockCase):
            alike = {"size": gate.q.shape[2], "zero": gate.zero}
        matrices = {
            "o": drawn(random, kind, hidden, width),
            "gate": gate,
            "up": drawn(random, kind, inner, hidden, **alike),
            "down": drawn(random, kind, hidden, inner),
        }
        return cls(kind, random.normal(size=hidden).astype(np.float32), matrices)

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of a call."""
        found = {"hidden": len(self.norm), "inner": len(self.matrices["gate"].weight())}
        for name, case in self.matrices.items():
            found |= {f"{name}_{key}": value for key, value in case.attributes().items() if key != "rows"}
        return found

    def inputs(self, random: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Array]:
        """Random inputs of a call."""
        shapes = {"attention": self.matrices["o"].columns, "residual": len(self.norm)}
        return {name: random.normal(size=(*lead, size)).astype(np.float32) for name, size in shapes.items()}

    def model(self, lead: tuple[int, ...]) -> bytes:
        """A model of one call."""
        parts = [("norm", self.norm)]
        parts += [(f"{name}{i}", part) for name, c in self.matrices.items() for i, part in enumerate(c.parts())]
        shapes = {"attention": (*lead, self.matrices["o"].columns), "residual": (*lead, len(self.norm))}
        return model(f"{self.kind}AfterAttention", shapes, parts, self.attributes)

    def means(self, inputs: dict[str, Array], kernels: str) -> Array:
        """The result in float64, with rows rounded as the kernels round them."""

        def times(x: Array, name: str) -> Array:
            return as_read(x, self.matrices[name], kernels) @ self.matrices[name].weight().T

        added = inputs["residual"].astype(np.float64) + times(inputs["attention"], "o")
        normed = normed_rows(added, self.norm)
        gate = times(normed, "gate")
        return added + times(gate / (1 + np.exp(-gate)) * times(normed, "up"), "down")


def as_read(x: Array, case: Case, kernels: str) -> Array:
    """Rows as the kernel reads them for a matrix, in float64."""
    if isinstance(case, BlockCase):
        return rounded(x, case.q.shape[2])
    if kernels == "avx512-bf16" and case.values.dtype == ml_dtypes.bfloat16:
        x = x.astype(ml_dtypes.bfloat16)
    return x.astype(np.float64)


def normed_rows(x: Array, weight: Array) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON) * weight


def model(
    operator: str, shapes: dict[str, tuple[int, ...]], parts: list[tuple[str, Array]], attributes: dict[str, int]
) -> bytes:
    """A model of one call on float32 inputs, with other inputs as constants."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    inputs = [ir.Value(name=name, type=floats, shape=ir.Shape(shape)) for name, shape in shapes.items()]
    constants = [ir.Value(name=name, const_value=ir.Tensor(part, name=name)) for name, part in parts]
    # The order of the operator: x, norm, ..; or attention, residual, norm, ..
    own = [*(ir.AttrInt64(name, value) for name, value in attributes.items()), ir.AttrFloat32("epsilon", EPSILON)]
    node = ir.Node("dynexport", operator, [*inputs, *constants], own)
    node.outputs[0].name, node.outputs[0].type = "y", floats
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 24}, name="one")
    whole = ir.Model(graph, ir_version=11)
    add_functions(whole)
    return ir.to_proto(whole).SerializeToString()


def ran(made: bytes, inputs: dict[str, Array], threads: int = 1, *, library: bool = True) -> Array:
    options = session_options(threads) if library else onnxruntime.SessionOptions()
    found: Array = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    return found


def assert_near(found: Array, expected: Array, share: float) -> None:
    """The kernel may round single values of a block to the other neighbour, but not many."""
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= share * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["Block", "Half"])
@pytest.mark.parametrize("seed", SEEDS)
def test_norm_matmul(kernels: str, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(EACH):
        case = drawn(random, kind, int(random.integers(1, 70)), 16 * int(random.integers(1, 9)))
        norm = random.normal(size=case.columns).astype(np.float32)
        x = random.normal(size=(*LEADS[i % len(LEADS)], case.columns)).astype(np.float32) * 3
        parts = [("norm", norm), *((f"part{j}", part) for j, part in enumerate(case.parts()))]
        attributes = {"N" if name == "rows" else name: value for name, value in case.attributes().items()}
        found = ran(model(f"{kind}NormMatMul", {"x": x.shape}, parts, attributes), {"x": x}, 1 + i % 2)
        expected = as_read(normed_rows(x, norm).astype(np.float32), case, kernels) @ case.weight().T
        assert_near(found, expected, 2e-3)


@pytest.mark.parametrize("kind", ["Block", "Half"])
@pytest.mark.parametrize("seed", SEEDS)
def test_after_attention(kernels: str, kind: str, seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    for i in range(EACH):
        lead = LEADS[i % len(LEADS)]
        layer = Layer.drawn(random, kind)
        inputs = layer.inputs(random, lead)
        found = ran(layer.model(lead), inputs, 1 + i % 2)
        assert_near(found, layer.means(inputs, kernels), 4e-3)


@pytest.mark.parametrize("kind", ["Block", "Half"])
def test_kernel_and_body_agree(kernels: str, kind: str) -> None:
    random = np.random.default_rng(3)
    for _ in range(5):
        layer = Layer.drawn(random, kind)
        made, inputs = layer.model((9,)), layer.inputs(random, (9,))
        body = ran(made, inputs, library=False)
        assert_near(body, layer.means(inputs, "body") if kind == "Half" else body, 1e-5)
        kernel = ran(made, inputs)
        assert_near(kernel, body, 0.03)
        assert kind == "Half" or not np.array_equal(kernel, body)  # the kernel rounds, so it did run


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Block", "Half"])
@pytest.mark.parametrize("name", ["attention", "residual"])
def test_what_is_not_finite_stays_in_its_row(kernels: str, kind: str, name: str, bad: float) -> None:
    random = np.random.default_rng(6)
    layer = Layer.drawn(random, kind)
    for rows in (1, 2, 21):
        made, inputs = layer.model((rows,)), layer.inputs(random, (rows,))
        good = ran(made, inputs)
        inputs[name][0, 1] = bad
        found = ran(made, inputs)
        assert not np.isfinite(found[0]).any()
        np.testing.assert_array_equal(found[1:], good[1:])


@pytest.mark.parametrize("kind", ["Block", "Half"])
def test_large_gates_do_not_overflow(kernels: str, kind: str) -> None:
    random = np.random.default_rng(7)
    layer = Layer.drawn(random, kind)
    large = Layer(kind, layer.norm * 1e4, layer.matrices)
    inputs = large.inputs(random, (5,))
    found = ran(large.model((5,)), inputs)
    assert np.isfinite(found).all()
    with np.errstate(over="ignore"):
        assert_near(found, large.means(inputs, kernels), 4e-3)


@pytest.mark.parametrize("rows", [1, 5, 40, 600])
def test_threads_and_calls_at_once(kernels: str, rows: int) -> None:
    """However many threads come to a call, and whichever: the same numbers."""
    random = np.random.default_rng(9)
    matrices = {
        "o": drawn(random, "Block", 256, 128, size=32),
        "gate": drawn(random, "Block", 320, 256, size=32, zero=3),
        "up": drawn(random, "Block", 320, 256, size=32, zero=3),
        "down": drawn(random, "Block", 256, 320, size=32),
    }
    layer = Layer("Block", random.normal(size=256).astype(np.float32), matrices)
    made, several = layer.model((rows,)), [layer.inputs(random, (rows,)) for _ in range(6)]
    wanted = [ran(made, inputs, 1) for inputs in several]
    for threads in (2, 3, 7):
        session = onnxruntime.InferenceSession(made, session_options(threads))
        run = partial(session.run, None)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                results = (result for (result,) in pool.map(run, several))
                for found, right in zip(results, wanted, strict=True):
                    np.testing.assert_array_equal(found, right)


def refused(layer: Layer, change: Callable[[dict[str, int]], None], rows: tuple[int, int] = (2, 2)) -> str:
    attributes = layer.attributes
    change(attributes)
    parts = [("norm", layer.norm)]
    parts += [(f"{name}{i}", part) for name, c in layer.matrices.items() for i, part in enumerate(c.parts())]
    shapes = {"attention": (rows[0], layer.matrices["o"].columns), "residual": (rows[1], len(layer.norm))}
    inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(Exception) as error:
        ran(model(f"{layer.kind}AfterAttention", shapes, parts, attributes), inputs)
    return str(error.value)


def test_refusals() -> None:
    layer = Layer.drawn(np.random.default_rng(11), "Block")
    hidden, inner = len(layer.norm), len(layer.matrices["gate"].weight())
    assert "hidden: expected 1.." in refused(layer, lambda a: a.update(hidden=0))
    assert "quantized: expected uint8" in refused(layer, lambda a: a.update(hidden=hidden + 16))
    assert "quantized: expected uint8" in refused(layer, lambda a: a.update(inner=inner + 16))
    assert "o_bits: expected 4 or 8, found 5" in refused(layer, lambda a: a.update(o_bits=5))
    assert "up that are alike" in refused(layer, lambda a: a.update(up_zero=(a["up_zero"] + 1) % 256))
    assert "attention: expected 3 rows, found 2" in refused(layer, lambda a: None, (2, 3))
    wide = Layer("Block", np.append(layer.norm, np.float32(1)), layer.matrices)
    assert "expected float32" in refused(wide, lambda a: a.update(hidden=hidden))


def test_all_operators_are_tested() -> None:
    names = {f"{kind}{operator}" for kind in ("Block", "Half") for operator in ("NormMatMul", "AfterAttention")}
    assert {product.name for product in FUSED} == names
