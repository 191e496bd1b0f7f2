"""Engines and libraries that the C++ runtime refuses, in Python's words."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import CONFORMANCE, replace_file
from conftest import BUILD
from standin_machine import HERE, STANDIN, STEP, VERSION, Machine, built, engines, machine, needs_standins

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt import opening
from dynexport.runtime.engines.tensorrt.backend import Backend
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary

__all__ = ["engines", "machine"]  # fixtures
pytestmark = needs_standins


# What is refused before anything is deserialized


@pytest.fixture
def dense(engines: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy without engines."""
    copy = tmp_path / "bundle"
    shutil.copytree(engines("dense"), copy, ignore=shutil.ignore_patterns("engines"))
    return copy


def python_refusal(bundle: Path, gpu: Gpu | NoGpu = HERE) -> str:
    """What Python says of a bundle on the machine that the stand-ins are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "find_gpu", lambda: gpu)
        patch.setattr(opening, "open_backend", lambda name: Backend(name, None, VERSION, ()))
        patch.setattr(opening, "Device", lambda name: None)
        with pytest.raises(DynexportError) as refused:
            opened = opening.TensorRtBackend(Bundle.open(bundle), "tensorrt")
            for stored in opened._chosen.values():
                stored.read()
    return str(refused.value)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (None, "found none; build one with"),
        ({"version": "10.13.0.35"}, "built by tensorrt 10.13.0.35, here is 10.14.1.48"),
        ({"backend": "tensorrt-rtx"}, "built by tensorrt-rtx, to be run by tensorrt"),
        ({"gpu": "Other card"}, "built for Other card, here is Ada card"),
        ({"capability": "9.0"}, "built for compute capability 9.0, here is 8.9 (Ada card)"),
    ],
)
def test_engines_of_elsewhere(build: dict[str, Any] | None, reason: str, dense: Path, machine: Machine) -> None:
    if build is not None:
        built(dense, **build)
    line = machine.refusal(dense)
    assert line == f"error: {python_refusal(dense)}" and reason in line
    assert not (machine.reports / "tensorrt.json").exists() or machine.told("tensorrt")["read"] == []


def test_engines_of_other_files(dense: Path, machine: Machine) -> None:
    """Other weights, another graph: an engine belongs to what it was built from."""
    built(dense)
    for file, reason in (("model.data", "built from weights "), ("model.onnx", "built from model.onnx ")):
        content = (dense / file).read_bytes()
        replace_file(dense, file, content + (b"\0" if file == "model.data" else b""))
        if file == "model.onnx":  # a producer's name that says more
            model = onnx.load(dense / file, load_external_data=False)
            model.doc_string = "another"
            replace_file(dense, file, model.SerializeToString())
        line = machine.refusal(dense)
        assert line == f"error: {python_refusal(dense)}" and reason in line


def test_a_version_of_a_package(dense: Path, machine: Machine) -> None:
    """A package that was released again has the same library."""
    built(dense, version=f"{VERSION}.post1")
    assert "error" not in machine.talk(dense, STEP)[-1]


def test_an_engine_that_was_changed_or_is_missing(dense: Path, machine: Machine) -> None:
    (engine,) = (built(dense) / "engines").glob("*.engine")
    content = engine.read_bytes()
    for changed in (content[:-1] + b" ", content[:-1], content + b" ", None):
        engine.unlink()
        if changed is not None:
            engine.write_bytes(changed)
        assert machine.talk(dense, STEP)[-1] == {"error": python_refusal(dense)}
    engine.symlink_to("/dev/zero")
    assert "expected an engine, found a link; build it again" in machine.talk(dense, STEP)[-1]["error"]


def test_a_record_that_is_not_one(dense: Path, machine: Machine) -> None:
    """It is as if the engine was not there."""
    (record,) = (built(dense) / "engines").glob("*.json")
    good = json.loads(record.read_text())
    for changed in (b"", b"[]", b"{}", json.dumps(good | {"more": 1}).encode(), b"\xff", b"[" * 5000):
        record.write_bytes(changed)
        line = machine.refusal(dense)
        assert line == f"error: {python_refusal(dense)}" and "expected an engine, found none" in line
    shutil.rmtree(dense / "engines")
    (dense / "engines").write_text("a file")
    assert machine.refusal(dense) == f"error: {python_refusal(dense)}"


def test_engines_that_others_built(
    dense: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(dense)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    line = machine.refusal(dense)
    assert line == f"error: {python_refusal(dense)}" and "--trust-engines" in line
    assert "error" not in machine.talk(dense, STEP, trust=True)[-1]


def test_engines_without_weights(dense: Path, machine: Machine) -> None:
    """They take a part of TensorRT that programs in C++ do not open; one with weights beside them is taken."""
    built(dense, strip=True)
    assert "1 that cannot run here (built without its weights, which only the Python runtime can" in machine.refusal(
        dense
    )
    built(dense)
    assert "error" not in machine.talk(dense, STEP)[-1]


def test_plugins(dense: Path, machine: Machine) -> None:
    """The library that the engine was built with, and no other, loaded before the engine."""
    library, other = STANDIN / "libcuda.so.1", BUILD / "libdynexport_tensorrt.so"  # any two libraries
    plugins = PluginLibrary.from_file(library)
    built(dense, plugins=plugins)
    start = f"built with plugins {plugins.sha256[:12]}.., here are "
    assert f"{start}no plugins" in machine.refusal(dense)
    assert f"{start}plugins {PluginLibrary.from_file(other).sha256[:12]}.." in machine.refusal(
        dense, plugins=str(other)
    )
    line = machine.refusal(dense, plugins=str(dense / "none.so"))
    with pytest.raises(DynexportError) as refused:
        PluginLibrary.from_file(dense / "none.so")
    assert line == f"error: {refused.value}"
    assert "error" not in machine.talk(dense, STEP, plugins=str(library))[-1]
    assert machine.told("tensorrt")["plugins"] == [str(library)]


def test_plugins_that_cannot_be_loaded(dense: Path, machine: Machine) -> None:
    text = dense.parent / "plugins.so"
    text.write_text("no library")
    built(dense, plugins=PluginLibrary.from_file(text))
    line = machine.refusal(dense, plugins=str(text))
    assert line.startswith(f"error: {text}: the plugins cannot be loaded: ") and "file too short" in line


def test_a_bundle_for_onnxruntime(tmp_path: Path, machine: Machine) -> None:
    convert(CONFORMANCE / "dense", tmp_path / "bundle", golden=False)
    assert machine.refusal(tmp_path / "bundle") == f"error: {python_refusal(tmp_path / 'bundle')}"


def test_machines_without_a_gpu(engines: Callable[[str], Path], machine: Machine) -> None:
    bundle = engines("dense")
    for settings, reason in (
        ({"devices": 0}, "the driver shows no device; see CUDA_VISIBLE_DEVICES"),
        ({"errors": {"cuInit": 999}}, "cuInit: CUDA error 999: unknown error"),
    ):
        assert machine.refusal(bundle, settings) == f"error: {python_refusal(bundle, gpu=NoGpu(reason))}"


# TensorRT's library


@pytest.mark.parametrize("version", [101301, 110400, 10701, 8601])
def test_a_library_of_another_version(version: int, engines: Callable[[str], Path], machine: Machine) -> None:
    """Nothing of it is called: with other classes, calls would land in others' functions."""
    line = machine.refusal(engines("dense"), {"version": version})
    found = {101301: "10.13", 110400: "11.4", 10701: "1.7", 8601: "8.6"}[version]
    assert line == (
        "error: tensorrt: expected version 10.14, which libdynexport_tensorrt.so was compiled for, found version "
        f"{found} in libnvinfer.so.10; install that version, or compile with the headers of this one"
    )


