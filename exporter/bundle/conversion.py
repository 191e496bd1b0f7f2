"""The conversion of a checkpoint into a bundle; the pipeline reads from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dynexport.exporter.bundle import describe
from dynexport.exporter.bundle.cache_scales import ScaleText, scale_text, with_int8_caches
from dynexport.exporter.bundle.calibrated import Calibrated
from dynexport.exporter.bundle.contract import read_contract
from dynexport.exporter.bundle.leftovers import check_leftovers
from dynexport.exporter.bundle.options import ConvertOptions
from dynexport.exporter.bundle.precision import (
    StoredMatrices,
    choose_precision,
    expert_notes,
    is_small,
    rounded_notes,
    stored_matrices,
)
from dynexport.exporter.bundle.sensitive import choose_sensitive
from dynexport.exporter.bundle.text_checks import text_checks
from dynexport.exporter.bundle.ties import tied_as_stored
from dynexport.exporter.bundle.weights import Changes, Pack, WeightFile, WeightReader
from dynexport.exporter.bundle.writer import replacing
from dynexport.exporter.checkpoint.sizes import check_sizes
from dynexport.exporter.families import find_family, read_architecture
from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.parity.golden import write_golden
from dynexport.exporter.strategies import strategies
from dynexport.exporter.strategies.importing import open_imported
from dynexport.runtime.bundle import manifest as m
from dynexport.runtime.bundle.checks import checked_kind, checked_path, is_integer, shown
from dynexport.runtime.bundle.contract import AnyContract
from dynexport.runtime.bundle.errors import DynexportError, printable
from dynexport.runtime.bundle.machine import peak_memory
from dynexport.runtime.generation.generation_config import GENERATION_CONFIG, read_generation_config


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        output: the bundle.
        manifest: its manifest.
        golden: number of golden rows written; 0 without torch.
        note: the reason why there are no golden vectors, or "".
        notes: assumptions and changes made when the checkpoint was read, and the choice of rotary frequencies, one
            line each.
        matrices: for precision gguf, what the matrices of each stored type became; else empty.
        seconds: wall time.
        peak_memory: the peak memory of this process since its start, in bytes.
    """

    output: Path
    manifest: m.Manifest
    golden: int
    note: str
    notes: tuple[str, ...]
    matrices: tuple[StoredMatrices, ...]
    seconds: float
    peak_memory: int


def convert(model: str | Path, output: str | Path, options: ConvertOptions | None = None, **named: Any) -> Conversion:
    """Convert a model into a bundle.

    Args:
        model: a Hugging Face directory, a hub id, or a ``.gguf`` file.
        output: the bundle's directory; an earlier bundle there is replaced when the new one is complete.
        options: the options of the conversion; None for the defaults.
        named: fields of ``ConvertOptions``, which override ``options``.

    Raises:
        DynexportError: for anything wrong with the model or the options; ``output`` is then left as it was.
        TypeError: for a name that ``ConvertOptions`` does not have.
    """
    started = time.perf_counter()
    output = checked_path("output", output)
    options = ConvertOptions() if options is None else options
    checked_kind("options", options, ConvertOptions, "ConvertOptions")
    options = replace(options, **named)
    options.check_form()
    options.open_target()  # refused now rather than when the model has been read
    reader = _open(model, options)
    checkpoint = reader.checkpoint
    precision, precision_notes = choose_precision(options, checkpoint)
    target = (
        options.open_target(precision, reader.segments, float_activations=is_small(checkpoint))
        if precision == "gguf"
        else options.open_target(precision)
    )
    built = _build(reader, options, target)
    texts = _texts(options, checkpoint.files)
    with replacing(output) as part:
        written = _write(part, built, options, texts)
    manifest = written.manifest
    matrices = stored_matrices(reader, [modules for _, modules in built.graphs], written.changes)
    notes = (
        *checkpoint.notes,
        *_rope_notes(reader.architecture),
        *describe.notes_on_tokens(checkpoint, manifest.tokens),
        *precision_notes,
        *expert_notes(options, precision, reader.architecture),
        *written.notes,
        *rounded_notes(matrices),
    )
    return Conversion(
        output=output,
        manifest=manifest,
        golden=written.rows,
        note=written.note,
        notes=notes,
        matrices=matrices,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )


