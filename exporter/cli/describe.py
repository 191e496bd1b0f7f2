"""A bundle in words and in JSON, as ``convert`` and ``inspect`` tell it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynexport.exporter.cli.output import bytes_text, layers_text
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.manifest import WEIGHTS, Depth, Manifest, SingleGraph
from dynexport.runtime.execution.cache import layer_slots
from dynexport.runtime.measure.cost import ideal_speedup, step_bytes
from dynexport.runtime.text.chat_template import TEMPLATE_FILE
from dynexport.runtime.text.text import TOKENIZER_FILE


def not_trained(manifest: Manifest, speedups: Iterable[Depth]) -> str | None:
    """A warning where some of the ratios are none that the checkpoint was trained for."""
    names = [speedup.name for speedup in speedups if not manifest.trained_for(speedup)]
    if not names:
        return None
    return (
        f"this checkpoint does not declare that it was trained to skip layers as the ratio {' or '.join(names)} does; "
        "expect worse text the more are skipped (dynexport eval BUNDLE --text FILE says how much)"
    )


def describe_bundle(manifest: Manifest) -> list[tuple[str, str]]:
    """Names and values for a table."""
    model, contract = manifest.model, manifest.contract
    return [
        ("strategy", contract.strategy),
        *(_describe_mod(contract, model.layers) if isinstance(contract, Mod) else ()),
        *(_describe_single_graph(manifest.single_graph) if manifest.single_graph else ()),
        (
            "family",
            f"{model.family}, {model.layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        ),
        ("parameters", f"{model.parameters / 1e6:.1f} M, stored as {manifest.precision}"),
        ("weights", bytes_text(manifest.files[WEIGHTS].bytes) if WEIGHTS in manifest.files else "-"),
        ("graphs", ", ".join(graph.file for graph in manifest.graphs)),
        ("context", f"{model.max_length} tokens"),
        ("tokenizer", _describe_tokenizer(manifest)),
        ("cache", _describe_cache(manifest)),
        (
            "read per step",
            f"{bytes_text(step_bytes(manifest, range(model.layers), 0))} at full depth, and the cache",
        ),
    ]


def _describe_tokenizer(manifest: Manifest) -> str:
    if TOKENIZER_FILE not in manifest.files:
        return "none: run takes --ids in place of text"
    return f"{TOKENIZER_FILE}, {'with a' if TEMPLATE_FILE in manifest.files else 'no'} chat template"


def _describe_mod(contract: Mod, layers: int) -> list[tuple[str, str]]:
    decision = contract.decision
    share = f"{contract.capacity:.4g} of the tokens, rounded by {contract.rounding}"
    if decision.rule == "always":
        rule = "always: every token runs"
    else:
        thresholds = {layer: contract.threshold(layer) for layer in contract.routed_layers}
        shown = " ".join(f"{value:.4g}" for value in dict.fromkeys(thresholds.values()))
        if len(set(thresholds.values())) > 1:
            shown = ", ".join(f"{value:.4g} in layer {layer}" for layer, value in thresholds.items())
        rule = f"{decision.rule}, probability {decision.comparison} {shown}"
    return [
        ("routed layers", f"{layers_text(contract.routed_layers)} ({len(contract.routed_layers)} of {layers})"),
        ("capacity", share),
        ("decision", rule),
        ("prompts", "routed by the same rule" if contract.prefill == "causal" else "top-k: the capacity's best tokens"),
    ]


def _describe_single_graph(single: SingleGraph) -> list[tuple[str, str]]:
    return [("one graph", f"layers have room for {100 * single.layer_capacity:g} % of a step's tokens")]


def _describe_cache(manifest: Manifest) -> str:
    size, share = _full_cache(manifest)
    if manifest.routed is None or not isinstance(manifest.contract, Mod):
        per_token = manifest.model.layers * manifest.cost.kv_per_token
        return f"{per_token} bytes per token, {bytes_text(size)} for a full context"
    return (
        f"{bytes_text(size)} for a full context, {share:.2f}x of dense; {manifest.routed.slots} entries in a routed "
        f"layer, overflow: {manifest.contract.cache.overflow}"
    )


def _full_cache(manifest: Manifest) -> tuple[int, float]:
    """Bytes of keys and values that a row of the whole context is given, and their share of a dense model's."""
    model = manifest.model
    slots = sum(layer_slots(manifest, layer, model.max_length) for layer in range(model.layers))
    return slots * manifest.cost.kv_per_token, slots / (model.layers * model.max_length)


def speedup_table(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what every ratio keeps, and what it can give at best."""
    rows = [
        [
            speedup.name,
            f"{len(speedup.keep)} of {manifest.model.layers}",
            layers_text(speedup.keep),
            f"{ideal_speedup(manifest, speedup.keep):.2f}x",
        ]
        for speedup in manifest.depths
    ]
    return ["speedup", "layers", "which", "ideal decode speed-up"], rows


def bundle_report(manifest: Manifest) -> dict[str, Any]:
    """The same as JSON."""
    size, share = _full_cache(manifest)
    return {
        "strategy": manifest.contract.strategy,
        "contract": manifest.contract.model_dump(mode="json"),
        "precision": manifest.precision,
        "model": manifest.model.model_dump(),
        "cache_bytes_per_token": manifest.model.layers * manifest.cost.kv_per_token,
        "cache_bytes": size,
        "cache_of_dense": share,
        "routed": manifest.routed.model_dump() if manifest.routed else None,
        "single_graph": manifest.single_graph.model_dump() if manifest.single_graph else None,
        "trained_for_its_strategy": manifest.trained_for_its_strategy,
        "speedups": [
            {
                **speedup.model_dump(mode="json"),
                "ideal_speedup": ideal_speedup(manifest, speedup.keep),
                "trained": manifest.trained_for(speedup),
            }
            for speedup in manifest.depths
        ],
        "graphs": [graph.model_dump(mode="json") for graph in manifest.graphs],
        "tokens": manifest.tokens.model_dump(),
        "source": manifest.source.model,
        "importer": manifest.source.importer,
        "tools": manifest.tools,
        "files": {name: file.model_dump() for name, file in manifest.files.items()},
    }
