"""The parts of a bundle's manifest: sizes, costs, special tokens, inputs and outputs, versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import onnx_ir as ir

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.lowering.plan import GraphPlan, PartPlan, SlotRule
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies import Strategy, declared_contract
from dynexport.exporter.strategies.strategy import CostPart
from dynexport.plugins.schema import DOMAIN
from dynexport.runtime.bundle import manifest as m
from dynexport.runtime.bundle.contract import UNDECLARED, AnyContract, parse_contract
from dynexport.runtime.bundle.errors import DynexportError, printable
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.generation.generation_config import GENERATION_CONFIG

_TOOLS = (
    "dynexport",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "torch",
    "transformers",
)
# The dimension of a cache in graphs -> its name in the manifest.
_SLOTS = {"M": "M", "M_routed": "M", "B": "B"}
_LAYER_PREFIX = "model.layers."
# Within the name of an expert's weight.
_EXPERT = ".mlp.experts."
_ROUTER_PREFIX = "model.radial_router."
# A decode step reads single rows of these, unless a tied head multiplies by the whole table.
_TABLES = ("model.embed_tokens.", "model.embed_positions.")


def describe_model(architecture: Architecture, parameters: int) -> m.Model:
    """Return the sizes that a runtime needs; ``parameters`` counts the elements of all weights."""
    return m.Model(
        family=architecture.family,
        layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        vocab_size=architecture.vocab_size,
        max_length=architecture.max_length,
        parameters=parameters,
        heads_of_layers=tuple(own.heads for own in architecture.sizes),
        kv_heads_of_layers=tuple(own.kv_heads for own in architecture.sizes),
    )


def describe_graphs(
    model: ir.Model, plan: GraphPlan, architecture: Architecture, profiles: tuple[m.Profile, ...]
) -> list[m.Graph]:
    """Return the description of a file's graph, or of its parts, with their inputs and outputs."""
    file = m.Graph(
        name=plan.name,
        file=f"{plan.name}.onnx",
        layers=plan.layers,
        places=_places(model, [layer for layer in plan.layers if not architecture.sizes_of(layer).heads]),
        share_memory=plan.share_memory,
        profiles=profiles,
        inputs=tuple(_tensor(value) for value in model.graph.inputs),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
    )
    return [_part(file, part) for part in plan.parts] or [file]


def _part(file: m.Graph, part: PartPlan) -> m.Graph:
    def of(specs: tuple[m.TensorSpec, ...], names: tuple[str, ...]) -> tuple[m.TensorSpec, ...]:
        begins = tuple(name for name in names if name.endswith("."))
        own = [spec for spec in specs if spec.name in names or spec.name.startswith(begins)]
        shapes = [tuple(part.sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in s.shape) for s in own]
        return tuple(spec.model_copy(update={"shape": shape}) for spec, shape in zip(own, shapes, strict=True))

    update = {
        "name": part.name,
        "layers": part.layers,
        "part": part.number,
        "inputs": of(file.inputs, part.inputs),
        "outputs": of(file.outputs, part.outputs),
    }
    found = file.model_copy(update=update)
    return found if found.caches else found.model_copy(update={"places": ()})


def describe_caches(graphs: Sequence[m.Graph], places: int, slots: Callable[[int], SlotRule]) -> tuple[m.Cache, ...]:
    """Return the cache of each place, as described by the inputs of the graphs that use it.

    Args:
        graphs: the descriptions of all graphs; the caches of one without places fit any place.
        places: the number of places.
        slots: a function that returns the slot rule of a place.
    """
    return tuple(_cache(graphs, place, slots(place)) for place in range(places))