def _open(model: str | Path, options: ConvertOptions) -> WeightReader:
    """Open and check the checkpoint; return a reader of it with its architecture."""
    checkpoint = open_imported(model, options.importer, tokenizer=options.tokenizer, adapter=options.adapter)
    check_sizes(checkpoint)
    read_generation_config(checkpoint.files.get(GENERATION_CONFIG, b"{}"))  # refused now rather than by each run
    architecture = _limited(read_architecture(checkpoint.config), options.max_length)
    reader = WeightReader(checkpoint, find_family(checkpoint.config), architecture)
    reader.architecture = tied_as_stored(reader)
    return reader


@dataclass(frozen=True)
class _Built:
    """The graphs to write: a plan for each, and its ONNX graph and modules, whose weights have no values yet.

    ``architecture`` has the layers that a token runs, ``reader.architecture`` those of the checkpoint.
    """

    reader: WeightReader
    architecture: Architecture
    target: Target
    contract: AnyContract
    kept: tuple[m.Depth, ...]
    plans: tuple[GraphPlan, ...]
    graphs: list[tuple[ir.Model, CausalLM]]


def _build(reader: WeightReader, options: ConvertOptions, target: Target) -> _Built:
    """Read the contract, plan the graphs and build them; raise DynexportError for tensors that they do not use."""
    checkpoint, architecture = reader.checkpoint, reader.architecture
    contract = read_contract(checkpoint, options.strategy, options.speedups, options.rule, options.keep, options.fields)
    target.longest_prompt(architecture.max_length)  # refused now rather than when weights are written
    strategy = strategies()[contract.strategy]
    if architecture.as_declared and strategy.declares(architecture) is None:
        raise DynexportError(
            f"{checkpoint.source}: strategy: expected the one that a {architecture.family} declares, as others leave "
            f"out a part of the model, found {contract.strategy}"
        )
    architecture = strategy.architecture(contract, architecture)
    reader.architecture = replace(reader.architecture, sources=architecture.sources)
    layers = architecture.layers
    strategy.check(contract, architecture, target)
    if options.kv_cache_dtype == "int8" and architecture.sinks:
        raise DynexportError(
            f"kv_cache_dtype: expected auto for the attention sinks of {architecture.family}, found int8"
        )
    if options.kv_cache_dtype == "int8" and (why := strategy.without_int8_caches(contract)):
        raise DynexportError(f"kv_cache_dtype: expected auto with the strategy {contract.strategy}, {why}, found int8")
    kept = strategy.depths(contract, layers)
    if options.layer_capacity is None:
        plans = strategy.graphs(contract, kept, layers, target=target, static=options.static)
    else:
        plans = (strategy.single_graph(contract, layers, options.layer_capacity, target=target),)
    graphs = _graphs(reader, architecture, target, contract, plans)
    needed = {name for _, modules in graphs for name in reader.needed(modules)}
    checkpoint.notes += check_leftovers(
        reader, needed, contract, chosen=options.strategy is not None, changed=bool(options.fields)
    )
    return _Built(
        reader=reader,
        architecture=architecture,
        target=target,
        contract=contract,
        kept=kept,
        plans=plans,
        graphs=graphs,
    )


def _graphs(
    reader: WeightReader, architecture: Architecture, target: Target, contract: AnyContract, plans: Sequence[GraphPlan]
) -> list[tuple[ir.Model, CausalLM]]:
    strategy = strategies()[contract.strategy]
    return [strategy.build(plan, architecture, target, contract, reader.checkpoint) for plan in plans]


@dataclass(frozen=True)
class _Texts:
    """The texts to measure on: inputs of projections (gptq), and scales of int8 caches; None for what is not asked."""

    inputs: ScaleText | None
    scales: ScaleText | None


def _texts(options: ConvertOptions, files: Mapping[str, bytes]) -> _Texts:
    gptq, int8 = options.quantiser == "gptq", options.kv_cache_dtype == "int8"
    return _Texts(
        scale_text(options.quantiser_text, files, "quantiser_text") if gptq else None,
        scale_text(options.kv_cache_text, files, "kv_cache_text") if int8 else None,
    )


@dataclass(frozen=True)
class _Written:
    """A bundle's files: its manifest, its golden rows or why there are none, ``WeightFile.changes``, and notes."""

    manifest: m.Manifest
    rows: int
    note: str
    changes: Changes
    notes: tuple[str, ...]