def test_tensorrt_rtx_is_not_tensorrt(engines: Callable[[str], Path], machine: Machine) -> None:
    """The real library: it answers to any version and would crash."""
    spec = find_spec("tensorrt_rtx_libs")
    libraries = [
        path for place in (spec.submodule_search_locations or [] if spec else []) for path in Path(place).glob("*.so.1")
    ]
    if not libraries:
        pytest.skip("needs tensorrt-rtx")
    line = machine.refusal(engines("dense"), library=str(libraries[0]))
    assert "expected version 10.14" in line and f"found version 1.7 in {libraries[0]}" in line


def test_a_library_that_is_none(engines: Callable[[str], Path], machine: Machine) -> None:
    bundle = engines("dense")
    line = machine.refusal(bundle, library="/none/libnvinfer.so.10")
    start = "error: tensorrt: expected the library /none/libnvinfer.so.10 of version 10.14, found none that opens: "
    assert line.startswith(start)
    line = machine.refusal(bundle, library=str(STANDIN / "libcuda.so.1"))
    assert "it is not TensorRT's library: createInferRuntime_INTERNAL or getInferLibVersion is missing" in line


def test_a_module_that_is_missing(engines: Callable[[str], Path], machine: Machine) -> None:
    if (BUILD / "libdynexport_tensorrt_rtx.so").exists():
        pytest.skip("built with TensorRT-RTX's headers")
    line = machine.refusal(engines("dense"), backend="tensorrt-rtx")
    assert "tensorrt-rtx: expected libdynexport_tensorrt_rtx.so beside this program or its library, found none" in line
    assert "compile it with TensorRT's headers (TENSORRT_RTX_ROOT)" in line


def test_the_module_shows_c_functions_only() -> None:
    """No name of C++ crosses its boundary."""
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", BUILD / "libdynexport_tensorrt.so"], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in shown.stdout.splitlines()} == {"dynexport_tensorrt"}
