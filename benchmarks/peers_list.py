"""The lines of the table of benchmarks/peers.py: bundles and other runtimes, in groups that are compared."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from peers_prepare import python_of

MEASURE = Path(__file__).resolve().parent / "peers_measure.py"
GROUPS = ("fp32", "bf16", "int8", "4-bit")
_EXACT = ("INFERENCE_PRECISION_HINT=f32", "KV_CACHE_PRECISION=f32")


@dataclass(frozen=True)
class Peer:
    """A line of the table: an engine with a model and settings."""

    label: str
    engine: str
    group: str
    model: Path
    settings: tuple[str, ...] = ()

    def missing(self, home: Path) -> str | None:
        """Return what is not there, or None."""
        if not python_of(home, self.engine).exists():
            return "not installed (--install)"
        return None if self.model.exists() else f"no model {self.model.name} (--prepare)"

    def command(self, home: Path) -> list[str]:
        """Return the command of a measurement, without its shape."""
        told = [word for setting in self.settings for word in ("--set", setting)]
        return [str(python_of(home, self.engine)), str(MEASURE), self.engine, str(self.model), *told]


def others(models: Path) -> list[Peer]:
    """Return the lines of the other runtimes."""
    return [
        Peer("llama.cpp F32", "llama", "fp32", models / "f32.gguf"),
        Peer("OpenVINO f32", "openvino", "fp32", models / "openvino-f16", _EXACT),
        Peer("genai fp32", "genai", "fp32", models / "genai-fp32"),
        Peer("llama.cpp BF16", "llama", "bf16", models / "bf16.gguf"),
        Peer("OpenVINO bf16", "openvino", "bf16", models / "openvino-f16", ("INFERENCE_PRECISION_HINT=bf16",)),
        Peer("llama.cpp Q8_0", "llama", "int8", models / "q8_0.gguf"),
        Peer("OpenVINO Q8_0", "openvino", "int8", models / "openvino-q8_0"),
        Peer("genai int8", "genai", "int8", models / "genai-int8"),
        Peer("llama.cpp, the file", "llama", "4-bit", models / "file.gguf"),
        Peer("llama.cpp Q4_0", "llama", "4-bit", models / "q4_0.gguf"),
        Peer("OpenVINO, the file", "openvino", "4-bit", models / "openvino-file"),
        Peer("genai int4", "genai", "4-bit", models / "genai-int4"),
    ]


def our_bundle(text: str) -> Peer:
    """Return the line of GROUP=BUNDLE or GROUP=BUNDLE@DEPTH."""
    group, equals, place = text.partition("=")
    path, _, depth = place.partition("@")
    if not equals or group not in GROUPS:
        raise argparse.ArgumentTypeError(f"expected GROUP=BUNDLE with a group of {', '.join(GROUPS)}, found {text!r}")
    name = f"dynexport {Path(path).name}{f' at {depth}' if depth else ''}"
    return Peer(name, "dynexport", group, Path(path), (f"depth={depth}",) if depth else ())
