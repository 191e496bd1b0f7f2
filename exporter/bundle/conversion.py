"""From a checkpoint to a bundle; the pipeline reads from top to bottom."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir

from dynexport.exporter.bundle import describe
from dynexport.exporter.bundle.leftovers import check_leftovers
from dynexport.exporter.bundle.ties import tied_as_stored
from dynexport.exporter.bundle.weights import WeightFile, WeightReader
from dynexport.exporter.bundle.writer import replacing
from dynexport.exporter.checkpoint import Checkpoint, open_checkpoint
from dynexport.exporter.checkpoint.sizes import check_sizes
from dynexport.exporter.families import find_family, read_architecture
from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.lowering.onnxruntime import OnnxRuntime
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.lowering.tensorrt.target import MAX_BATCH, TensorRT
from dynexport.exporter.parity.golden import write_golden
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle import manifest as m
from dynexport.runtime.bundle.checks import checked_kind, checked_list, checked_path, is_integer, is_number, shown
from dynexport.runtime.bundle.contract import AnyContract, SkipRule, parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import peak_memory
from dynexport.runtime.generation.generation_config import GENERATION_CONFIG, read_generation_config

# Called with what is being worked on, the weights done so far, and how many there are.
Progress = Callable[[str, int, int], None]
_ROUTER = re.compile(r"model\.layers\.([0-9]{1,4})\.mod_router\.weight")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        output: the bundle.
        manifest: its manifest.
        golden: how many golden rows were written; 0 without torch.
        note: why there are no golden vectors, or "".
        notes: what had to be assumed or changed when the checkpoint was read, and which rotary frequencies were chosen,
            one line each.
        seconds: wall time.
        peak_memory: bytes, of this process since its start.
    """

    output: Path
    manifest: m.Manifest
    golden: int
    note: str
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int


