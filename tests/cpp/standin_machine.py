"""Bundles with engines for the stand-ins that the C++ tests build, and programs that run on them in a GPU's place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import BUILD, Run

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.engines.tensorrt.backend import Backend, BackendName, BuildTarget
from dynexport.runtime.engines.tensorrt.build import recipe_of
from dynexport.runtime.engines.tensorrt.gpu import Gpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
from on_fake_gpu import CASES, CONTEXT, ROWS, convert_case, install, store_engine

Ops = list[dict[str, Any]]
STANDIN = BUILD / "standin"
# What the stand-ins are, unless a test says otherwise.
VERSION, GPU = "10.14.1.48", "Ada card"
HERE = Gpu(GPU, "8.9", "13.0")
STEP: Ops = [{"op": "cache", "rows": 2, "tokens": CONTEXT}, {"op": "decode", "rows": [0, 1], "tokens": [1, 2]}]

needs_standins = pytest.mark.skipif(
    not (STANDIN / "libnvinfer.so.10").exists(), reason="built without TensorRT's headers: pip install kernel-lens"
)


def built(
    path: Path,
    *,
    backend: BackendName = "tensorrt",
    version: str = VERSION,
    gpu: str = GPU,
    capability: str = "8.9",
    plugins: PluginLibrary | None = None,
    strip: bool = False,
) -> Path:
    """A bundle, with an engine of each of its graphs."""
    bundle, builder = Bundle.open(path), Backend(backend, None, version, ())
    for graph in bundle.manifest.graphs:
        target = BuildTarget((capability,), gpu)
        store_engine(bundle, graph, recipe_of(bundle, graph, builder, target, plugins, strip=strip))
    return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case's bundle, with engines."""

    @cache
    def make(case: str) -> Path:
        bundle = tmp_path_factory.mktemp(case) / "bundle"
        convert_case(case, bundle)
        return built(bundle)

    return make


class Machine:
    """The stand-ins in the places of CUDA and TensorRT, and what they told in the end."""

    def __init__(self, run: Run, reports: Path, patch: pytest.MonkeyPatch) -> None:
        self._run, self.reports, self._patch = run, reports, patch

    def talk(self, bundle: Path, ops: Ops, settings: dict[str, Any] | None = None, **request: Any) -> Any:
        """Results of operations, each ``{"error": ..}`` or what it gave."""
        done = self._started(bundle, ops, settings or {}, request)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        return json.loads(done.stdout)

    def refusal(self, bundle: Path, settings: dict[str, Any] | None = None, **request: Any) -> str:
        """The line that says why a bundle cannot be opened."""
        done = self._started(bundle, [], settings or {}, request)
        assert done.returncode == 2 and done.stdout == b"", done
        (line,) = done.stderr.decode().splitlines()
        return str(line)

    def told(self, part: str) -> Any:
        return json.loads((self.reports / f"{part}.json").read_text())

    def _started(self, bundle: Path, ops: Ops, settings: dict[str, Any], request: dict[str, Any]) -> Any:
        self._patch.setenv("LD_LIBRARY_PATH", str(STANDIN))
        self._patch.setenv("DYNEXPORT_STANDIN", json.dumps({"reports": str(self.reports), **settings}))
        what = {"bundle": str(bundle), "backend": "tensorrt", "ops": ops, **request}
        return self._run("probe_tensorrt", stdin=json.dumps(what).encode())


@pytest.fixture
def machine(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    reports = tmp_path / "reports"
    reports.mkdir()
    return Machine(run, reports, monkeypatch)


__all__ = [
    "CASES",
    "CONTEXT",
    "GPU",
    "HERE",
    "ROWS",
    "STANDIN",
    "STEP",
    "VERSION",
    "Machine",
    "Ops",
    "built",
    "engines",
    "install",
    "machine",
    "needs_standins",
]