def _cache(graphs: Sequence[m.Graph], place: int, rule: SlotRule) -> m.Cache:
    parts: dict[str, m.CachePart] = {}
    for graph in graphs:
        prefix = "" if graph.places is None else f"{place}."
        for name, spec in graph.caches.items():
            if not name.startswith(prefix) or (graph.places is None and name.removeprefix(prefix) in parts):
                continue
            part = name.removeprefix(prefix)
            shape = tuple(_SLOTS.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
            parts[part] = m.CachePart.model_validate(
                {
                    "input": f"{m.PAST}{place}.{part}",
                    "output": f"{m.PRESENT}{place}.{part}",
                    "dtype": spec.dtype,
                    "shape": shape,
                }
            )
    return m.Cache(place=place, parts=parts, most=rule.most, per_token=rule.per_token, slack=rule.slack)


def describe_limits(
    graphs: Sequence[m.Graph], programs: Sequence[m.Program], limits: m.Limits, *, ragged: bool
) -> m.Limits:
    """Return a strategy's limits, reduced to the sizes that engines are built for.

    ``ragged``: whether every layer takes several tokens of several rows over caches that hold entries.
    """
    named = {graph.name: graph for graph in graphs}
    prompts = [program for program in programs if program.phase == "prompt"]
    whole = [named[program.graph] for program in prompts if program.graph is not None]
    sets = [program.set for program in prompts if program.set is not None]
    lines = [named[name] for found in sets for name in found.names if name not in (found.head, found.attention)]
    return limits.model_copy(
        update={
            "together": "always" if ragged else limits.together,
            "rows": _most(graphs, "B"),
            "prompt": _least(
                [limits.prompt, *(graph.limit(dim) for graph in whole for dim in "S")]
                + [named[found.attention].limit("C") for found in sets]
            ),
            "tokens": _least([graph.limit("N") for graph in lines]),
            "logits": _least([graph.limit("K") for graph in whole]),
        }
    )


def _most(graphs: Sequence[m.Graph], dimension: str) -> int | None:
    found = [graph.limit(dimension) for graph in graphs]
    return max((size for size in found if size is not None), default=None)


def _least(sizes: Iterable[int | None]) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def is_trained(checkpoint: Checkpoint, contract: AnyContract) -> bool:
    """Return whether the checkpoint declares the contract's strategy: only then was it trained for it."""
    declared = declared_contract(checkpoint.config) or {}
    return bool(declared.get("strategy", UNDECLARED) == contract.strategy)


def mark_trained(
    checkpoint: Checkpoint, strategy: Strategy[Any, Any], contract: AnyContract, depths: Sequence[m.Depth]
) -> list[m.Depth]:
    """Return the depths, marked as trained where the checkpoint declares their layers."""
    fields = declared_contract(checkpoint.config)
    try:
        declared = parse_contract(fields, "config.json: dynexport") if isinstance(fields, dict) else None
    except DynexportError:
        declared = None  # a contract of another version, or no contract
    return [
        depth.model_copy(update={"trained": declared is not None and strategy.is_trained(contract, depth, declared)})
        for depth in depths
    ]


def describe_cost(
    architecture: Architecture,
    bytes_read: dict[str, int],
    target: Target,
    router_weights: int,
    parts: Sequence[CostPart],
    read_by: Mapping[str, Sequence[int]],
) -> m.Cost:
    """Return the cost of a decode step: bytes of weights and caches that it reads, and floating-point operations.

    The bytes of a weight of ``read_by`` count for the layers there, in place of once for the step.
    """
    layers = [0] * (1 + max(architecture.weights_of))
    experts = list(layers)
    beside = [0] * architecture.layers
    shared = 0
    for name, size in bytes_read.items():
        if name.startswith(_LAYER_PREFIX) and _EXPERT in name:
            experts[int(name.removeprefix(_LAYER_PREFIX).split(".")[0])] += size
        elif name.startswith(_LAYER_PREFIX):
            layers[int(name.removeprefix(_LAYER_PREFIX).split(".")[0])] += size
        elif name in read_by:
            for layer in read_by[name]:
                beside[layer] += size
        elif name.startswith(_ROUTER_PREFIX):
            continue  # read once per hop: counted by the code that knows the paths
        elif not name.startswith(_TABLES) or (architecture.tied_embeddings and name.startswith(_TABLES[0])):
            shared += size
    found = [_part_cost(part, bytes_read) for part in parts]
    for part, cost in zip(parts, found, strict=True):
        layers[part.layer] -= cost.skip
    runs = [architecture.of(layer) for layer in range(architecture.layers)] if architecture.sizes else []
    mixture = architecture.experts
    count, chosen = (1, 0) if mixture is None else (mixture.count, mixture.chosen)

    def entry(heads: int) -> int:
        return 2 * heads * target.cache_head_dim(architecture.head_dim) * target.cache_dtype.bitwidth // 8

    return m.Cost(
        shared=shared,
        layers=tuple(
            layers[layer] + chosen * (experts[layer] // count) + more
            for layer, more in zip(architecture.weights_of, beside, strict=True)
        ),
        kv_per_token=entry(architecture.kv_heads),
        layer_flops=max([own.layer_flops_per_token for own in runs], default=architecture.layer_flops_per_token),
        router=4 * router_weights,
        router_flops=2 * router_weights,
        parts=tuple(found),
        experts=0 if mixture is None else count,
        experts_per_token=chosen,
        expert=() if mixture is None else tuple(experts[layer] // count for layer in architecture.weights_of),
        kv_of_layers=tuple(entry(own.kv_heads) for own in runs),
        flops_of_layers=tuple(own.layer_flops_per_token for own in runs),
    )


def _part_cost(part: CostPart, bytes_read: dict[str, int]) -> m.PartCost:
    prefix = f"{_LAYER_PREFIX}{part.layer}."
    of_layer = {name.removeprefix(prefix): size for name, size in bytes_read.items() if name.startswith(prefix)}
    run, skip = (
        sum(size for name, size in of_layer.items() if re.fullmatch(names, name)) for names in (part.run, part.skip)
    )
    return m.PartCost(run=run, skip=skip)


def our_operators(graphs: Sequence[ir.Model]) -> tuple[str, ...]:
    """Return the names of dynexport's custom operators in graphs and their branches."""
    nodes = (node for model in graphs for node in model.graph.all_nodes())
    return tuple(sorted({node.op_type for node in nodes if node.domain == DOMAIN}))


def describe_tokens(checkpoint: Checkpoint, vocab_size: int) -> m.Tokens:
    """Return the special tokens of generation_config.json, else of config.json, and further tokens that end a turn.

    Ids outside the vocabulary are left out, because the model can neither read nor generate them.

    Raises:
        DynexportError: when an id is not an integer.
    """

    def tokens(ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)

    first = {name: next(iter(tokens(_named_ids(checkpoint, f"{name}_token_id"))), None) for name in ("bos", "pad")}
    eos = tokens(_named_ids(checkpoint, "eos_token_id"))
    turn_end = tuple(token_id for token_id in tokens(checkpoint.turn_ends) if token_id not in eos)
    return m.Tokens(bos=first["bos"], pad=first["pad"], eos=eos, turn_end=turn_end)


def notes_on_tokens(checkpoint: Checkpoint, tokens: m.Tokens) -> tuple[str, ...]:
    """Return notes on end tokens that only the tokenizer names, or that are not in the vocabulary."""
    notes = []
    vain = [token_id for token_id in _named_ids(checkpoint, "eos_token_id") if token_id not in tokens.eos]
    if vain:
        notes.append(
            f"eos_token_id: left out {', '.join(f'{token_id!s:.20}' for token_id in vain[:5])}, no token of the "
            f"model's vocabulary; {'plain prompts have no end' if not tokens.eos else f'{list(tokens.eos)} are kept'}"
        )
    names = ", ".join(f"{checkpoint.turn_ends[token_id]!r:.60} ({token_id})" for token_id in tokens.turn_end)
    if names:
        notes.append(
            f"end tokens: answers in a chat also end at {names}, by the tokenizer; config.json and "
            f"generation_config.json name {list(tokens.eos) or 'none'}, where plain prompts end"
        )
    return tuple(notes)


def _named_ids(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the token ids of a field of generation_config.json, else of config.json."""
    content = checkpoint.files.get(GENERATION_CONFIG, b"{}")
    value = parse_json_object(content, f"{checkpoint.source}: {GENERATION_CONFIG}").get(name)
    value = checkpoint.config.get(name) if value is None else value
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int):
            raise DynexportError(f"{checkpoint.source}: {name}: expected token ids, found {item!r:.80}")
    return tuple(values)


def describe_source(checkpoint: Checkpoint) -> m.Source:
    """Return the checkpoint's name, its config and the config's hash, and its importer."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    digest = hashlib.sha256(config.encode()).hexdigest()
    return m.Source(
        model=printable(checkpoint.source),
        config_sha256=digest,
        config=checkpoint.config,
        importer=checkpoint.importer,
    )


@cache
def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that made the bundle."""
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _places(model: ir.Model, without: Sequence[int]) -> tuple[int, ...] | None:
    """Return the places of a graph's caches and of layers without any; None for a graph whose one fits any place."""
    names = [str(value.name).removeprefix(m.PAST) for value in model.graph.inputs if str(value.name).startswith(m.PAST)]
    if any("." not in name for name in names):
        return None
    return tuple(sorted({*without, *(int(name.partition(".")[0]) for name in names)}))


def _tensor(value: ir.Value) -> m.TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
    return m.TensorSpec(name=value.name or "", dtype=value.dtype.name.lower() if value.dtype else "", shape=shape)
