"""``dynexport doctor``: show what is available on this machine, and how to fix what is missing."""

from __future__ import annotations

from importlib import metadata

import click

from dynexport.exporter.cli.output import Output, bytes_text, json_option
from dynexport.plugins.cpu_library import CpuLibrary, find_library
from dynexport.runtime.bundle.machine import Machine
from dynexport.runtime.engines.tensorrt.diagnosis import diagnose

_NEEDED = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "tokenizers",
    "gguf",
    "pydantic",
)
_OPTIONAL = {
    "torch": "golden vectors and verify --against",
    "transformers": "golden vectors and verify --against",
}


@click.command(
    epilog="""\b
Examples:
  dynexport doctor
  dynexport doctor --json -"""
)
@json_option
def doctor(json_path: str | None) -> None:
    """Show the machine, the packages and the kernels that dynexport relies on."""
    out = Output(json_path)
    machine = Machine.this()
    packages = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    kernels = _kernels()
    out.facts(
        "Machine",
        [
            ("processor", machine.cpu),
            ("cores", str(machine.cores)),
            ("memory", bytes_text(machine.memory_bytes)),
            ("system", f"{machine.system}, Python {machine.python}"),
        ],
    )
    rows = []
    for name, version in packages.items():
        use = _OPTIONAL.get(name, "everything")
        rows.append(
            [
                name,
                version or "missing",
                use if version else f"needed for {use}; fix: pip install 'dynexport[torch]'",
            ]
        )
    out.table("Packages", ["package", "version", "for"], rows)
    out.table(
        "Kernels of ONNX Runtime's CPU provider",
        ["operator", ""],
        [
            [name, "available" if there else "missing; fix: pip install 'onnxruntime>=1.31'"]
            for name, there in kernels.items()
        ],
    )
    operators = find_library()
    out.facts("dynexport's CPU operators", [("library", _library_text(operators))])
    findings = diagnose()
    out.facts("TensorRT", [(finding.subject, ("" if finding.good else "! ") + finding.found) for finding in findings])
    out.report(
        {
            "machine": machine.model_dump(),
            "packages": packages,
            "kernels": kernels,
            "cpu_operators": _library_report(operators),
            "tensorrt": [finding.model_dump() for finding in findings],
        }
    )


def _library_text(library: CpuLibrary | str) -> str:
    if isinstance(library, CpuLibrary):
        return f"{library.version}, kernels for {library.kernels}, {library.path}"
    return f"{library}; graphs that convert --plugins makes run their bodies; fix: make operators (docs/plugins.md)"


def _library_report(library: CpuLibrary | str) -> dict[str, str]:
    if isinstance(library, CpuLibrary):
        return {"path": str(library.path), "version": library.version, "kernels": library.kernels}
    return {"missing": library}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernels() -> dict[str, bool]:
    """Return operator -> whether the installed ONNX Runtime has a CPU kernel, by its kernel list."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    there = {k.op_name for k in state.get_all_opkernel_def() if k.provider == "CPUExecutionProvider"}
    wanted = (
        "GroupQueryAttention",
        "FusedMatMul",
        "MatMulNBits",
        "GatherBlockQuantized",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "RMSNormalization",
        "RotaryEmbedding",
        "TensorScatter",
        "QuickGelu",
    )
    return {name: name in there for name in wanted}
