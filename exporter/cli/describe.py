"""A bundle in words and in JSON, as ``convert`` and ``inspect`` tell it."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.cli.output import bytes_text, layers_text
from dynexport.runtime.cost import ideal_speedup, step_bytes
from dynexport.runtime.manifest import WEIGHTS, Manifest

NOT_TRAINED = (
    "this checkpoint does not declare that it was trained to skip layers; expect worse text the more are skipped "
    "(dynexport eval BUNDLE --text FILE says how much)"
)


def describe_bundle(manifest: Manifest) -> list[tuple[str, str]]:
    """Names and values for a table."""
    model, cost = manifest.model, manifest.cost
    per_token = model.layers * cost.kv_per_token
    return [
        ("strategy", manifest.contract.strategy),
        (
            "family",
            f"{model.family}, {model.layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        ),
        ("parameters", f"{model.parameters / 1e6:.1f} M, stored as {manifest.precision}"),
        ("weights", bytes_text(manifest.files[WEIGHTS].bytes) if WEIGHTS in manifest.files else "-"),
        ("graphs", ", ".join(graph.file for graph in manifest.graphs)),
        ("context", f"{model.max_length} tokens"),
        (
            "cache",
            f"{per_token} bytes per token, {bytes_text(per_token * model.max_length)} for a full context",
        ),
        (
            "read per step",
            f"{bytes_text(step_bytes(manifest, range(model.layers), 0))} at full depth, and the cache",
        ),
    ]


def speedup_table(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what every ratio keeps, and what it can give at best."""
    rows = [
        [
            speedup.name,
            f"{len(speedup.keep)} of {manifest.model.layers}",
            layers_text(speedup.keep),
            f"{ideal_speedup(manifest, speedup.keep):.2f}x",
        ]
        for speedup in manifest.speedups
    ]
    return ["speedup", "layers", "which", "ideal decode speed-up"], rows


def bundle_report(manifest: Manifest) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "strategy": manifest.contract.strategy,
        "contract": manifest.contract.model_dump(mode="json"),
        "precision": manifest.precision,
        "model": manifest.model.model_dump(),
        "cache_bytes_per_token": manifest.model.layers * manifest.cost.kv_per_token,
        "trained_for_its_strategy": manifest.trained_for_its_strategy,
        "speedups": [
            {**speedup.model_dump(mode="json"), "ideal_speedup": ideal_speedup(manifest, speedup.keep)}
            for speedup in manifest.speedups
        ],
        "graphs": [graph.model_dump(mode="json") for graph in manifest.graphs],
        "tokens": manifest.tokens.model_dump(),
        "source": manifest.source.model,
        "tools": manifest.tools,
        "files": {name: file.model_dump() for name, file in manifest.files.items()},
    }
