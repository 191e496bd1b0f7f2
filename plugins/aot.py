"""Register the operators as ahead-of-time plugins (``tensorrt.plugin``), whose PTX is stored in the engine.

Such an engine runs without a plugin library. TensorRT-RTX 1.7 has no such module. This module follows TensorRT's
documentation and has not been run yet.
"""

from __future__ import annotations

import importlib
from functools import reduce
from inspect import Parameter, Signature
from operator import mul
from pathlib import Path
from typing import Any

from dynexport.plugins.kernels import LAUNCHES, dtype_of
from dynexport.plugins.operators import OPERATORS
from dynexport.plugins.schema import DOMAIN, TENSORRT_TYPES, Operator, T
from dynexport.runtime.bundle.errors import DynexportError


def register(trt: Any, ptx: Path) -> None:
    """Register all operators; use it instead of ``creators.register``, and call ``creators.allow_in_place`` as well.

    Args:
        trt: the module ``tensorrt``.
        ptx: the file written by ``kernels.compile_ptx``.

    Raises:
        DynexportError: when the module does not support ahead-of-time plugins.
    """
    try:
        quick = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise DynexportError(
            f"{trt.__name__} has no ahead-of-time plugins ({error}): use dynexport.plugins.creators.register"
        ) from error
    source = ptx.read_bytes()
    for operator in OPERATORS:
        _register(trt, quick, operator, source)


def _register(trt: Any, quick: Any, operator: Operator, ptx: bytes) -> None:
    dtypes: dict[Any, Any] = {getattr(trt, native): dtype for dtype, native in TENSORRT_TYPES.items()}
    launch, count = LAUNCHES[operator.name], len(operator.inputs)

    def describe(*inputs: Any) -> Any:
        generic = next((desc.dtype for desc, t in zip(inputs, operator.inputs, strict=True) if t.dtype == T), None)
        outputs = []
        for tensor in operator.outputs:
            shape = tuple(inputs[place].shape_expr[axis] for place, axis in map(operator.source, tensor.dims))
            dtype = generic if tensor.dtype == T else getattr(trt, TENSORRT_TYPES[tensor.dtype])
            outputs.append(quick.from_shape_expr(shape, dtype))
        return inputs[0].aliased() if operator.in_place else tuple(outputs)

    def implement(*arguments: Any, **_: Any) -> Any:
        inputs = arguments[:count]
        sizes = {
            letter: desc.shape_expr[axis]
            for desc, tensor in zip(inputs, operator.inputs, strict=True)
            for axis, letter in enumerate(tensor.dims)
        }
        tiles = (quick.cdiv(sizes[c], launch.tile[c]) if c in launch.tile else sizes[c] for c in launch.grid)
        params = quick.KernelLaunchParams()
        params.grid_x, params.block_x, params.shared_mem = reduce(mul, tiles), launch.threads, 0
        extra = quick.SymIntExprs(len(launch.sizes))
        for i, letter in enumerate(launch.sizes):
            extra[i] = quick.SymInt32(sizes[letter])
        name = launch.name(dtype_of(operator, [dtypes[desc.dtype] for desc in inputs]))
        return name.encode(), ptx, params, extra

    # TensorRT reads the names and types of tensors from the functions' signatures.
    desc = quick.TensorDesc
    named = [Parameter(tensor.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=desc) for tensor in operator.inputs]
    rest = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("outputs", "tactic")]
    returned = desc if operator.in_place else tuple[(desc,) * len(operator.outputs)]  # type: ignore[misc]
    for function, parameters, annotation in ((describe, named, returned), (implement, named + rest, Parameter.empty)):
        function.__signature__ = Signature(parameters, return_annotation=annotation)  # type: ignore[attr-defined]
    plugin_id = f"{DOMAIN}::{operator.name}"
    quick.register(plugin_id)(describe)
    quick.aot_impl(plugin_id)(implement)


__all__ = ["register"]
