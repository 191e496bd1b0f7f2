"""The interpreters and models of benchmarks/peers.py: a venv for each peer, and each peer's form of one GGUF file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# Versions that the tables in docs/benchmarks.md were measured with. llama.cpp is compiled for this machine, without its
# vision library; genai's builder needs PyTorch.
PACKAGES = {
    "llama": ("llama-cpp-python==0.3.36", "numpy"),
    "openvino": ("openvino-genai==2026.4.1", "numpy"),
    "genai": ("onnxruntime-genai==0.18.0", "numpy", "torch==2.13.0", "transformers", "onnx_ir"),
}
_ENVIRONMENT = {"llama": {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}}
_LLAMA_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_QUANTIZE = """
import ctypes, sys
import llama_cpp as api
how = api.llama_model_quantize_default_params()
how.allow_requantize, how.ftype = True, getattr(api, "LLAMA_FTYPE_" + sys.argv[3])
sys.exit(api.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(how)))
"""
_SAVE_OPENVINO = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
_OPENVINO_FROM = {"openvino-file": "file", "openvino-f16": "f16", "openvino-q8_0": "q8_0"}
_GENAI = ("fp32", "int8", "int4")

Say = Callable[[str], None]


class Failed(Exception):
    """A step that did not work, in one line."""


def python_of(home: Path, engine: str) -> Path:
    """Return the interpreter that has an engine: this one for dynexport."""
    return Path(sys.executable) if engine == "dynexport" else home / engine / "bin" / "python"


def install(home: Path, engines: Iterable[str], say: Say) -> None:
    """Make the venvs that are missing. Raises Failed."""
    for engine in engines:
        if engine not in PACKAGES:
            continue
        python = python_of(home, engine)
        marker = home / engine / "installed.json"
        if marker.exists() and json.loads(marker.read_text()) == list(PACKAGES[engine]):
            say(f"{engine}: installed already")
            continue
        say(f"{engine}: installing {', '.join(PACKAGES[engine])}{'; it compiles for minutes' * (engine == 'llama')}")
        run([sys.executable, "-m", "venv", str(home / engine)], f"{engine}: making {home / engine}")
        command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES[engine]]
        run(command, f"{engine}: pip", {**os.environ, **_ENVIRONMENT.get(engine, {})})
        marker.write_text(json.dumps(PACKAGES[engine]))


def prepare(home: Path, gguf: Path, engines: Iterable[str], say: Say) -> None:
    """Write the forms of a GGUF file that are missing under ``home``/models. Raises Failed."""
    models, engines = home / "models", set(engines)
    models.mkdir(parents=True, exist_ok=True)
    if not (models / "file.gguf").exists():
        shutil.copyfile(gguf, models / "file.gguf")
    if engines & {"llama", "openvino"}:
        for name, kind in _LLAMA_TYPES.items():
            _once(models / f"{name}.gguf", say, lambda at, kind=kind: _quantized(home, at, kind))
    if "openvino" in engines:
        for name, source in _OPENVINO_FROM.items():
            _once(models / name, say, lambda at, source=source: _openvino(home, at, source))
    if "genai" in engines:
        _once(models / "hf", say, lambda at: _checkpoint(models / "file.gguf", at))
        for precision in _GENAI:
            _once(models / f"genai-{precision}", say, lambda at, precision=precision: _genai(home, at, precision))


def _once(path: Path, say: Say, make: Callable[[Path], None]) -> None:
    """Make a file or directory under another name, and give it its name when it is whole."""
    if path.exists():
        return
    say(f"preparing {path}")
    part = path.with_name(f"part-{path.name}")
    shutil.rmtree(part, ignore_errors=True)
    make(part)
    part.rename(path)


def _quantized(home: Path, at: Path, kind: str) -> None:
    source = str(home / "models" / "file.gguf")
    run([str(python_of(home, "llama")), "-c", _QUANTIZE, source, str(at), kind], f"llama.cpp's quantize to {at}")


def _openvino(home: Path, at: Path, source: str) -> None:
    """Let OpenVINO read a GGUF file, and keep what it makes of it: it would convert at every load."""
    at.mkdir()
    shutil.copyfile(home / "models" / f"{source}.gguf", at / "model.gguf")
    run([str(python_of(home, "openvino")), "-c", _SAVE_OPENVINO, str(at / "model.gguf")], f"OpenVINO's reader to {at}")
    (at / "model.gguf").unlink()


def _checkpoint(gguf: Path, at: Path) -> None:
    """Write a GGUF file as a Hugging Face directory in float32."""
    from safetensors.numpy import save_file

    from dynexport.exporter.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(gguf)
    at.mkdir()
    (at / "config.json").write_text(json.dumps(checkpoint.config))
    for name, content in checkpoint.files.items():
        (at / name).write_bytes(content)
    save_file({name: checkpoint.read(name) for name in checkpoint.names}, at / "model.safetensors", {"format": "pt"})


def _genai(home: Path, at: Path, precision: str) -> None:
    models = home / "models"
    command = [str(python_of(home, "genai")), "-m", "onnxruntime_genai.models.builder", "-i", str(models / "hf")]
    command += ["-o", str(at), "-p", precision, "-e", "cpu", "-c", str(models / "genai-cache")]
    run(command, f"genai's builder to {at}")


def run(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """Run a command and return its output. Raises Failed with its last line, where it fails or cannot start."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise Failed(f"{what}: {command[0]}: {error.strerror}; run with --install") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Failed(f"{what}: exit code {done.returncode}: {lines[-1][:300]}")
    return done.stdout
