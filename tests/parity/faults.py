"""Faults to plant in bundles and in the runtime, and what of a verification catches each.

A fault is a function of a copy of a bundle, or of the runtime. Two parts of ``verify`` are told apart: ``constants``,
which reads graphs, and all that runs them. Of these the first that fails is named; "refused" stands for an error.
`python samples/docs_faults.py` makes the table in docs/verification.md from this list; to add a fault is to add a
function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from planting import Edited, Planted, attribute

from dynexport.runtime.execution import executor
from dynexport.runtime.execution.batch import Call
from dynexport.runtime.execution.calls import call_of
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.execution.whole_step import WholeStep

Patch = pytest.MonkeyPatch
Plant = Callable[[Planted, Patch], Any]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        what: in the table's words.
        bundle: which of the test's bundles it is planted in.
        plant: changes the copy, or the runtime.
        read: whether ``constants`` or ``kept_sets``, which run nothing, catch it.
        run: the first of all other checks that fails; None where none does.
        against: whether PyTorch runs the checkpoint; else golden vectors stand for it.
    """

    what: str
    bundle: str
    plant: Plant
    read: bool
    run: str | None
    against: bool = False


FAULTS: list[Fault] = []


def fault(what: str, bundle: str, *, read: bool, run: str | None, against: bool = False) -> Callable[[Plant], Plant]:
    """Put a function on the list."""

    def add(plant: Plant) -> Plant:
        FAULTS.append(Fault(what, bundle, plant, read, run, against))
        return plant

    return add


# Windows and positions: a window of 100, a context of 160.


def _windows(graph: Edited) -> list[onnx.NodeProto]:
    return graph.with_number("Greater", -100.0)


