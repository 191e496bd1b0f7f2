"""What the ahead-of-time form tells ``tensorrt.plugin``, held to a stand-in for it: TensorRT itself is not needed."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from operator_models import BY_NAME

from dynexport.plugins import aot
from dynexport.plugins.schema import TENSORRT_TYPES, T
from dynexport.runtime.bundle.errors import DynexportError

SIZES = {"B": 3, "S": 1_500, "H": 300, "K": 37, "h": 2, "M": 50, "D": 130, "L": 3, "J": 21, "N": 5}
BLOCKS = {"CapacityTopK": 3, "GatedScatterAdd": 3 * 37, "RaggedKVAppend": 3 * 2 * 37, "SelectedMatMul": 5 * 3}
ARGUMENTS = {
    "CapacityTopK": [1_500, 37],
    "GatedScatterAdd": [1_500, 300, 37],
    "RaggedKVAppend": [2, 50, 37, 130],
    "SelectedMatMul": [3, 21, 37],
}


class TensorDesc:
    def __init__(self, shape_expr: tuple[int, ...], dtype: str, aliases: bool = False) -> None:
        self.shape_expr, self.dtype, self.aliases = shape_expr, dtype, aliases

    def aliased(self) -> TensorDesc:
        return TensorDesc(self.shape_expr, self.dtype, aliases=True)


class Registry(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.described: dict[str, Callable[..., Any]] = {}
        self.implemented: dict[str, Callable[..., Any]] = {}
        self.TensorDesc, self.KernelLaunchParams, self.SymInt32 = TensorDesc, SimpleNamespace, int
        self.from_shape_expr, self.SymIntExprs = TensorDesc, lambda count: [None] * count

    def cdiv(self, first: int, second: int) -> int:
        return -(-first // second)

    def register(self, plugin_id: str) -> Callable[..., None]:
        return lambda function: self.described.__setitem__(plugin_id, function)

    def aot_impl(self, plugin_id: str) -> Callable[..., None]:
        return lambda function: self.implemented.__setitem__(plugin_id, function)


@pytest.fixture()
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    trt = ModuleType("stand_in")
    for native in TENSORRT_TYPES.values():
        setattr(trt, native, native)
    made = Registry("stand_in.plugin")
    monkeypatch.setitem(sys.modules, "stand_in", trt)
    monkeypatch.setitem(sys.modules, "stand_in.plugin", made)
    (tmp_path / "kernels.ptx").write_bytes(b"ptx")
    aot.register(trt, tmp_path / "kernels.ptx")
    return made


@pytest.mark.parametrize("name", BY_NAME)
def test_what_it_says_of_an_operator(registry: Registry, name: str) -> None:
    operator = BY_NAME[name]
    describe, implement = (part[f"dynexport::{name}"] for part in (registry.described, registry.implemented))
    names = [tensor.name for tensor in operator.inputs]
    assert list(inspect.signature(describe).parameters) == names
    assert list(inspect.signature(implement).parameters) == [*names, "outputs", "tactic"]
    returned = inspect.signature(describe).return_annotation
    assert len(typing.get_args(returned) or [returned]) == len(operator.outputs)

    def desc(dims: str, dtype: Any) -> TensorDesc:
        native = "float16" if dtype == T else TENSORRT_TYPES[dtype]
        return TensorDesc(tuple(SIZES[letter] for letter in dims), native)

    inputs = [desc(tensor.dims, tensor.dtype) for tensor in operator.inputs]
    outputs = describe(*inputs)
    outputs = (outputs,) if isinstance(outputs, TensorDesc) else outputs
    wanted = [desc(tensor.dims, tensor.dtype) for tensor in operator.outputs]
    assert [(o.shape_expr, o.dtype) for o in outputs] == [(o.shape_expr, o.dtype) for o in wanted]
    assert outputs[0].aliases == operator.in_place
    kernel, ptx, params, extra = implement(*inputs, outputs=outputs, tactic=0)
    assert (params.grid_x, extra, ptx) == (BLOCKS[name], ARGUMENTS[name], b"ptx")
    assert kernel.endswith(b"_float16" if name != "CapacityTopK" else b"_k")


def test_a_module_without_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=r"json has no ahead-of-time plugins .*creators\.register"):
        aot.register(sys.modules["json"], tmp_path / "kernels.ptx")
