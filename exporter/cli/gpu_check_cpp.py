"""The check of ``gpu-check`` that the C++ runtime computes on a bundle's engines what the Python runtime does."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.backend import BackendName, module_of
from dynexport.runtime.execution.executor import Executor

_PROGRAM = "probe_tensorrt"
_PROMPT, _STEPS = 24, 32


class OtherVersion(DynexportError):
    """Raised when the C++ runtime was compiled for another version than that of the library here."""


def missing(backend: BackendName) -> str | None:
    """Return why the check cannot be made here; None if it can."""
    for name in (_PROGRAM, f"libdynexport_{module_of(backend)}.so"):
        if not (_build() / name).exists():
            return f"{_build() / name} is missing: run make cpp in a clone of the repository, with {backend}'s headers"
    return None


def compare(bundle: Bundle, backend: BackendName) -> str:
    """Compare tokens with the Python runtime, on the same engines: the tokens after a prompt and of greedy steps.

    Raises:
        OtherVersion: when the program was compiled for another version of TensorRT.
        DynexportError: when a token differs, or the program fails.
    """
    expected = _greedy(bundle, backend)
    prompt, steps = _run(bundle, backend, expected[0])
    found = [int(np.argmax(prompt["logits"][0][-bundle.manifest.model.vocab_size :])), *_tokens(steps)]
    if found != expected:
        place = next(i for i, (own, other) in enumerate(zip(found, expected, strict=True)) if own != other)
        raise DynexportError(
            f"token {place} after the prompt: expected {expected[place]} as from Python, found {found[place]}"
        )
    return f"{len(found)} greedy tokens as from Python"


def _greedy(bundle: Bundle, backend: BackendName) -> list[int]:
    executor, depth = Executor(bundle, backend=backend), bundle.depth(None)
    state = executor.full_cache(1, _PROMPT + _STEPS)
    logits = executor.prefill(state, [_prompt(bundle)], depth=depth)[0]
    tokens = [int(np.asarray(logits).reshape(-1, logits.shape[-1])[-1].argmax())]
    for _ in range(_STEPS):
        tokens.append(int(executor.step(state, np.array(tokens[-1:]), depth)[0].argmax()))
    return tokens


def _run(bundle: Bundle, backend: BackendName, first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    ops = [
        {"op": "cache", "rows": 1, "tokens": _PROMPT + _STEPS},
        {"op": "prompt", "rows": [0], "tokens": [_prompt(bundle)]},
        {"op": "decode", "rows": [0], "tokens": [first], "steps": _STEPS},
    ]
    request: dict[str, Any] = {"bundle": str(bundle.path), "backend": backend, "library": _library(backend), "ops": ops}
    request["trust"] = bundle.trust_engines
    done = subprocess.run([_build() / _PROGRAM], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        kind = OtherVersion if "was compiled for, found version" in last else DynexportError
        raise kind(f"{_PROGRAM} exited with {done.returncode}: {last.removeprefix('error: ')}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    for result in results:
        if "error" in result:
            raise DynexportError(result["error"])
    return results[1], results[2]


def _tokens(steps: dict[str, Any]) -> list[int]:
    return [int(row) for (row,) in steps["tokens"]]


def _prompt(bundle: Bundle) -> list[int]:
    return [token % bundle.manifest.model.vocab_size for token in range(3, 3 + _PROMPT)]


def _library(backend: BackendName) -> str:
    """Return the path of the library of the backend's Python package; empty if it has none."""
    spec = find_spec(f"{module_of(backend)}_libs")
    name = "libnvinfer.so.*" if backend == "tensorrt" else "libtensorrt_rtx.so.*"
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob(name))), "")


def _build() -> Path:
    return Path(os.environ.get("DYNEXPORT_CPP", "build/cpp")).resolve()


__all__ = ["OtherVersion", "compare", "missing"]