@fault("the window is one longer", "window", read=True, run="golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in _windows(graph):
            graph.change_number(node, 1, -101)


@fault("the window is left out", "window", read=True, run="golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in _windows(graph):
            graph.change_number(node, 1, -(1 << 30))


@fault("the window compares with >= in place of >", "window", read=True, run="golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in _windows(graph):
            node.op_type = "GreaterOrEqual"


@fault("positions are off by one from 90 on", "window", read=False, run="golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        users = [node for node in graph.nodes() if "position_ids" in node.input]
        first = graph.graph.node[0]
        graph.insert("GreaterOrEqual", ["position_ids", graph.constant(90, np.int64)], "late", first)
        graph.insert("Cast", ["late"], "late_by", first, to=onnx.TensorProto.INT64)
        graph.insert("Add", ["position_ids", "late_by"], "planted_positions", first)
        graph.replace_input("position_ids", "planted_positions", users)


@fault("positions are off by one from 90 on, in the runtime", "long", read=False, run="golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    prepare = WholeStep._inputs

    def late(self: WholeStep, *args: Any) -> dict[str, Any]:
        inputs = prepare(self, *args)
        return inputs | {"position_ids": inputs["position_ids"] + (inputs["position_ids"] >= 90)}

    patch.setattr(WholeStep, "_inputs", late)


@fault("pieces of a prompt begin one position late", "pieces", read=False, run="golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    prepare = WholeStep._inputs

    def late(self: WholeStep, cache: KvCache, call: Call, positions: Any) -> dict[str, Any]:
        return prepare(self, cache, call, positions + (positions >= 1024))

    patch.setattr(WholeStep, "_inputs", late)


@fault("another rope theta in one layer", "long", read=True, run="golden/full/1")
@fault("another rope theta in one layer, int4", "int4", read=True, run="arithmetic/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        rotations = graph.nodes("RotaryEmbedding", "layers.2/")
        cos, sin = (graph.behind(name) for name in rotations[0].input[1:3])
        angles = graph.behind(cos.input[0])
        place = next(i for i, name in enumerate(angles.input) if "frequencies" in name)
        frequencies = graph.number(angles.input[place])
        assert frequencies is not None
        graph.insert("Mul", [angles.input[1 - place], graph.constant(frequencies**1.1, np.float32)], "other", cos)
        graph.insert("Cos", ["other"], "other_cos", cos)
        graph.insert("Sin", ["other"], "other_sin", cos)
        graph.replace_input(cos.output[0], "other_cos", rotations)
        graph.replace_input(sin.output[0], "other_sin", rotations)


@fault("rope frequencies that are one in ten thousand off", "long", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    copy.weight("inverse_frequencies", lambda values: np.multiply(values, 1.0001, out=values))


@fault("one layer is not rotated", "long", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in graph.nodes("RotaryEmbedding", "layers.1/"):
            graph.bypass(node)


# Arithmetic of a layer


@fault("an MLP is left out", "long", read=False, run="golden/full/1")
@fault("an MLP is left out, int4", "int4", read=False, run="arithmetic/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.bypass(graph.behind("hidden_states.2"))


@fault("a norm's epsilon is 1e-4 in place of 1e-5", "long", read=True, run=None)
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        attribute(graph.node("SkipSimplifiedLayerNormalization", "layers.3/"), "epsilon").f = 1e-4


@fault("attention's scale is 1 % off in one layer", "long", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        attribute(graph.node("GroupQueryAttention", "layers.0/"), "scale").f *= 1.01


@fault("one layer has another activation function", "long", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        node = graph.node("QuickGelu", "layers.1/")
        graph.become(node, "Gelu", [node.input[0]])


@fault("two query heads are exchanged", "long", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    def exchange(rows: np.ndarray) -> None:
        rows[:16] = np.roll(rows[:16], 8, axis=0)  # the first two of four, 8 channels each

    copy.weight("model.layers.1.self_attn.qkv_proj.weight", exchange)


@fault("keys and values are exchanged", "long", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    def exchange(rows: np.ndarray) -> None:
        rows[32:] = np.roll(rows[32:], 16, axis=0)  # two heads of each, behind four of queries

    copy.weight("model.layers.1.self_attn.qkv_proj.weight", exchange)


@fault("one value of a weight is changed", "long", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    copy.weight("model.layers.3.mlp.down_proj.weight", lambda values: values.__setitem__((3, 3), 5.0))


@fault("two layers have each other's MLP", "long", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for part in ("up_proj", "gate_proj", "down_proj"):
            one, two = (f"model.layers.{layer}.mlp.{part}.weight" for layer in (1, 2))
            users = {name: [node for node in graph.nodes() if name in node.input] for name in (one, two)}
            graph.replace_input(one, two, users[one])
            graph.replace_input(two, one, users[two])


@fault("the final norm is left out", "long", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.bypass(graph.node("RMSNormalization", "model/norm"))


@fault("the head is tied to the embedding although it is not", "long", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.replace_input("lm_head.weight", "model.embed_tokens.weight", graph.nodes("FusedMatMul"))


@fault("logits are not soft-capped", "gemma2", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.bypass(graph.node("Tanh"))


@fault("the softcap of logits is 29 in place of 30", "gemma2", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for kind in ("Div", "Mul"):
            for node in graph.with_number(kind, 30.0):
                graph.change_number(node, 1, 29.0)


@fault("attention's softcap is left out in one layer", "gemma2", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        attribute(graph.node("GroupQueryAttention", "layers.1/"), "softcap").f = 0.0


@fault("embeddings are not scaled", "gemma2", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.bypass(graph.behind("hidden_states.embedding"))


@fault("a window is in the neighbouring layer", "gemma2", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        one, two = (graph.node("GroupQueryAttention", f"layers.{layer}/") for layer in (0, 1))
        for _ in range(len(two.input), len(one.input)):
            two.input.append("")
        two.input[10] = one.input[10]
        del one.input[7:]


@fault("ALiBi's slopes are halved", "bloom", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in graph.nodes("Mul"):
            slopes = graph.number(node.input[1])
            if slopes is not None and slopes.ndim == 3:
                graph.change_number(node, 1, slopes / 2)


@fault("learned positions begin one row too early", "opt", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        (node,) = (node for node in graph.with_number("Add", 2.0) if node.input[0] == "position_ids")
        graph.change_number(node, 1, 1)


# Unified Skip


@fault("a kept set has another layer", "skip", read=True, run="golden/2/33")
def _(copy: Planted, patch: Patch) -> None:
    with copy.manifest() as fields:
        fields["depths"][0]["keep"] = [0, 2, 5, 7]


@fault("a layer's condition is another layer's", "skip", read=True, run="golden/2/33")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        rows = [node for node in graph.nodes("Gather") if node.input[0] == "layer_active"]
        rows[3].input[1], rows[4].input[1] = rows[4].input[1], rows[3].input[1]


@fault("a skipped layer's entries are counted", "skip", read=False, run="second_turn/2", against=True)
def _(copy: Planted, patch: Patch) -> None:
    commit = KvCache.commit

    def every_layer(self: KvCache, rows: slice, counts: Any, entries: Any, *args: Any) -> None:
        commit(self, rows, counts, np.broadcast_to(counts, entries.shape), *args)

    patch.setattr(KvCache, "commit", every_layer)


@fault("a decode step writes over the entry before it in one layer", "skip", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    step = Executor.step

    def again(self: Executor, cache: KvCache, *args: Any, **options: Any) -> Any:
        cache.lengths[0] -= cache.lengths[0] > 1
        return step(self, cache, *args, **options)

    patch.setattr(Executor, "step", again)


@fault("a row's logits leak into another's, by a millionth", "skip", read=False, run="neighbours/full")
def _(copy: Planted, patch: Patch) -> None:
    step = Executor.step

    def leaking(self: Executor, *args: Any, **options: Any) -> Any:
        logits = step(self, *args, **options)
        return logits + 1e-6 * logits.sum(axis=0)

    patch.setattr(Executor, "step", leaking)


@fault("padding of a batch's prompts leaves entries", "skip", read=False, run="batch_isolation/full")
def _(copy: Planted, patch: Patch) -> None:
    def padded(*args: Any, **options: Any) -> Call:
        call = call_of(*args, **options)
        return replace(call, counts=np.full_like(call.counts, call.ids.shape[1]))

    patch.setattr(executor, "call_of", padded)


@fault("rows of a batch get each other's positions", "skip", read=False, run="batch_isolation/full")
def _(copy: Planted, patch: Patch) -> None:
    prepare = WholeStep._inputs

    def mixed(self: WholeStep, cache: KvCache, call: Call, positions: Any) -> dict[str, Any]:
        return prepare(self, cache, call, positions[::-1].copy())

    patch.setattr(WholeStep, "_inputs", mixed)


@fault("rows that have ended leave entries", "skip", read=False, run="ended_rows/full")
def _(copy: Planted, patch: Patch) -> None:
    step = Executor.step

    def all_live(self: Executor, cache: KvCache, tokens: Any, speedup: Any, live: Any = None, **options: Any) -> Any:
        return step(self, cache, tokens, speedup, **options)

    patch.setattr(Executor, "step", all_live)


@fault("a request's entries stay in the cache for the next", "skip", read=False, run="ratio_change/full")
def _(copy: Planted, patch: Patch) -> None:
    def incomplete(self: KvCache, row: int) -> None:
        self.positions[row], self.lengths[:, row] = 1, 0

    patch.setattr(KvCache, "rewind", incomplete)


# Golden vectors


@fault("golden vectors have no rows", "skip", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.golden() as tensors:
        for name in [name for name in tensors if not name.endswith("tokens")]:
            del tensors[name]


@fault("golden vectors lack a ratio", "skip", read=False, run="golden/2/33")
def _(copy: Planted, patch: Patch) -> None:
    with copy.golden() as tensors:
        del tensors["2.33"], tensors["2.long"]


@fault("golden vectors lack the long row", "skip", read=False, run="golden/2/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.golden() as tensors:
        del tensors["2.long"]


@fault("a golden row is cut short", "skip", read=False, run="refused")
def _(copy: Planted, patch: Patch) -> None:
    with copy.golden() as tensors:
        tensors["full.33"] = tensors["full.33"][:1]


@fault("a golden row has no tokens", "skip", read=False, run="refused")
def _(copy: Planted, patch: Patch) -> None:
    with copy.golden() as tensors:
        tensors["tokens"] = tensors["tokens"][:0]


@fault("golden vectors lack what routers decided", "mod", read=False, run="refused")
def _(copy: Planted, patch: Patch) -> None:
    with copy.golden() as tensors:
        del tensors["full.33.chosen"]


# Mixture-of-Depths: caches of 77 entries in a context of 256, which fill.


def _decision(graph: Edited, layer: int) -> onnx.NodeProto:
    """Where the layer's probabilities are compared; layers 1 and 3 are routed."""
    return graph.with_number("Greater", 0.5)[layer // 2]


@fault("a decision compares with >= in place of >", "mod", read=True, run=None)
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        _decision(graph, 1).op_type = "GreaterOrEqual"


@fault("a threshold is 0.5001 in place of 0.5", "mod", read=True, run=None)
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.change_number(_decision(graph, 3), 1, 0.5001)


@fault("a threshold is 0.55 in place of 0.5", "mod", read=True, run="routes/golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        graph.change_number(_decision(graph, 3), 1, 0.55)


@fault("margins are computed with another threshold", "mod", read=True, run=None)
def _(copy: Planted, patch: Patch) -> None:
    copy.weight("route_thresholds", lambda values: np.add(values, 0.1, out=values))


@fault("a routed cache has room for one entry less", "mod", read=True, run="routes/golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in graph.with_number("Sub", 77.0, place=0):
            graph.change_number(node, 0, 76)


@fault("the same where routers never fill it", "mod-roomy", read=True, run="routes/full_caches/prompt", against=True)
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in graph.with_number("Sub", 231.0, place=0):
            graph.change_number(node, 0, 230)


@fault("the manifest has one entry less than the contract", "mod", read=True, run=None)
def _(copy: Planted, patch: Patch) -> None:
    with copy.manifest() as fields:
        for cache in fields["caches"]:
            cache["most"] = cache["most"] and cache["most"] - 1


@fault("overflow is not counted", "mod", read=False, run="routes/golden/full/long")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        node = graph.behind("overflow")
        graph.insert("Sub", [node.input[0], node.input[0]], "nobody", node)
        node.input[0] = "nobody"


@fault("a router's bias is dropped", "mod", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    copy.weight("model.layers.1.mod_router.bias", lambda values: values.fill(0))


@fault("the gate is not applied", "mod", read=False, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in graph.nodes("Mul", "layer_3_run"):
            if graph.behind(node.input[1]).op_type == "Sub":
                graph.bypass(node, 1)


@fault("entries are counted for tokens that did not run", "mod", read=False, run="routes/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    commit = KvCache.commit

    def every_token(self: KvCache, *args: Any) -> None:
        commit(self, *args)
        self.lengths[:] = np.minimum(self.positions, 77)

    patch.setattr(KvCache, "commit", every_token)


@fault("top-k chooses a fifth in place of a quarter", "mod-topk", read=True, run="routes/golden/full/33")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        for node in graph.with_number("Div", 4.0):
            graph.change_number(node, 1, 5)


# Radial Networks


@fault("two choices of a router are exchanged", "radial", read=False, run="routes/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    copy.weight(
        "model.radial_router.fc2.weight", lambda rows: rows.__setitem__(slice(0, 2), rows[1::-1].copy()), "router"
    )


@fault("a layer of a pool has a wrong MLP", "radial", read=False, run="routes/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    copy.weight(name, lambda values: np.multiply(values, 1.05, out=values), "pool")


@fault("the scale of a pool's attention is 1 % off", "radial", read=True, run="golden/full/7")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph("attention") as graph:
        attribute(graph.node("GroupQueryAttention"), "scale").f *= 1.01


@fault("the scale of attention within a pool's whole layers is 1 % off", "radial", read=True, run="golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph("pool") as graph:
        for node in graph.nodes("GroupQueryAttention"):
            attribute(node, "scale").f *= 1.01


@fault("rope frequencies of a pool are halved", "radial", read=True, run="routes/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    copy.weight("inverse_frequencies", lambda values: np.divide(values, 2, out=values), "embedding")


@fault("an entry's hop is ignored", "radial-layer", read=False, run="routes/chunked_prefill/3")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph("attention") as graph:
        node = next(node for node in graph.nodes("LessOrEqual") if "step" in node.input)
        graph.become(node, "GreaterOrEqual", [node.input[0], node.input[0]])


@fault("exit is allowed before min_steps", "radial-single", read=True, run="routes/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    for step in range(2):
        copy.weight(f"allowed_in_step_{step}", lambda values: values.fill(True))


# TensorRT's graphs, as ONNX Runtime runs them


@fault("attention's scale is 1 % off, for TensorRT", "tensorrt", read=True, run="golden/full/7")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        attribute(graph.node("Attention", "layers.0/"), "scale").f *= 1.01


@fault("a cache's append is one slot late, for TensorRT", "tensorrt", read=False, run="routes/golden/full/1")
def _(copy: Planted, patch: Patch) -> None:
    with copy.graph() as graph:
        node = graph.node("TensorScatter", "layers.0/")
        graph.insert("Add", [node.input[2], graph.constant(1, np.int64)], "late", node)
        node.input[2] = "late"
