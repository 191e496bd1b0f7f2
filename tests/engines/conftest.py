"""A bundle with an engine for three GPU generations, built once."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import copied, dynexport
from small_bundles import tensorrt_bundle

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import File
from dynexport.runtime.engines.tensorrt.backend import Backend, BuildTarget, open_backend
from dynexport.runtime.engines.tensorrt.build import recipe_of
from dynexport.runtime.engines.tensorrt.record import EngineRecord

pytest.importorskip("tensorrt_rtx", reason="builds engines without a GPU: pip install 'dynexport[test]'")

TARGETS = "8.0,8.9,12.0"


@pytest.fixture(scope="session")
def rtx() -> Backend:
    return open_backend("tensorrt-rtx")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tensorrt_bundle(tmp_path_factory.mktemp("engines") / "bundle")
    ran = dynexport("build", bundle, "--backend", "tensorrt-rtx", "--compute-capability", TARGETS)
    assert (ran.code, ran.err) == (0, ""), ran.err
    return bundle


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copied(built_once, tmp_path / "bundle")


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    return tensorrt_bundle(tmp_path / "unbuilt")


@pytest.fixture
def record(unbuilt: Path, rtx: Backend) -> EngineRecord:
    """A record that nothing was built for."""
    bundle = Bundle.open(unbuilt)
    graph = bundle.manifest.graphs[0]
    return EngineRecord(
        recipe=recipe_of(bundle, graph, rtx, BuildTarget(("8.0", "8.9"))),
        engine=File(sha256="0" * 64, bytes=1),
        profiles=graph.profiles,
        cuda=None,
        build_seconds=1.0,
        peak_bytes=1,
    )
