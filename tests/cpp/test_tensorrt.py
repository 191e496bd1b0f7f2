"""The C++ runtime on TensorRT's engines, on stand-ins for CUDA and TensorRT that compute: as Python on ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import replace_file
from conftest import BUILD, Run
from tiny_models import random_rows

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.engines.tensorrt import backend as backends
from dynexport.runtime.engines.tensorrt.backend import Backend, BackendName, BuildTarget
from dynexport.runtime.engines.tensorrt.build import recipe_of
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.execution.executor import Executor

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
from on_fake_gpu import CASES, CONTEXT, ROWS, convert_case, store_engine

Array = np.ndarray
Ops = list[dict[str, Any]]
STANDIN = BUILD / "standin"
# What the stand-ins are, unless a test says otherwise.
VERSION, GPU = "10.14.1.48", "Ada card"

pytestmark = pytest.mark.skipif(
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
        self._run, self._reports, self._patch = run, reports, patch
        self.request: dict[str, Any] = {}

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
        return json.loads((self._reports / f"{part}.json").read_text())

    def _started(self, bundle: Path, ops: Ops, settings: dict[str, Any], request: dict[str, Any]) -> Any:
        self._patch.setenv("LD_LIBRARY_PATH", str(STANDIN))
        self._patch.setenv("DYNEXPORT_STANDIN", json.dumps({"reports": str(self._reports), **settings}))
        what = {"bundle": str(bundle), "backend": "tensorrt", "ops": ops, **request}
        return self._run("probe_tensorrt", stdin=json.dumps(what).encode())


@pytest.fixture
def machine(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    reports = tmp_path / "reports"
    reports.mkdir()
    return Machine(run, reports, monkeypatch)


def talk(bundle: Path, lengths: tuple[int, ...]) -> tuple[Ops, list[list[Array]]]:
    """Prompts in a batch, steps at the first depth and at full depth, further prompts; and Python's logits of them."""
    executor = Executor(Bundle.open(bundle), 1)
    vocabulary, rows = executor.manifest.model.vocab_size, list(range(len(lengths)))
    first, second = (
        [[token % vocabulary for token in row] for row in random_rows(*sizes, seed=seed)]
        for seed, sizes in ((1, lengths), (2, [5] * len(lengths)))
    )
    state = executor.full_cache(len(lengths), CONTEXT)
    ops: Ops = [{"op": "cache", "rows": len(lengths), "tokens": CONTEXT}]
    found: list[list[Array]] = [[]]

    def prompts(tokens: list[list[int]]) -> None:
        ops.append({"op": "prompt", "rows": rows, "tokens": tokens})
        found.append(list(executor.prefill(state, tokens, all_logits=True)))

    prompts(first)
    for depth in (None, None, "full"):
        tokens = [int(row[-1].argmax() if row.ndim == 2 else row.argmax()) for row in found[-1]]
        ops.append({"op": "decode", "rows": rows, "tokens": tokens} | ({"depth": depth} if depth else {}))
        found.append(list(executor.step(state, np.array(tokens), executor.bundle.depth(depth))))
    prompts(second)
    return ops, found


def same(results: Any, expected: list[list[Array]]) -> None:
    for result, rows in zip(results, expected, strict=True):
        assert "error" not in result, result
        for own, other in zip(result.get("logits", []), rows, strict=True):
            own = np.array(own).reshape(other.shape)
            np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)
            assert (own.argmax(-1) == other.argmax(-1)).all()


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_python_on_onnxruntime(case: str, engines: Callable[[str], Path], machine: Machine) -> None:
    """At batches and lengths that no profile names as its usual ones; and nothing is left of it afterwards."""
    bundle = engines(case)
    for lengths in ((3, 8, 1), (17,), (2, 2, 5, 7)):
        ops, expected = talk(bundle, lengths)
        same(machine.talk(bundle, ops), expected)
        cuda, tensorrt = machine.told("cuda"), machine.told("tensorrt")
        assert [cuda[kind] for kind in ("used", "host", "streams", "graphs", "captured")] == [0] * 5
        assert tensorrt["live"] == 0 and tensorrt["in_place"] > 0
        assert cuda["calls"]["cuGraphLaunch"] > 0
    read = {Path(model).name for model in tensorrt["read"]}
    assert read <= {graph.file for graph in Bundle.open(bundle).manifest.graphs} and read
