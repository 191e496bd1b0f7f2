"""Comparison of the constants in a bundle's graphs with its config and contract, without running a graph.

A wrong window, threshold or epsilon can be invisible at every length that a comparison with PyTorch reaches. The code
that builds graphs is not used here: constants are found by following the edges of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families import read_architecture
from dynexport.exporter.families.architecture import Alibi, Architecture, LearnedPositions, Rotary
from dynexport.exporter.graph.reading import (
    COMPARISONS,
    GraphFile,
    behind,
    constant,
    number,
    operands,
    shown_values,
    text,
    unequal,
)
from dynexport.exporter.parity.expert_constants import expert_differences
from dynexport.exporter.parity.rotary_constants import angles_of_places, rotary_differences, same
from dynexport.exporter.reference.rotary import rotary_angles
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import Manifest

_NORMS = ("LayerNormalization", "RMSNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_ACTIVATIONS = ("Gelu", "QuickGelu", "Relu", "Swish")
_PRODUCTS = ("BlockMatMul", "BlockNormMatMul", "FusedMatMul", "HalfMatMul", "HalfNormMatMul", "MatMul", "MatMulNBits")
# The search for the constants of an attention bias stops at these operators, which take positions.
_DISTANCES = ("Sub", *COMPARISONS)
# Input indices of attention operators: the bias or mask, and for those that rotate, cos and sin.
_BIAS = {"Attention": 3, "CachedAttention": 8, "GroupQueryAttention": 10}
_GROUPED = ("CachedAttention", "GroupQueryAttention")
Difference = str


def differences(bundle: Bundle) -> list[Difference]:
    """Return every constant that differs from config and contract: where, expected value, found value."""
    manifest = bundle.manifest
    architecture = architecture_of(manifest)
    strategy = strategies()[manifest.contract.strategy]
    found = [*_manifest(manifest, architecture), *strategy.manifest_differences(manifest)]
    for entry in manifest.files_with_graphs:
        graph = GraphFile(bundle, entry)
        found += _norms(graph, architecture, strategy.norm_epsilons(manifest.contract))
        for check in (_activations, expert_differences, _attention, rotary_differences, _ends):
            found += check(graph, architecture)
        found += _conditions(graph, manifest, architecture)
        found += strategy.graph_differences(graph, manifest)
    return found


def architecture_of(manifest: Manifest) -> Architecture:
    """Return the architecture that config and contract describe, for the bundle's context length."""
    described = read_architecture(manifest.source.config).with_context(manifest.model.max_length)
    return strategies()[manifest.contract.strategy].architecture(manifest.contract, described)