def _write(part: Path, built: _Built, options: ConvertOptions, texts: _Texts) -> _Written:
    """Write all files of a bundle."""
    checkpoint, notes = built.reader.checkpoint, []
    manifest, changes = _write_graphs(part, built, options)
    if texts.inputs is not None:
        # The PyTorch reference is made for a bundle's manifest, so the bundle is written once before.
        calibrated = Calibrated(built.reader, manifest, [modules for _, modules in built.graphs], texts.inputs)
        if options.sensitive is not None:
            chosen = choose_sensitive(calibrated, built.reader, options.sensitive)
            target = options.open_target(kept=chosen.kept)
            graphs = _graphs(built.reader, built.architecture, target, built.contract, built.plans)
            built, notes = replace(built, target=target, graphs=graphs), [chosen.note]
        manifest, changes = _write_graphs(part, built, options, calibrated.pack)
    if texts.scales is not None:
        manifest = with_int8_caches(
            part, manifest, [graph for graph, _ in built.graphs], texts.scales, built.architecture
        )
    for name, content in {**checkpoint.files, **text_checks(checkpoint.files)}.items():
        (part / name).write_bytes(content)
    rows, note = write_golden(part / m.GOLDEN, checkpoint, manifest) if options.golden else (0, "left out as asked")
    files = {path.name: m.File.of(path) for path in sorted(part.iterdir()) if path.name not in manifest.files}
    adapter = None if options.adapter is None else printable(str(options.adapter))
    source = manifest.source.model_copy(update={"adapter": adapter})
    manifest = manifest.model_copy(update={"files": {**manifest.files, **files}, "source": source})
    (part / m.MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    return _Written(manifest, rows, note, changes, tuple(notes))


def _limited(architecture: Architecture, max_length: int | None) -> Architecture:
    """Return the architecture for a context of ``max_length`` tokens, or unchanged for None."""
    if max_length is None:
        return architecture
    if not is_integer(max_length) or not 1 <= max_length <= architecture.longest:
        dynamic = isinstance(architecture.positions, Rotary) and architecture.positions.rope_type == "dynamic"
        why = "; beyond, dynamic rope changes its frequencies with the length of each text" if dynamic else ""
        raise DynexportError(f"max_length: expected 1..{architecture.longest} tokens, found {shown(max_length)}{why}")
    return architecture.with_context(int(max_length))


def _rope_notes(architecture: Architecture) -> tuple[str, ...]:
    """Return notes that say which of longrope's two sets of frequencies the bundle uses."""
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
    part: Path, built: _Built, options: ConvertOptions, pack: Pack | None = None
) -> tuple[m.Manifest, Changes]:
    """Write every graph and their shared weight file.

    Returns:
        The manifest, which does not list other files yet, and ``WeightFile.changes``.
    """
    reader, target, contract, plans, depths = built.reader, built.target, built.contract, built.plans, built.kept
    checkpoint, architecture = reader.checkpoint, built.architecture
    strategy, context = strategies()[contract.strategy], architecture.max_length
    graphs: list[m.Graph] = []
    with WeightFile(part / m.WEIGHTS, target, options.progress, pack) as weights:
        for plan, (graph, modules) in zip(plans, built.graphs, strict=True):
            weights.store(modules, reader)
            ir.save(graph, part / f"{plan.name}.onnx")
            profiles = target.profiles(plan, context)
            graphs += describe.describe_graphs(graph, plan, architecture, profiles)
    programs, routing = strategy.programs(contract, plans, depths), strategy.routing(contract, plans)
    limits = strategy.limits(contract, context, plans)
    ragged = routing is None and target.attends_ragged and not architecture.sinks
    manifest = m.Manifest(
        schema_version=m.SCHEMA_VERSION,
        contract=contract,
        trained=describe.is_trained(checkpoint, contract),
        target=target.name,
        precision=target.precision,
        model=describe.describe_model(architecture, weights.elements),
        depths=tuple(describe.mark_trained(checkpoint, strategy, contract, depths)),
        programs=programs,
        graphs=tuple(graphs),
        caches=describe.describe_caches(
            graphs,
            strategy.places(contract, architecture.layers),
            lambda place: strategy.slots(contract, place, context, plans),
        ),
        routing=routing,
        limits=describe.describe_limits(graphs, programs, limits, ragged=ragged),
        cost=describe.describe_cost(
            architecture,
            weights.bytes_read,
            target,
            strategy.router_weights(contract, architecture),
            strategy.cost_parts(contract),
            strategy.read_by(contract, architecture.layers),
        ),
        operators=describe.our_operators([graph for graph, _ in built.graphs]),
        tokens=describe.describe_tokens(checkpoint, architecture.vocab_size),
        source=describe.describe_source(checkpoint),
        tools=describe.tool_versions(),
        files={m.WEIGHTS: weights.entry()},
    )
    return manifest, weights.changes
