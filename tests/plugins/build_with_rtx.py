"""Builds of every operator with TensorRT-RTX, in a process of their own: writes one JSON object.

A process that imported ``tensorrt_rtx`` in another way would be ended by the parser at the first plugin.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder
from operator_models import BY_NAME, model

from dynexport.plugins import creators, graph, rtx
from dynexport.plugins.schema import FLOATS

MOST = {"B": 4, "S": 128, "H": 32, "K": 16, "h": 2, "M": 128, "D": 8, "L": 3, "J": 24, "N": 8, "R": 2, "P": 65_536}
# What a checkpoint fixes.
FIXED = {letter: MOST[letter] for letter in "HhDLJ"}


class Quiet:
    """The last errors of a build."""

    def __init__(self, trt: Any) -> None:
        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    self.errors.append(message)

        self.trt, self.logger = trt, Logger()
        self.builder = trt.Builder(self.logger)

    def build(self, proto: onnx.ModelProto, target: str = "SM80", *, in_place: bool = True) -> dict[str, Any]:
        trt, self.logger.errors[:] = self.trt, []
        network = self.builder.create_network(0)
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(proto.SerializeToString()):
            return {"error": parser.get_error(0).desc(), "plugins": 0}
        config = self.builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
        if in_place:
            creators.allow_in_place(trt, config)
        config.add_optimization_profile(self._profile(proto))
        plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
        engine = self.builder.build_serialized_network(network, config)
        if engine is None:
            return {"error": self.logger.errors[-1], "plugins": plugins}
        return {"bytes": engine.nbytes, "plugins": plugins}

    def _profile(self, proto: onnx.ModelProto) -> Any:
        profile = self.builder.create_optimization_profile()
        for value in proto.graph.input:
            dims = value.type.tensor_type.shape.dim
            least = [dim.dim_value or (8 if dim.dim_param == "P" else 1) for dim in dims]
            most = [dim.dim_value or MOST[dim.dim_param] for dim in dims]
            profile.set_shape(value.name, least, most, most)
        return profile


def main() -> None:
    if sys.argv[1:] == ["too early"]:
        import tensorrt_rtx  # noqa: F401

        rtx.load()
        sys.stdout.write(json.dumps({"problem": rtx.problem()}))
        return
    trt = rtx.load()
    quiet, report = Quiet(trt), {"problem": rtx.problem()}
    # Every type for one target, one type for every target.
    cases = [(name, dtype, "SM80") for name in BY_NAME for dtype in FLOATS]
    cases += [(name, FLOATS[0], target) for name in BY_NAME for target in ("SM89", "SM120")]
    large = model("CapacityTopK", B=1, S=65_536, K=8_192)

    def all_builds() -> dict[str, Any]:
        return {
            f"{name} {dtype.name} {target}": quiet.build(model(name, dtype, **_fixed(name)), target)
            for name, dtype, target in cases
        }

    report["body"], report["large by body"] = all_builds(), quiet.build(large)
    creators.register(trt)
    creators.register(trt)
    report["plugin"], report["large"] = all_builds(), quiet.build(large)
    report["routed layer"] = quiet.build(_routed_layer())
    report["not allowed"] = quiet.build(model("RaggedKVAppend", **_fixed("RaggedKVAppend")), in_place=False)
    report["wrong rank"] = quiet.build(_wrong_rank())
    creators.unregister(trt)
    report["unregistered"] = quiet.build(model("CapacityTopK"))
    report["built in"] = {name: quiet.build(proto) for name, proto in _built_ins().items()}
    sys.stdout.write(json.dumps(report))


def _routed_layer() -> onnx.ModelProto:
    """An eighth of a row's tokens, chosen by a router, run a product and are added back: no shape is constant."""
    hidden, float16 = 64, ir.DataType.FLOAT16
    made = ir.Graph([], [], nodes=[], name="layer", opset_imports={"": 24})
    op = GraphBuilder(made).op
    x = ir.Value(name="x", type=ir.TensorType(float16), shape=ir.Shape(["R", "P", hidden]))
    made.inputs.append(x)
    random = np.random.default_rng(0)
    router, weight = (random.normal(size=(hidden, n)).astype(np.float16) for n in (1, hidden))
    scores = op.Squeeze(op.Cast(op.MatMul(x, op.initializer(ir.tensor(router), "router")), to=ir.DataType.FLOAT), [2])
    length = op.Squeeze(op.Shape(x, start=1, end=2), [0])
    slots = op.Range(0, op.Div(length, 8), 1)
    counts = op.Expand(op.Div(length, 8), op.Shape(x, start=0, end=1))
    positions, valid = graph.capacity_top_k(op, scores, counts, slots)
    chosen = op.GatherND(x, op.Unsqueeze(positions, [2]), batch_dims=1)
    gate = op.Cast(op.GatherElements(scores, positions, axis=1), to=float16)
    made.outputs.append(
        graph.gated_scatter_add(
            op, x, op.MatMul(chosen, op.initializer(ir.tensor(weight), "weight")), gate, positions, valid
        )
    )
    whole = ir.Model(made, ir_version=11)
    graph.add_functions(whole)
    return ir.to_proto(whole)


def _fixed(name: str) -> dict[str, int]:
    return {**FIXED, "K": 16} if name == "SelectedMatMul" else FIXED


def _wrong_rank() -> onnx.ModelProto:
    proto = model("CapacityTopK", B=1, S=8, K=4)
    proto.graph.input[1].type.tensor_type.shape.dim.add().dim_value = 1
    return proto


def _built_ins() -> dict[str, onnx.ModelProto]:
    """What the operators stand in for: one built-in node each that TensorRT refuses."""
    f, i = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    rows = info("data", f, [1, 64, 8])
    adds = {
        "ScatterElements add": (
            [node("ScatterElements", ["data", "index", "update"], ["y"], axis=1, reduction="add")],
            [rows, info("index", i, [1, 4, 8]), info("update", f, [1, 4, 8])],
        ),
        "ScatterND add": (
            [node("ScatterND", ["data", "index", "update"], ["y"], reduction="add")],
            [rows, info("index", i, [4, 2]), info("update", f, [4, 8])],
        ),
        "TensorScatter of a computed cache": (
            [
                node("Abs", ["cache"], ["computed"]),
                node("TensorScatter", ["computed", "new", "index"], ["y"], axis=-2),
            ],
            [info("cache", f, [1, 2, 16, 8]), info("new", f, [1, 2, 4, 8]), info("index", i, [1])],
        ),
        "TensorScatter of a cache that grows": (
            [node("TensorScatter", ["cache", "new", "index"], ["y"], axis=-2)],
            [info("cache", f, [1, 2, "M", 8]), info("new", f, [1, 2, 4, 8]), info("index", i, [1])],
        ),
    }
    opset = [onnx.helper.make_opsetid("", 24)]
    return {
        name: onnx.helper.make_model(
            onnx.helper.make_graph(nodes, "g", inputs, [info("y", f, None)]), opset_imports=opset, ir_version=11
        )
        for name, (nodes, inputs) in adds.items()
    }


if __name__ == "__main__":
    main()