def convert(
    model: str | Path,
    output: str | Path,
    *,
    strategy: str | None = None,
    speedups: Sequence[float] = (),
    rule: SkipRule | None = None,
    keep: Sequence[int] | None = None,
    fields: Mapping[str, Any] | None = None,
    target: m.TargetName = "onnxruntime",
    precision: m.Precision = "fp32",
    max_batch: int | None = None,
    max_prompt: int | None = None,
    plugins: bool = False,
    max_length: int | None = None,
    static: bool = False,
    layer_capacity: float | None = None,
    golden: bool = True,
    tokenizer: Path | None = None,
    importer: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a model into a bundle.

    Args:
        model: a Hugging Face directory, a hub id, or a ``.gguf`` file.
        output: the bundle's directory; an earlier bundle there is replaced when the new one is complete.
        strategy: one of ``strategies()``; None takes what config.json declares under "dynexport", else dense.
        speedups: override the contract's ratios.
        rule: overrides the contract's rule for kept layers.
        keep: overrides the contract's kept layers.
        fields: override any field of the contract, objects within it field by field; these go last.
        target: the engine that the graphs are written for; ONNX Runtime runs them all.
        precision: how projections and embeddings are stored. For ONNX Runtime everything else is float32; for TensorRT
            hidden states and caches have that type as well, float16 with int8 and int4.
        max_batch: for TensorRT, the rows that engines are built for; None for 8.
        max_prompt: for TensorRT, the tokens that a run of a prompt takes, longer ones go in pieces; None for the
            context, at most 1024.
        plugins: for TensorRT, call operators of our own, which engines are then built and run with (docs/plugins.md);
            a Radial Network's bundle then has a graph for decode steps beside its set.
        max_length: the bundle's context in tokens; None takes the model's, with longrope its original length.
        static: write a graph of the kept layers per ratio instead of one graph with conditions.
        layer_capacity: write a single graph of all steps of a Radial Network, in which every layer has room for this
            share of a step's tokens; None for the usual graphs.
        golden: write golden vectors, when torch and transformers are installed.
        tokenizer: a tokenizer.json, or a directory with one, to take instead of the model's own.
        importer: the routing code that has written ``model``, when that is not ours (docs/importing.md).
        progress: called with what is done, the bytes so far, and all bytes.

    Raises:
        DynexportError: for anything wrong with the model or the arguments; ``output`` is then left as it was.
    """
    started = time.perf_counter()
    output = checked_path("output", output)
    if precision not in get_args(m.Precision):
        raise DynexportError(f"precision: expected one of {', '.join(get_args(m.Precision))}, found {shown(precision)}")
    _check_form(static, layer_capacity)
    engine = _target(target, precision, max_batch, max_prompt, plugins)
    checkpoint = open_checkpoint(model, tokenizer=tokenizer, importer=importer)
    check_sizes(checkpoint)
    read_generation_config(checkpoint.files.get(GENERATION_CONFIG, b"{}"))  # refused now rather than by each run
    architecture = _limited(read_architecture(checkpoint.config), max_length)
    reader = WeightReader(checkpoint, find_family(checkpoint.config), architecture)
    reader.architecture = architecture = tied_as_stored(reader)
    contract = read_contract(checkpoint, strategy, speedups, rule, keep, fields)
    engine.check_contract(contract, architecture.max_length)
    chosen = strategies()[contract.strategy]
    kept = chosen.speedups(contract, architecture.layers)
    if layer_capacity is None:
        plans = chosen.graphs(contract, kept, architecture.layers, target=engine, static=static)
    else:
        plans = (chosen.single_graph(contract, architecture.layers, layer_capacity),)
    built = [chosen.build(plan, architecture, engine, contract, checkpoint) for plan in plans]
    needed = {name for _, modules in built for name in reader.needed(modules)}
    checkpoint.notes += check_leftovers(reader, needed, contract, chosen=strategy is not None, changed=bool(fields))
    with replacing(output) as part:
        manifest = _write_graphs(part, reader, contract, kept, precision, plans, built, engine, progress)
        for name, content in checkpoint.files.items():
            (part / name).write_bytes(content)
        rows, note = write_golden(part / m.GOLDEN, checkpoint, manifest) if golden else (0, "left out as asked")
        files = {path.name: m.File.of(path) for path in sorted(part.iterdir()) if path.name not in manifest.files}
        source = manifest.source.model_copy(update={"importer": importer})
        manifest = manifest.model_copy(update={"files": {**manifest.files, **files}, "source": source})
        (part / m.MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    seconds = time.perf_counter() - started
    notes = (*checkpoint.notes, *_rope_notes(architecture), *describe.notes_on_tokens(checkpoint, manifest.tokens))
    return Conversion(output, manifest, rows, note, notes, seconds, peak_memory())


def _check_form(static: bool, layer_capacity: float | None) -> None:
    if layer_capacity is None:
        return
    if static:
        raise DynexportError("--static: expected without --single-graph, found both")
    if not is_number(layer_capacity) or not 0 < layer_capacity <= 1:
        raise DynexportError(f"layer capacity: expected a share above 0 and up to 1, found {shown(layer_capacity)}")


def _target(
    name: m.TargetName, precision: m.Precision, max_batch: int | None, max_prompt: int | None, plugins: bool
) -> Target:
    if name not in get_args(m.TargetName):
        raise DynexportError(f"target: expected one of {', '.join(get_args(m.TargetName))}, found {shown(name)}")
    if name == "tensorrt":
        return TensorRT(precision, MAX_BATCH if max_batch is None else max_batch, max_prompt, plugins=plugins)
    for option, value in (("max_batch", max_batch), ("max_prompt", max_prompt), ("plugins", plugins or None)):
        if value is not None:
            raise DynexportError(f"{option}: expected with the target tensorrt, found onnxruntime, which needs none")
    return OnnxRuntime(precision)


def _limited(architecture: Architecture, max_length: int | None) -> Architecture:
    """The model for the context that was asked for, or for its own."""
    if max_length is None:
        return architecture
    if not is_integer(max_length) or not 1 <= max_length <= architecture.longest:
        dynamic = isinstance(architecture.positions, Rotary) and architecture.positions.rope_type == "dynamic"
        why = "; beyond, dynamic rope changes its frequencies with the length of each text" if dynamic else ""
        raise DynexportError(f"max_length: expected 1..{architecture.longest} tokens, found {shown(max_length)}{why}")
    return architecture.with_context(int(max_length))


def _rope_notes(architecture: Architecture) -> tuple[str, ...]:
    """Which of longrope's two sets of frequencies the bundle has, and what that means for its answers."""
    long = architecture.positions.long if isinstance(architecture.positions, Rotary) else None
    if long is None:
        return ()
    if architecture.max_length <= long.beyond:
        return (
            f"longrope: the short set of frequencies, PyTorch's for texts up to {long.beyond} tokens; --max-length "
            f"{long.beyond + 1} to {long.max_length} takes the long set",
        )
    return (
        f"longrope: the long set of frequencies for every text, as the context is {architecture.max_length} tokens; "
        f"PyTorch takes the short set up to {long.beyond} tokens, so answers to shorter texts differ from its, and "
        f"--max-length {long.beyond} gives those",
    )


def _write_graphs(
    part: Path,
    reader: WeightReader,
    contract: AnyContract,
    kept: tuple[m.Speedup, ...],
    precision: m.Precision,
    plans: tuple[GraphPlan, ...],
    built: Sequence[tuple[ir.Model, CausalLM]],
    target: Target,
    progress: Progress | None,
) -> m.Manifest:
    """Write every graph and the one file of weights that they share; the manifest of it, other files still missing."""
    checkpoint, architecture = reader.checkpoint, reader.architecture
    graphs = []
    with WeightFile(part / m.WEIGHTS, target, progress) as weights:
        for plan, (graph, modules) in zip(plans, built, strict=True):
            weights.store(modules, reader)
            ir.save(graph, part / f"{plan.name}.onnx")
            profiles = target.profiles(plan, contract, architecture.max_length)
            graphs.append(describe.describe_graph(graph, plan, profiles))
    return m.Manifest(
        schema_version=m.SCHEMA_VERSION,
        contract=contract,
        target=target.name,
        precision=precision,
        model=describe.describe_model(architecture, weights.elements),
        speedups=kept,
        graphs=tuple(graphs),
        cost=describe.describe_cost(architecture, weights.bytes_read, target),
        tokens=describe.describe_tokens(checkpoint, architecture.vocab_size),
        key_positions=describe.position_layers(graphs[0]),
        routed=describe.routed_caches(contract, architecture.max_length, padded=plans[0].padded),
        single_graph=describe.single_graph(plans),
        source=describe.describe_source(checkpoint),
        tools=describe.tool_versions(),
        files={m.WEIGHTS: weights.entry()},
    )


def read_contract(
    checkpoint: Checkpoint,
    strategy: str | None = None,
    speedups: Sequence[float] = (),
    rule: SkipRule | None = None,
    keep: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> AnyContract:
    """The checkpoint's contract with what the user asked for on top of it; ``changes`` may name any field."""
    speedups = checked_list("speedups", speedups, "numbers")
    if keep is not None:  # numbers of numpy as plain ones, which is what a contract has
        keep = [int(layer) if is_integer(layer) else layer for layer in checked_list("keep", keep, "layers")]
    changes = {} if changes is None else changes
    checked_kind("fields", changes, Mapping, "a mapping of the contract's fields")
    declared = checkpoint.config.get("dynexport")
    if declared is not None and not isinstance(declared, dict):
        raise DynexportError(f"{checkpoint.source}: config.json: dynexport: expected an object, found {declared!r}")
    name = strategy or (declared or {"strategy": "dense"}).get("strategy")
    if not isinstance(name, str) or name not in strategies():
        known = " or ".join(strategies())
        raise DynexportError(f"{checkpoint.source}: strategy: expected {known}, found {name!r}")
    if name != "unified-skip" and (speedups or rule is not None or keep is not None):
        raise _no_ratios(checkpoint, name, "speedups" if speedups else "keep" if keep is not None else "rule")
    fields: dict[str, Any] = dict(declared) if declared and declared.get("strategy") == name else {"strategy": name}
    if speedups:
        fields["speedups"] = tuple(speedups)
        fields.pop("keep", None)
    if rule is not None:
        fields["rule"] = rule
    if keep is not None:
        fields["keep"] = tuple(keep)
    fields = merged(fields, changes)
    if fields["strategy"] != name:
        raise DynexportError(
            f"{checkpoint.source}: contract: strategy: expected {name} among the fields to set, found "
            f"{fields['strategy']!r:.80}; choose it with --strategy"
        )
    if name == "mod" and "routed_layers" not in fields:
        raise _no_routed_layers(checkpoint)
    return parse_contract(fields, f"{checkpoint.source}: contract")


def _no_ratios(checkpoint: Checkpoint, strategy: str, field: str) -> DynexportError:
    option = f"--{field.removesuffix('s')}"
    return DynexportError(
        f"{checkpoint.source}: {option}: expected with the strategy unified-skip, whose contract has {field}, found "
        f"{strategy}; add --strategy unified-skip, or leave {option} out"
    )


def merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with changes on top of them; where both are objects, field by field. Names become strings, as in JSON."""
    result = {str(name): value for name, value in fields.items()}
    for name, change in changes.items():
        before = result.get(str(name))
        if isinstance(before, Mapping) and isinstance(change, Mapping):
            change = merged(before, change)
        result[str(name)] = change
    return result


def _no_routed_layers(checkpoint: Checkpoint) -> DynexportError:
    """What to do about a contract that does not say which layers are routed, from the routers that are there."""
    found = sorted(int(match[1]) for name in checkpoint.names if (match := _ROUTER.fullmatch(name)))
    if found:
        advice = f"the checkpoint has routers in layers {found}: --set 'routed_layers={found}'"
    else:
        advice = (
            "the checkpoint has no tensor model.layers.{i}.mod_router.weight either: give it routers, or name the "
            "code that has written it with --import"
        )
    return DynexportError(
        f"{checkpoint.source}: contract: routed_layers: expected the layers with a router, in config.json or with "
        f"--set 'routed_layers=[1,3]', found none; {advice}"
    )
