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
_TABLES = {"CachedAttention": (5, 6), "GroupQueryAttention": (7, 8), "RotaryEmbedding": (1, 2)}
_GROUPED = ("CachedAttention", "GroupQueryAttention")
# Absolute limit of cos and sin, plus two units in the last place of the frequency per position.
_ANGLE_LIMIT, _BIT = 1e-3, 2.0**-22
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
        for check in (_activations, expert_differences, _attention, _rotary, _ends):
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
        for difference in _of_places(positions, places, rotary_angles(manifest.source.config, places, kind))
    ]


def _of_places(positions: Rotary, places: list[int], known: tuple[np.ndarray, np.ndarray] | None) -> list[Difference]:
    """Return where rotary angles differ from transformers', the first place of cos and that of sin."""
    if known is None:
        return ["expected a module for rotary positions in transformers' model, found none"]
    angles = np.multiply.outer(np.array(places, np.float32), np.asarray(positions.inverse_frequencies, np.float32))
    limits = _ANGLE_LIMIT + np.array(places)[:, None] * _BIT
    found: list[Difference] = []
    for name, expected, turned in zip(("cos", "sin"), known, (np.cos(angles), np.sin(angles)), strict=True):
        own = turned * np.float32(_attention_factor(positions))
        if own.shape != expected.shape:
            return [f"{name}: expected {expected.shape[1]} channels as transformers has, found {own.shape[1]}"]
        for place, channel in np.argwhere(np.abs(own - expected) > limits)[:1]:
            found.append(
                f"{name} of position {places[place]}, channel {channel}: expected {expected[place, channel]:.6g} as "
                f"transformers has, found {own[place, channel]:.6g}"
            )
    return found


def _attention_factor(positions: Rotary) -> float:
    """Return the factor of cos and sin."""
    return float(getattr(positions, "attention_factor", 1.0))


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


def _rotates(node: ir.Node) -> bool:
    """Return whether an operator that may rotate does."""
    if node.op_type == "GroupQueryAttention":
        return bool(number(node, "do_rotary"))
    table = constant(node.inputs[_TABLES[node.op_type][0]])
    return table is None or table.size > 0


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
    if not _same(expected, slopes):
        yield f"{where}: slopes of ALiBi: expected {shown_values(expected)}, found {shown_values(slopes)}"


def _rotary(graph: GraphFile, architecture: Architecture) -> Iterator[Difference]:
    """Check the rotary frequencies of every layer and the set of layers with rotary positions."""
    rotated: set[int | None] = set()
    for node in graph.of_type(*_TABLES):
        if not _rotates(node):
            continue
        rotated.add(graph.layer_of(node))
        for kind, place in zip(("Cos", "Sin"), _TABLES[node.op_type], strict=True):
            yield from _angles(
                graph.where(node), node.inputs[place], kind, _rotary_of(architecture, graph.layer_of(node))
            )
        yield from unequal(f"{graph.where(node)}: interleaved", 0.0, number(node, "interleaved"))
        yield from unequal(f"{graph.where(node)}: interleaved", 0.0, number(node, "rotary_interleaved"))
    if graph.only_embeds and isinstance(architecture.positions, Rotary):
        for kind in ("Cos", "Sin"):
            yield from _angles(graph.entry.name, graph.value(kind.lower()), kind, architecture.positions)
    if graph.is_step or graph.value("query") is not None:
        turning = (layer for layer in graph.entry.layers if architecture.rotary_layers[layer])
        layers = {layer for layer in turning if architecture.sizes_of(layer).heads}
        yield from unequal(f"{graph.entry.name}: layers with rotary positions", layers, rotated)


def _rotary_of(architecture: Architecture, layer: int | None) -> Rotary | None:
    """Return the rotary positions of a layer, also of one that must not rotate; those of the model without a layer."""
    positions = architecture.positions if layer is None else architecture.rotary_of(layer) or architecture.positions
    return positions if isinstance(positions, Rotary) else None


def _angles(where: str, value: ir.Value | None, kind: str, positions: Rotary | None) -> Iterator[Difference]:
    """Check cos or sin of positions times frequencies; an input from another graph is checked in that graph."""
    if value is not None and value.producer() is None and value.name == kind.lower():
        return
    factors, turn = [], None
    for node in behind(value, ("Cos", "Sin")):
        if node.op_type in ("Cos", "Sin"):
            turn = node
            break
        factors += [float(number) for number in operands(node) if node.op_type == "Mul" and number.size == 1]
    yield from unequal(f"{where}: angles", kind, None if turn is None else turn.op_type)
    if turn is None:
        return
    if positions is not None:
        factor = float(np.float32(_attention_factor(positions)))
        yield from unequal(f"{where}: factor of {kind}", [factor] if factor != 1 else [], factors)
    found = [v.reshape(-1) for node in behind(turn.inputs[0], ("Unsqueeze",)) for v in operands(node) if v.size > 1]
    expected = None
    if positions is not None:
        expected = np.asarray(positions.inverse_frequencies, np.float32)
    frequencies = found[0] if found else np.ones(1, np.float32)
    if not _same(expected, frequencies):
        yield f"{where}: rotary frequencies: expected {shown_values(expected)}, found {shown_values(frequencies)}"
    factor = 1.0 if positions is None else positions.attention_factor
    yield from unequal(f"{where}: factor of angles", {float(np.float32(factor))} - {1.0}, _factors(value))


def _factors(angles: ir.Value | None) -> set[float]:
    """Return the factors of cos or sin except 1; Where selects another factor for single layers."""
    found: set[float] = set()
    while angles is not None and (node := angles.producer()) is not None and node.op_type not in ("Cos", "Sin"):
        for factor in node.inputs[1:] if node.op_type == "Mul" else ():
            numbers = [constant(factor)]
            for choice in behind(factor, ("Where",)):
                numbers += operands(choice)
            found |= {float(v) for value in numbers if value is not None for v in value.reshape(-1)}
        angles = node.inputs[0]
    return found - {1.0}


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
    nodes = list(behind(embedded, ("Gather", "GatherBlockQuantized")))
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


def _same(expected: np.ndarray | None, found: np.ndarray | None) -> bool:
    if expected is None or found is None:
        return expected is found
    return np.array_equal(expected, found)


__all__ = ["angle_differences", "architecture_of", "differences"]
