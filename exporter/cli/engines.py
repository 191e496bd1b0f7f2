"""Description of a bundle's engines as text and JSON, for ``build`` and ``inspect --engine``."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.cli.output import Output, bytes_text
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.backend import BACKENDS, BackendName, BuildTarget, open_backend
from dynexport.runtime.engines.tensorrt.check import Here, mismatch
from dynexport.runtime.engines.tensorrt.gpu import Gpu, find_gpu
from dynexport.runtime.engines.tensorrt.inspector import engine_layers
from dynexport.runtime.engines.tensorrt.plugins import our_plugins
from dynexport.runtime.engines.tensorrt.shapes import profiles_text
from dynexport.runtime.engines.tensorrt.store import Stored, stored_engines


def what_is_here() -> Here:
    """Return the available backends, the GPU and dynexport's plugins."""
    versions: dict[BackendName, str] = {}
    for name in BACKENDS:
        try:
            versions[name] = open_backend(name).version
        except DynexportError:
            continue
    return Here(versions, find_gpu(), our_plugins().sha256)


def show_engines(out: Output, bundle: Bundle) -> list[dict[str, Any]]:
    """Show every engine of a bundle: its build, whether it runs on this machine, and then its layers.

    Returns:
        The engines' entries of the JSON report.
    """
    here = what_is_here()
    found = stored_engines(bundle)
    if not found:
        out.say(f"{bundle.path}: no engines; build some with: dynexport build {bundle.path} --backend tensorrt-rtx")
    reports = [_show(out, bundle, item, here) for item in found]
    if found and not isinstance(here.gpu, Gpu):
        out.say(f"layers are not shown: only a GPU can load an engine, and there is none ({here.gpu.reason})")
    return reports


def engine_report(stored: Stored) -> dict[str, Any]:
    """Return an engine's entry of the JSON report."""
    return {"file": stored.path.name, "key": stored.record.recipe.key, **stored.record.model_dump(mode="json")}


def _show(out: Output, bundle: Bundle, item: Stored | DynexportError, here: Here) -> dict[str, Any]:
    if isinstance(item, DynexportError):
        out.warn(str(item))
        return {"problem": str(item)}
    record, recipe = item.record, item.record.recipe
    problem, layers = _layers(bundle, item, here)
    plugins = f"{recipe.plugins_sha256[:16]}.." if recipe.plugins_sha256 else "none"
    out.facts(
        item.path.name,
        [
            ("graph", recipe.graph.name),
            ("built by", f"{recipe.backend} {recipe.backend_version}"),
            ("built for", str(BuildTarget(recipe.compute_capabilities, recipe.gpu))),
            ("profiles", profiles_text(record.profiles) or "fixed sizes"),
            ("plugins", plugins),
            ("weights", "the bundle's" if recipe.stripped else "its own"),
            ("size", bytes_text(record.engine.bytes)),
            ("build", f"{record.build_seconds:.1f} s, {bytes_text(record.peak_bytes)} at most"),
            ("here", problem or "runs"),
        ],
    )
    if layers is not None:
        out.table(f"Layers of {item.path.name}", ["layer"], [[name] for name in layers])
    return {**engine_report(item), "problem": problem, "layers": layers}


def _layers(bundle: Bundle, stored: Stored, here: Here) -> tuple[str | None, list[str] | None]:
    """Return (the reason why an engine does not run here, None) or (None, its layers)."""
    found = mismatch(bundle, stored.record, here)
    try:
        stored.check()
        return (f"does not run: {found}", None) if found else (None, engine_layers(stored, here))
    except DynexportError as error:
        return str(error), None