def angle_differences(manifest: Manifest) -> list[Difference]:
    """Return where the architecture's rotary angles differ from transformers' module, at selected positions."""
    architecture, last = architecture_of(manifest), manifest.model.max_length - 1
    places = sorted({min(place, last) for place in (0, 1, 2, 89, 90, 1023, 1024, last // 2, last)})
    kinds = {"": architecture.positions}
    if architecture.sliding_positions is not None:
        kinds = {"full_attention": architecture.positions, "sliding_attention": architecture.sliding_positions}
    return [
        difference
        for kind, positions in kinds.items()
        if isinstance(positions, Rotary)
        for difference in angles_of_places(positions, places, rotary_angles(manifest.source.config, places, kind))
    ]


def _manifest(manifest: Manifest, architecture: Architecture) -> Iterator[Difference]:
    for name, expected in (
        ("layers", architecture.layers),
        ("heads", architecture.heads),
        ("kv_heads", architecture.kv_heads),
        ("vocab_size", architecture.vocab_size),
        ("heads_of_layers", tuple(own.heads for own in architecture.sizes)),
        ("kv_heads_of_layers", tuple(own.kv_heads for own in architecture.sizes)),
    ):
        yield from unequal(f"manifest: {name}", expected, getattr(manifest.model, name))
    for name, layers in dict.fromkeys(_without_conditions(manifest)):
        yield from unequal(f"{name}: layers", layers, manifest.graph(name).layers)


def _without_conditions(manifest: Manifest) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the graphs without ``layer_active``, each with the layers of a depth that it runs."""
    for depth in (manifest.full, *manifest.depths):
        for program, layers in (
            (manifest.program("prompt", depth), depth.prompt),
            (manifest.program("decode", depth), depth.keep),
        ):
            if program.graph is not None and not manifest.graph(program.graph).takes("layer_active"):
                yield program.graph, layers


def _norms(graph: GraphFile, architecture: Architecture, others: Mapping[str, float]) -> Iterator[Difference]:
    for node in graph.of_type(*_NORMS):
        names = [value.name for value in node.inputs if value is not None and value.name]
        own = [value for pattern, value in others.items() if any(re.fullmatch(pattern, name) for name in names)]
        expected = float(np.float32(own[0] if own else architecture.norm_epsilon))
        found = number(node, "epsilon", 1e-5)
        yield from unequal(f"{graph.where(node)}: epsilon", expected, found)


def _activations(graph: GraphFile, architecture: Architecture) -> Iterator[Difference]:
    for node in graph.of_type(*_ACTIVATIONS):
        if "router" in (node.name or ""):
            continue
        found = {"Relu": "relu", "Swish": "silu", "QuickGelu": "silu"}.get(node.op_type, "gelu")
        if node.op_type == "Relu" and any(set(use.node.inputs) == {node.outputs[0]} for use in node.outputs[0].uses()):
            found = "relu2"
        if text(node, "approximate", "none") == "tanh":
            found = "gelu_tanh"
        factor = number(node, "alpha", 1.0)
        yield from unequal(f"{graph.where(node)}: activation", architecture.activation, found)
        yield from unequal(f"{graph.where(node)}: factor", 1.0, factor)


def _attention(graph: GraphFile, architecture: Architecture) -> Iterator[Difference]:
    """Check scale, softcap, heads, window and ALiBi slopes of every attention, and that every layer has one."""
    scale, cap = float(np.float32(architecture.scale)), float(np.float32(architecture.attention_softcap or 0))
    seen: set[int | None] = set()
    for node in graph.of_type(*_BIAS, "Softmax"):
        if node.op_type == "Softmax" and "attn" not in (node.name or ""):
            continue  # a softmax of a router
        layer = graph.layer_of(node)
        seen.add(layer)
        where = graph.where(node)
        if node.op_type == "Softmax":
            found_scale, found_cap = _written_out(node)
            bias: ir.Value | None = node.inputs[0]
        else:
            found_scale, found_cap = number(node, "scale"), number(node, "softcap")
            place = _BIAS[node.op_type]
            bias = node.inputs[place] if len(node.inputs) > place else None
        yield from unequal(f"{where}: scale", scale, found_scale)
        yield from unequal(f"{where}: softcap", cap, found_cap)
        yield from _bias(where, bias, architecture, layer or 0)
        if node.op_type in _GROUPED:
            heads = (int(number(node, "num_heads")), int(number(node, "kv_num_heads")))
            own = architecture.sizes_of(layer or 0)
            yield from unequal(f"{where}: heads", (own.heads, own.kv_heads), heads)
            yield from unequal(f"{where}: window", -1.0, number(node, "local_window_size", -1))
    if graph.is_step:
        attending = {layer for layer in graph.entry.layers if architecture.sizes_of(layer).heads}
        yield from unequal(f"{graph.entry.name}: layers with attention", attending, seen)


def _written_out(softmax: ir.Node) -> tuple[float, float]:
    """Return scale and softcap of a softmax's scores: scores * scale or tanh(scores * scale / cap) * cap."""
    factors, caps, capped = [], [], False
    for node in behind(softmax.inputs[0], (*_PRODUCTS, "Where", *_DISTANCES)):
        numbers = [float(np.float32(value)) for value in operands(node) if value.size == 1]
        if node.op_type == "Mul":
            factors += numbers
        elif node.op_type == "Div":
            caps += numbers
        capped = capped or node.op_type == "Tanh"
    cap = caps[0] if capped and caps else 0.0
    factors = sorted(set(factors) - {cap}) or [1.0]
    return factors[0], cap


def _bias(where: str, bias: ir.Value | None, architecture: Architecture, layer: int) -> Iterator[Difference]:
    """Check the window (key position - query position > -window) and the ALiBi slopes of an attention bias."""
    windows, slopes = set(), None
    for node in behind(bias, (*_DISTANCES, *_PRODUCTS)):
        numbers = [constant(value) for value in node.inputs]
        if node.op_type in ("Greater", "GreaterOrEqual") and numbers[-1] is not None and numbers[-1].dtype == np.int64:
            windows.add(int(node.op_type == "GreaterOrEqual") - int(numbers[-1]))
        if node.op_type == "Mul":
            slopes = next((value.reshape(-1) for value in numbers if value is not None and value.size > 1), slopes)
    window = architecture.windows[layer]
    yield from unequal(f"{where}: window", set() if window is None else {window}, windows)
    expected = architecture.positions.slopes() if isinstance(architecture.positions, Alibi) else None
    if not same(expected, slopes):
        yield f"{where}: slopes of ALiBi: expected {shown_values(expected)}, found {shown_values(slopes)}"


def _ends(graph: GraphFile, architecture: Architecture) -> Iterator[Difference]:
    """Check the parts outside the layers: embedding scale, position offset, softcap of logits."""
    a, name = architecture, graph.entry.name
    if (logits := graph.value("logits")) is not None:
        nodes = list(behind(logits, _PRODUCTS))
        caps = {float(v) for node in nodes if node.op_type in ("Mul", "Div") for v in operands(node) if v.size == 1}
        capped = any(node.op_type == "Tanh" for node in nodes)
        expected = set() if a.logits_softcap is None else {float(np.float32(a.logits_softcap))}
        yield from unequal(f"{name}: softcap of logits", (expected, bool(expected)), (caps, capped))
    embedded = graph.value("hidden_states.embedding")
    if graph.only_embeds:
        embedded = graph.value("hidden_states_out")
    if embedded is None:
        return
    nodes = list(behind(embedded, ("BlockGather", "Gather", "GatherBlockQuantized", "HalfGather")))
    scales = {float(v) for node in nodes if node.op_type == "Mul" for v in operands(node) if v.size == 1}
    wanted = set() if a.embedding_scale is None else {float(np.float32(a.embedding_scale))}
    yield from unequal(f"{name}: scale of embeddings", wanted, scales)
    if isinstance(a.positions, LearnedPositions):
        places = [node for node in behind(embedded) if node.op_type == "Add" and node.inputs[0] is not None]
        offsets = {int(v) for node in places for v in operands(node) if v.size == 1 and v.dtype == np.int64}
        yield from unequal(f"{name}: offset of positions", {a.positions.offset} - {0}, offsets - {0})


def _conditions(graph: GraphFile, manifest: Manifest, architecture: Architecture) -> Iterator[Difference]:
    """Check that every layer that some depth skips has an If, with its own row of ``layer_active``."""
    if not graph.entry.takes("layer_active"):
        return
    rows = {}
    for node in graph.of_type("If"):
        picked = node.inputs[0].producer() if node.inputs[0] is not None else None
        row = None if picked is None or picked.op_type != "Gather" else constant(picked.inputs[1])
        if row is None or picked is None or picked.inputs[0] is None or picked.inputs[0].name != "layer_active":
            continue
        branch = node.attributes["then_branch"].as_graph()
        named = {graph.layer_of(inner) for inner in branch if _reads_weights(inner)}
        rows.update({layer: int(row) for layer in named if layer is not None})
    runs = [run for depth in manifest.depths for run in (depth.keep, depth.prompt)]
    full = {layer for layer in graph.entry.layers if not architecture.sizes_of(layer).is_empty}
    skipped = {layer for layer in full if any(layer not in run for run in runs)}
    expected = {layer: row for row, layer in enumerate(graph.entry.layers) if layer in skipped | rows.keys()}
    yield from unequal(f"{graph.entry.name}: rows of layer_active", expected, dict(sorted(rows.items())))


def _reads_weights(node: ir.Node) -> bool:
    """Return whether a node has a weight of a layer among its inputs."""
    values = (value for value in node.inputs if value is not None and value.is_initializer())
    return any(str(value.name).startswith("model.layers.") for value in values)


__all__ = ["angle_differences", "architecture_of", "differences"]
