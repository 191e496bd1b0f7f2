"""Small bundles of every strategy and form of graph, opened once a session."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from bundles import CONFORMANCE

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle
from dynexport.runtime.execution.executor import Executor

CONTEXT = 40
# Fewer hops make graphs that load sooner.
HOPS = {"max_steps": 3, "min_steps": 0}
INT8_CACHES: dict[str, Any] = {"kv_cache_dtype": "int8", "kv_cache_text": [(7 * token) % 61 for token in range(240)]}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "skip": ("skip-2x", {"speedups": [2, 1.5]}),
    "skip-static": ("skip-2x", {"speedups": [2, 1.5], "static": True}),
    "skip-tensorrt": ("skip-2x", {"speedups": [2, 1.5], "target": "tensorrt", "max_batch": 8}),
    "skip-plugins": ("skip-2x", {"speedups": [2, 1.5], "plugins": True}),
    "skip-int8-caches": ("skip-2x", {"speedups": [2, 1.5], **INT8_CACHES}),
    "mod-int8-caches": ("mod-router", {"fields": {"cache": {"capacity": 0.5}}, **INT8_CACHES}),
    "mod": ("mod-router", {"fields": {"cache": {"capacity": 0.5}}}),
    "mod-padded": ("mod-router", {"fields": {"cache": {"capacity": 0.5}}, "static": True}),
    "mod-tensorrt": ("mod-router", {"target": "tensorrt", "max_batch": 8}),
    "radial-step": ("radial-step", {"fields": HOPS}),
    "radial-layer": ("radial-layer", {"fields": HOPS}),
    "radial-single-step": ("radial-step", {"fields": HOPS, "layer_capacity": 1.0}),
    "radial-single-layer": ("radial-layer", {"fields": HOPS, "layer_capacity": 1.0}),
    "radial-decode-graph": ("radial-step", {"fields": HOPS, "target": "tensorrt", "plugins": True, "max_batch": 8}),
}
# Forms whose steps are those of other forms: what serves rows is tested with them, too.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "early-exit": ("early-exit-prompt-exit", {}),
    "loop-exit": ("loop-exit-last", {}),
    "huginn-exit": ("loop-huginn-change", {}),
    "mod-sequence": ("mod-router", {"fields": {"level": "sequence", "gate": "none"}}),
}


@cache
def executor_of(form: str) -> Executor:
    """Convert a checkpoint of the conformance set for a context of 40 tokens, and open it."""
    case, how = {**FORMS, **SERVED}[form]
    path = Path(mkdtemp(prefix=f"{form}-")) / "bundle"
    convert(CONFORMANCE / case, path, max_length=CONTEXT, golden=False, **how)
    return Executor(Bundle.open(path), threads=1)


__all__ = ["CONTEXT", "FORMS", "SERVED", "executor_of"]
