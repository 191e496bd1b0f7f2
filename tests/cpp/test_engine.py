"""Opening ONNX Runtime from C++: any library from the headers' release on; what cannot run is told in one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE, change_manifest
from conftest import BUILD
from forms import CONTEXT, executor_of
from mirrored import Mirrored

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.engines.registry import open_backend

OLD = """
static const char* version(void) { return "1.16.3"; }
static const void* api(unsigned wanted) { return (void*)0; }
static const struct { const void* (*get)(unsigned); const char* (*version)(void); } base = {api, version};
const void* OrtGetApiBase(void) { return &base; }
"""
STEP = {"op": "acquire", "count": 1}
Run = Callable[..., Any]


def request(bundle: Path, **how: Any) -> bytes:
    return json.dumps({"bundle": str(bundle), "schedules": [], **how}).encode()


def error_with(library: object) -> str:
    """What the program tells when it is given another library."""
    ran = subprocess.run(
        [BUILD / "probe_run"],
        input=request(executor_of("dense").bundle.path),
        capture_output=True,
        env=os.environ | {"DYNEXPORT_ONNXRUNTIME": str(library)},
        check=False,
    )
    assert ran.returncode == 2 and not ran.stdout
    (line,) = ran.stderr.decode().splitlines()
    return line


def test_libraries_that_are_not_there_or_others(tmp_path: Path) -> None:
    missing = error_with(tmp_path / "libonnxruntime.so")
    assert missing.startswith(
        f"error: ONNX Runtime: expected its shared library at {tmp_path}/libonnxruntime.so, found"
    )
    assert missing.endswith("give the path of libonnxruntime.so in DYNEXPORT_ONNXRUNTIME")
    assert "found another one" in error_with("libm.so.6")


def test_an_older_library(tmp_path: Path) -> None:
    (tmp_path / "old.c").write_text(OLD)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    expected = f"error: ONNX Runtime: expected release 1.21 or a later one, found 1.16.3 in {tmp_path}/old.so"
    assert error_with(tmp_path / "old.so") == expected


@pytest.mark.parametrize(
    ("backend", "threads"), [("onnx", 1), ("onnxruntime-cuda", 1), ("onnxruntime", 257), ("onnxruntime", -1)]
)
def test_what_no_backend_is_opened_for(run: Run, backend: Any, threads: int) -> None:
    bundle = executor_of("dense").bundle
    with pytest.raises(DynexportError) as told:
        open_backend(bundle, backend, threads)
    ran = run("probe_run", stdin=request(bundle.path, backend=backend, threads=threads))
    assert (ran.returncode, ran.stderr.decode()) == (2, f"error: {told.value}\n")


def test_weights_are_refused_as_in_python(run: Run, tmp_path: Path) -> None:
    convert(CONFORMANCE / "dense", tmp_path / "b", precision="int8", golden=False)
    cases: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "b", {"weights": "mapped"}),
        (executor_of("dense").bundle.path, {"weights": "fast"}),
        (executor_of("dense").bundle.path, {"weights": "mapped", "backend": "onnxruntime-cuda"}),
    ]
    for path, how in cases:
        with pytest.raises(DynexportError) as told:
            open_backend(Bundle.open(path), **how)
        ran = run("probe_run", stdin=request(path, **how))
        assert (ran.returncode, ran.stderr.decode()) == (2, f"error: {told.value}\n")


def test_mapped_weights_compute_the_same(run: Run) -> None:
    step = {"op": "run", "rows": [0], "tokens": [[1, 2, 3]], "phase": "prompt", "depths": ["full"]}
    told = [{"rows": 1, "tokens": 8, "operations": [STEP, step]}]
    packed, mapped = (
        json.loads(
            run("probe_run", stdin=request(executor_of("dense").bundle.path, schedules=told, weights=how)).stdout
        )
        for how in ("packed", "mapped")
    )
    assert "error" not in packed[0][1] and mapped == packed


def test_bfloat16(run: Run, tmp_path: Path) -> None:
    convert(CONFORMANCE / "dense", tmp_path / "b", target="tensorrt", precision="bf16", golden=False)
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(DynexportError) as told:
        open_backend(bundle).open(bundle.manifest.graphs[0])
    assert error_of_a_step(run, tmp_path / "b") == str(told.value)


def test_inputs_that_the_graph_does_not_have(run: Run, tmp_path: Path) -> None:
    convert(CONFORMANCE / "dense", tmp_path / "b", golden=False)

    def rename(fields: dict[str, Any]) -> None:
        (spec,) = (spec for spec in fields["graphs"][0]["inputs"] if spec["name"] == "logits_indices")
        spec["name"] = "places"

    change_manifest(tmp_path / "b", rename)
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(DynexportError) as told:
        open_backend(bundle).open(bundle.manifest.graphs[0])
    assert error_of_a_step(run, tmp_path / "b") == str(told.value)


def error_of_a_step(run: Run, bundle: Path) -> str:
    step = {"op": "run", "rows": [0], "tokens": [[1]], "phase": "prompt", "depths": ["full"]}
    ran = run("probe_run", stdin=request(bundle, schedules=[{"rows": 1, "tokens": 8, "operations": [STEP, step]}]))
    assert ran.returncode == 0, ran.stderr.decode()
    return str(json.loads(ran.stdout)[0][1]["error"])


def test_more_rows_than_the_engines_limit(run: Run) -> None:
    bundle = executor_of("skip-tensorrt").bundle
    schedule = {"rows": 9, "tokens": 8, "operations": []}
    ran = run("probe_run", stdin=request(bundle.path, schedules=[schedule]))
    with pytest.raises(DynexportError) as told:
        executor_of("skip-tensorrt").cache(9, 8)
    assert (ran.returncode, ran.stderr.decode()) == (2, f"error: {told.value}\n")


@pytest.mark.parametrize(("rows", "tokens"), [(0, 8), (-1, 8), (1, 0), (1 << 40, 8), (1 << 62, 8)])
def test_sizes_of_caches(run: Run, rows: int, tokens: int) -> None:
    executor = executor_of("dense")
    with pytest.raises(DynexportError) as told:
        executor.cache(rows, tokens)
    schedule = {"rows": rows, "tokens": tokens, "operations": []}
    ran = run("probe_run", stdin=request(executor.bundle.path, schedules=[schedule]))
    assert (ran.returncode, ran.stderr.decode()) == (2, f"error: {told.value}\n")


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "another row": ({"row": 1}, "cache: row 1: expected a mark of this text"),
    "a row beyond": ({"row": 1 << 40}, "row: expected 0..1"),
    "entries beyond": ({"lengths": [1 << 40] * 8}, "mark: expected one of KvCache::mark"),
    "fewer places": ({"lengths": [1]}, "mark: expected one of KvCache::mark"),
    "entries before": ({"lengths": [-1] * 8}, "mark: expected one of KvCache::mark"),
    "a position beyond": ({"position": 1 << 40}, "cache: row 0: expected a mark within its 3 tokens"),
    "more counters": ({"overflow": [1, 2, 3]}, "mark: expected one of KvCache::mark"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_marks(run: Run, name: str) -> None:
    forged, words = FORGED[name]
    told = forge(run, {"mark": "m", **forged}, {"op": "truncate", "row": 0, "mark": "m"})
    assert told["error"].startswith(words), told
    target = {"op": "copy_prefix", "target": 1, "mark": "m"}
    assert forge(run, {"mark": "m", **forged}, target)["error"].startswith(words)


@pytest.mark.parametrize(
    ("forged", "words"),
    [
        ({"bytes": 3}, "cache: 0.key: expected saved entries of this model"),
        ({"without": "5.value"}, "cache: 5.value: expected saved entries of this model"),
        ({"added": [1 << 40] * 8}, "saved: expected entries of every place"),
        ({"added": [-1] * 8}, "saved: expected entries of every place"),
        ({"added": [30] * 8}, "cache: 0.key: expected saved entries of this model"),
        ({"last": 1}, "saved: tokens: expected at least 3, found 1"),
        ({"last": 1 << 62}, "prompt: expected at most 37 tokens to fit the context of 40"),
    ],
)
def test_forged_entries(run: Run, forged: dict[str, Any], words: str) -> None:
    told = forge(run, {"saved": "s", **forged}, {"op": "restore", "row": 0, "name": "s"})
    assert told["error"].startswith(words), told


def forge(run: Run, forged: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """What an operation tells when it is given a mark, or saved entries, that a caller has changed."""
    on = Mirrored(executor_of("skip"), 2, CONTEXT, record=True)
    on.run("acquire", count=2)
    on.run("run", rows=[0], tokens=[[1, 2, 3]], phase="prompt", depths=["full"])
    on.run("mark", row=0, name="m")
    on.run("run", rows=[0], tokens=[[4, 5]], phase="prompt", depths=["full"])
    on.run("save", row=0, mark="m", name="s")
    on.run("truncate", row=0, mark="m")
    operations = [*on.operations, {"op": "forge", **forged}, then]
    schedule = {"rows": 2, "tokens": CONTEXT, "record": True, "operations": operations}
    ran = run("probe_run", stdin=request(on.executor.bundle.path, schedules=[schedule]))
    assert ran.returncode == 0, ran.stderr.decode()
    *_, before, _, after = json.loads(ran.stdout)[0]
    assert after["state"] == before["state"]
    return dict(after)
