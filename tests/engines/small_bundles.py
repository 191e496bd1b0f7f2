"""Bundles for TensorRT made by hand: one decoder layer without its head, small enough to build in half a second."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, SLOTS, VOCAB = 4, 2, 16, 64, 64, 97
FLOATS = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
CACHES = ("past_key_values.0.key", "past_key_values.0.value")
PROFILES = [
    {"name": "prefill", "ranges": {"B": [1, 1, 4], "S": [1, 16, 32]}},
    {"name": "decode", "ranges": {"B": [1, 1, 4], "S": [1, 1, 1]}},
]


def tensorrt_bundle(
    directory: Path, precision: str = "fp16", *, model: onnx.ModelProto | None = None, **fields: Any
) -> Path:
    """A bundle with one graph; ``fields`` of the manifest replace what it would have."""
    directory.mkdir()
    save(model or layer_model(precision), directory)
    found = manifest(directory, precision) | fields
    (directory / "manifest.json").write_text(json.dumps({"caches": caches(found["graphs"][0]), **found}))
    return directory


def save(model: onnx.ModelProto, directory: Path) -> None:
    """``model.onnx`` and ``model.data``."""
    onnx.save(
        model, directory / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0
    )  # fmt: skip


def layer_model(precision: str) -> onnx.ModelProto:
    """Embedding, RMSNorm, attention over a cache that TensorScatter fills, and logits."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], "embed"),
        helper.make_node("RMSNormalization", ["x", "scale"], ["normed"], "norm", epsilon=1e-5),
        *_projections(),
        helper.make_node("TensorScatter", [CACHES[0], "k", "cache_lengths"], ["present.0.key"], "write_key", axis=-2),
        helper.make_node(
            "TensorScatter", [CACHES[1], "v", "cache_lengths"], ["present.0.value"], "write_value", axis=-2
        ),
        helper.make_node("Shape", ["input_ids"], ["count"], "count", start=1, end=2),
        helper.make_node("Add", ["cache_lengths", "count"], ["lengths"], "lengths"),
        helper.make_node(
            "Attention",
            ["q", "present.0.key", "present.0.value", "", "", "", "lengths"],
            ["heads"],
            "attention",
            is_causal=1,
        ),
        helper.make_node("Transpose", ["heads"], ["rows"], "rows", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["rows", "flat"], ["merged"], "merge"),
        helper.make_node("MatMul", ["merged", "head"], ["logits"], "logits"),
    ]
    dtype = FLOATS[precision]
    cache = ["B", KV_HEADS, SLOTS, HEAD_DIM]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
        helper.make_tensor_value_info("cache_lengths", TensorProto.INT64, ["B"]),
        *(helper.make_tensor_value_info(name, dtype, cache) for name in CACHES),
    ]
    outputs = [helper.make_tensor_value_info("logits", dtype, ["B", "S", VOCAB])]
    outputs += [helper.make_tensor_value_info(f"present.0.{part}", dtype, cache) for part in ("key", "value")]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, _weights(precision))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    onnx.checker.check_model(model, full_check=True)
    return model


def _projections() -> list[onnx.NodeProto]:
    nodes = []
    for name, split in (("q", "query_heads"), ("k", "key_heads"), ("v", "key_heads")):
        nodes += [
            helper.make_node("MatMul", ["normed", f"w_{name}"], [f"{name}_flat"], f"project_{name}"),
            helper.make_node("Reshape", [f"{name}_flat", split], [f"{name}_split"], f"split_{name}"),
            helper.make_node("Transpose", [f"{name}_split"], [name], f"turn_{name}", perm=[0, 2, 1, 3]),
        ]
    return nodes


def _weights(precision: str) -> list[onnx.TensorProto]:
    random = np.random.default_rng(0)
    floats = np.float16 if precision == "fp16" else np.float32
    sizes = {
        "table": (VOCAB, HIDDEN),
        "scale": (HIDDEN,),
        "w_q": (HIDDEN, HEADS * HEAD_DIM),
        "w_k": (HIDDEN, KV_HEADS * HEAD_DIM),
        "w_v": (HIDDEN, KV_HEADS * HEAD_DIM),
        "head": (HEADS * HEAD_DIM, VOCAB),
    }
    shapes = {"query_heads": [0, 0, HEADS, HEAD_DIM], "key_heads": [0, 0, KV_HEADS, HEAD_DIM], "flat": [0, 0, -1]}
    return [
        *(numpy_helper.from_array(random.normal(0, 0.1, size).astype(floats), name) for name, size in sizes.items()),
        *(numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()),
    ]


def manifest(directory: Path, precision: str) -> dict[str, Any]:
    """What the runtime has to know; the hashes are those of the files that are there."""
    dtype = {"fp16": "float16", "fp32": "float"}[precision]
    cache = ["B", KV_HEADS, SLOTS, HEAD_DIM]

    def spec(name: str, kind: str, shape: list[int | str]) -> dict[str, Any]:
        return {"name": name, "dtype": kind, "shape": shape}

    graph = {
        "name": "model",
        "file": "model.onnx",
        "layers": [0],
        "places": [0],
        "profiles": PROFILES,
        "inputs": [
            spec("input_ids", "int64", ["B", "S"]),
            spec("cache_lengths", "int64", ["B"]),
            *(spec(name, dtype, cache) for name in CACHES),
        ],
        "outputs": [
            spec("logits", dtype, ["B", "S", VOCAB]),
            *(spec(f"present.0.{part}", dtype, cache) for part in ("key", "value")),
        ],
    }
    return {
        "schema_version": 2,
        "contract": {"strategy": "dense"},
        "trained": True,
        "target": "tensorrt",
        "precision": precision,
        "model": {
            "family": "llama",
            "layers": 1,
            "hidden_size": HIDDEN,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB,
            "max_length": SLOTS,
            "parameters": 1000,
        },
        "depths": [],
        "programs": [{"phase": phase, "graph": "model"} for phase in ("prompt", "decode")],
        "graphs": [graph],
        "limits": {"rows": 4, "prompt": 32},
        "cost": {"shared": 1, "layers": [1], "kv_per_token": 1, "layer_flops": 1},
        "tokens": {},
        "source": {"model": "made by hand", "config_sha256": "0" * 64, "config": {}},
        "tools": {},
        "files": {name: _entry(directory / name) for name in ("model.onnx", "model.data")},
    }


def caches(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """The one cache of a graph, as its inputs say."""
    parts = {
        spec["name"].rpartition(".")[2]: {
            "input": spec["name"],
            "output": spec["name"].replace("past_key_values", "present"),
            "dtype": spec["dtype"],
            "shape": spec["shape"],
        }
        for spec in graph["inputs"]
        if spec["name"] in CACHES
    }
    return [{"place": 0, "parts": parts}]


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
