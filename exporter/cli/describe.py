"""Description of a bundle as text and JSON, for ``convert`` and ``inspect``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynexport.exporter.cli.output import bytes_text, layers_text
from dynexport.runtime.bundle.layout import CacheLayout
from dynexport.runtime.bundle.manifest import WEIGHTS, Depth, LayerRouting, Manifest, PathRouting
from dynexport.runtime.bundle.text_files import TEMPLATE_FILE, TOKENIZER_FILE
from dynexport.runtime.measure.cost import ideal_speedup, step_bytes
from dynexport.runtime.measure.startup import Startup


def start_text(startup: Startup) -> str:
    """Return the times of a start as one line."""
    begin, first, cached = startup.begin_seconds, startup.first_token_seconds, startup.page_cache_share
    parts = [
        "" if begin is None else f"interpreter and imports {begin:.2f} s, ",
        f"load {startup.load_seconds:.2f} s",
        "" if first is None else f", first token {first:.2f} s after the process began",
        "; not known how much of the bundle was in the page cache"
        if cached is None
        else f"; {cached:.0%} of the bundle was in the page cache",
    ]
    return "".join(parts)


def not_trained(manifest: Manifest, depths: Iterable[Depth]) -> str | None:
    """Return a warning if the checkpoint was not trained for some of the depths, else None."""
    named = [f"{depth.name} ({kept_text(manifest, depth)})" for depth in depths if not depth.trained]
    if not named:
        return None
    from dynexport.exporter.strategies import strategies

    sentence = strategies()[manifest.contract.strategy].untrained.format(" or ".join(named))
    return f"{sentence} (measure it with dynexport eval BUNDLE --text FILE)"


def kept_text(manifest: Manifest, depth: Depth) -> str:
    """Return the number of layers that a generated token runs at a depth: "4 of 8 layers"."""
    return f"{len(depth.keep)} of {manifest.model.layers} layers"


def describe_bundle(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the names and values of a bundle's table."""
    from dynexport.exporter.strategies import strategies

    model, contract = manifest.model, manifest.contract
    return [
        ("strategy", contract.strategy),
        *_describe_routing(manifest),
        *strategies()[contract.strategy].describe(manifest),
        (
            "family",
            f"{model.family}, {model.layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        ),
        ("parameters", f"{model.parameters / 1e6:.1f} M, stored as {manifest.precision}"),
        ("weights", bytes_text(manifest.files[WEIGHTS].bytes) if WEIGHTS in manifest.files else "-"),
        ("graphs", ", ".join(graph.file for graph in manifest.files_with_graphs)),
        ("context", f"{model.max_length} tokens"),
        ("tokenizer", _describe_tokenizer(manifest)),
        ("cache", _describe_cache(manifest)),
        *_describe_ngrams(manifest),
        (
            "read per step",
            f"{bytes_text(step_bytes(manifest, range(model.layers), 0))} at full depth, and the cache",
        ),
    ]


def _describe_ngrams(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the name and value that describe the table that drafts; none without one."""
    found = manifest.ngrams
    if found is None:
        return []
    return [("n-grams", f"{found.entries} from {found.tokens} tokens, {found.acceptance:.0%} of drafts expected right")]


def _describe_tokenizer(manifest: Manifest) -> str:
    if TOKENIZER_FILE not in manifest.files:
        return "none: run takes --ids in place of text"
    return f"{TOKENIZER_FILE}, {'with a' if TEMPLATE_FILE in manifest.files else 'no'} chat template"


def _describe_routing(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the names and values that describe the routing."""
    routing, layers = manifest.routing, manifest.model.layers
    if isinstance(routing, LayerRouting) and routing.span > 1:
        return []  # the strategy tells what its decisions are about
    if isinstance(routing, LayerRouting):
        return [("routed layers", f"{layers_text(routing.layers)} ({len(routing.layers)} of {layers})")]
    if not isinstance(routing, PathRouting):
        return []
    leave = f"exit after {routing.min_hops} hops or later" if routing.exit else "no early exit"
    again = "a token may run a layer again" if routing.reuse else "a token runs a layer at most once"
    told = [
        ("paths", f"{routing.hops} hops through {layers} layers; {leave}; {again}"),
        ("caches", f"one per {routing.places.removesuffix('s')}"),
    ]
    if manifest.program("prompt", manifest.full).graph is not None:
        told.append(("one graph", f"a layer has room for {100 * routing.layer_capacity:g} % of a call's tokens"))
    return told


def _describe_cache(manifest: Manifest) -> str:
    size, share = _full_cache(manifest)
    rounded = "int8, " if manifest.cache_text else ""
    routed = [cache.most for cache in manifest.caches if cache.most is not None]
    if isinstance(manifest.routing, LayerRouting) and routed:
        return (
            f"{rounded}{bytes_text(size)} for a full context, {share:.2f}x of full depth's; {min(routed)} entries in a "
            f"routed layer, overflow: {manifest.routing.overflow}"
        )
    most = "at most " if manifest.routing else ""
    return f"{rounded}{most}{_cache_per_token(manifest)} bytes per token, {bytes_text(size)} for a full context"


def _cache_per_token(manifest: Manifest) -> int:
    """Return the most bytes of keys and values that one token stores."""
    return sum(cache.per_token * manifest.cost.kv_in(cache.place) for cache in manifest.caches)


def _full_cache(manifest: Manifest) -> tuple[int, float]:
    """Return the bytes of a row's caches for a full context, and their ratio to one slot per token and layer."""
    model, cost, layout = manifest.model, manifest.cost, CacheLayout(manifest)
    found = sum(layout.slots(place, model.max_length) * cost.kv_in(place) for place in range(layout.places))
    return found, found / (model.max_length * sum(cost.kv_in(layer) for layer in range(model.layers)))


def depth_table(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: kept layers and ideal speed-up of every depth."""
    rows = [
        [
            depth.name,
            f"{len(depth.keep)} of {manifest.model.layers}",
            layers_text(depth.keep),
            f"{ideal_speedup(manifest, depth.keep):.2f}x",
        ]
        for depth in manifest.depths
    ]
    return ["depth", "layers", "which", "ideal decode speed-up"], rows


def bundle_report(manifest: Manifest) -> dict[str, Any]:
    """Return a bundle's description for the JSON report."""
    size, share = _full_cache(manifest)
    parts = ("contract", "routing", "drafting", "limits", "model", "tokens", "programs", "caches", "graphs", "files")
    told = manifest.model_dump(mode="json", include={*parts, "trained", "precision", "tools"})
    return {
        "strategy": manifest.contract.strategy,
        **told,
        "cache_bytes_per_token": _cache_per_token(manifest),
        "cache_bytes": size,
        "cache_share": share,
        "depths": [
            {**depth.model_dump(mode="json"), "ideal_speedup": ideal_speedup(manifest, depth.keep)}
            for depth in manifest.depths
        ],
        "source": manifest.source.model,
        "importer": manifest.source.importer,
        "adapter": manifest.source.adapter,
    }
