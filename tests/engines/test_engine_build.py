"""Building without a GPU: what lies in the bundle afterwards, what a second build does, and what refuses to build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import change_manifest, contents, dynexport, environment, error_of, replace_file
from onnx import TensorProto, helper, numpy_helper
from small_bundles import layer_model, tensorrt_bundle

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt import build as building
from dynexport.runtime.engines.tensorrt import builder as builder_module
from dynexport.runtime.engines.tensorrt.backend import Backend, BuildTarget
from dynexport.runtime.engines.tensorrt.build import Built, build_engine
from dynexport.runtime.engines.tensorrt.builder import Builder
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu, find_gpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary

RTX = ["--backend", "tensorrt-rtx"]
AMPERE = BuildTarget(("8.0",))


def engine_of(bundle: Path) -> Path:
    (engine,) = (bundle / "engines").glob("*.engine")
    return engine


def build(bundle: Path, backend: Backend, **options: Any) -> Built:
    opened = Bundle.open(bundle)
    return build_engine(opened, opened.manifest.graphs[0], backend, AMPERE, **options)


def test_an_engine_and_its_record_lie_in_the_bundle(built: Path) -> None:
    engine = engine_of(built)
    record = json.loads(engine.with_suffix(".json").read_text())
    assert record["engine"]["bytes"] == engine.stat().st_size > 10_000
    assert record["recipe"]["compute_capabilities"] == ["8.0", "8.9", "12.0"]
    assert [profile["name"] for profile in record["profiles"]] == ["prefill", "decode"]
    assert record["build_seconds"] > 0 and record["peak_bytes"] > 1e7
    assert sorted(path.name for path in engine.parent.iterdir()) == [engine.name, engine.with_suffix(".json").name]
    assert Bundle.open(built).manifest.target == "tensorrt"


def test_the_second_build_is_told_to_be_none(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "Builder", lambda: pytest.fail("it was built again"))
    before = contents(built)
    ran = dynexport("build", built, *RTX, "--compute-capability", "12.0, 8.9,8.0,8.0", "--json", "-")
    assert (ran.code, contents(built)) == (0, before), ran.err
    assert "every engine is up to date; nothing was built" in ran.err and "cached" in ran.err
    (engine,) = ran.report["engines"]
    assert engine["cached"] and engine["file"] == engine_of(built).name
    assert ran.report["compute_capabilities"] == ["8.0", "8.9", "12.0"]


def test_a_build_that_is_forced(built: Path) -> None:
    os.utime(engine_of(built), (0, 0))
    ran = dynexport("build", built, *RTX, "--compute-capability", "8.0,8.9,12.0", "--force")
    assert (ran.code, ran.err) == (0, "") and "built" in ran.out and "cached" not in ran.out
    assert engine_of(built).stat().st_mtime > 0


def test_float32_attention_and_no_gpu_to_build_for(tmp_path: Path) -> None:
    ran = dynexport("build", tensorrt_bundle(tmp_path / "bundle", "fp32"), *RTX)
    assert (ran.code, ran.err) == (0, "")
    assert "prefill B 1-4 S 1-32;" in ran.out and "any GPU from 8.0 on" in ran.out


def test_progress_is_told_in_phases(unbuilt: Path, rtx: Backend) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    build(unbuilt, rtx, progress=lambda phase, done, steps: told.setdefault(phase, []).append((done, steps)))
    assert {"Building engine", "Optimizing graph"} <= set(told)
    steps = told["Optimizing graph"]
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] == len(steps) - 1 > 5


def test_a_damaged_engine_is_built_again(built: Path) -> None:
    engine = engine_of(built)
    content = bytearray(engine.read_bytes())
    content[1000] ^= 1
    engine.write_bytes(content)
    ran = dynexport("build", built, *RTX, "--compute-capability", "8.0,8.9,12.0")
    assert ran.code == 0 and "the engine was changed, build it again; it was built again" in ran.err
    ran = dynexport("build", built, *RTX, "--compute-capability", "8.0,8.9,12.0")
    assert (ran.code, ran.err) == (0, "") and "cached" in ran.out


# Without weights


def test_weights_are_left_out_on_a_gpu_only(unbuilt: Path, rtx: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the line is not heeded, TensorRT-RTX itself refuses what an engine with weights passes."""
    monkeypatch.setattr(building, "find_gpu", lambda: NoGpu("no driver"))
    before = contents(unbuilt)
    line = error_of(dynexport("build", unbuilt, *RTX, "--strip"))
    assert "--strip: tensorrt-rtx leaves out weights on a GPU only, found none (no driver); build on a machine" in line
    assert contents(unbuilt) == before
    if isinstance(find_gpu(), Gpu):
        pytest.skip("there is a GPU")
    monkeypatch.setattr(building, "find_gpu", lambda: Gpu("Ada card", "8.9", "13.0"))
    with pytest.raises(DynexportError, match=r"model.onnx: tensorrt-rtx cannot build an engine: \S"):
        build(unbuilt, rtx, strip=True)
    assert not build(unbuilt, rtx).stored.record.recipe.stripped


# What TensorRT refuses


def refused(directory: Path, model: onnx.ModelProto, *arguments: str) -> str:
    bundle = tensorrt_bundle(directory / "bundle", model=model)
    line = error_of(dynexport("build", bundle, *RTX, *arguments))
    assert not [path for path in (bundle / "engines").iterdir() if path.is_file()]
    assert str(bundle / "model.onnx") in line and len(line) < 900
    return line


def with_logits(*nodes: onnx.NodeProto, **more: Any) -> onnx.ModelProto:
    """The layer, its logits made by other nodes from ``merged`` [B, S, 64]; unchecked, as not all of it is ONNX."""
    model = layer_model("fp16")
    del model.graph.node[-1]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(more.get("weights", []))
    return model


def test_a_node_that_it_does_not_know(tmp_path: Path) -> None:
    node = helper.make_node("ScatterElements", ["base", "zeros", "base"], ["sums"], "add_up", reduction="add", axis=0)
    weights = [
        numpy_helper.from_array(np.zeros(1, np.float16), "base"),
        numpy_helper.from_array(np.zeros(1, np.int64), "zeros"),
    ]
    ends = [
        helper.make_node("MatMul", ["merged", "head"], ["raw"]),
        helper.make_node("Add", ["raw", "sums"], ["logits"]),
    ]
    line = refused(tmp_path, with_logits(node, *ends, weights=weights))
    assert "a node (ScatterElements): Unsupported reduction type" in line


def test_an_operator_without_plugin_and_body(tmp_path: Path) -> None:
    model = with_logits(helper.make_node("Unheard", ["merged"], ["logits"], "strange", domain="dynexport"))
    model.opset_import.append(helper.make_opsetid("dynexport", 1))
    assert "node strange (Unheard): " in refused(tmp_path, model)


def test_a_number_format_that_a_gpu_lacks(tmp_path: Path) -> None:
    eighth = helper.make_tensor("small", TensorProto.FLOAT8E4M3FN, [64, 97], np.zeros(64 * 97))
    model = with_logits(
        helper.make_node("DequantizeLinear", ["small", "step"], ["wide"], "widen"),
        helper.make_node("MatMul", ["merged", "wide"], ["logits"], "logits"),
        weights=[eighth, numpy_helper.from_array(np.array(1, np.float16), "step")],
    )
    line = refused(tmp_path, model, "--compute-capability", "8.0")
    assert "expected number formats that compute capability 8.0 has, found fp8_e4m3; build for another" in line


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda graph: graph.pop("profiles"), "input input_ids: expected a profile for ['B', 'S'], found none"),
        (
            lambda graph: graph["profiles"][1]["ranges"].pop("S"),
            "profile decode: input input_ids: expected a range of S, found none",
        ),
        (
            lambda graph: graph["profiles"][0]["ranges"].update(B=[1, 8, 4]),
            "profile prefill: B: expected least <= usual <= greatest, found 1, 8, 4",
        ),
        (
            lambda graph: graph["inputs"][2]["shape"].__setitem__(2, 32),
            "past_key_values.0.key: expected float16 ['B', 2, 64, 16] as in caches, found float16 ['B', 2, 32, 16]",
        ),
        (
            lambda graph: graph["inputs"][0].update(shape=[1, 1, "S"]),
            "input input_ids: expected 2 dimensions in the manifest as in the graph, found 3",
        ),
    ],
)
def test_profiles_that_do_not_fit(unbuilt: Path, change: Change, expected: str) -> None:
    change_manifest(unbuilt, lambda fields: change(fields["graphs"][0]))
    assert expected in error_of(dynexport("build", unbuilt, *RTX))


def test_a_cache_of_another_size_than_the_graphs(unbuilt: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        for spec in fields["graphs"][0]["inputs"]:
            if spec["name"].startswith("past_key_values.0."):
                spec["shape"][2] = 32
        for part in fields["caches"][0]["parts"].values():
            part["shape"][2] = 32

    change_manifest(unbuilt, change)
    line = error_of(dynexport("build", unbuilt, *RTX))
    assert "input past_key_values.0.key: expected 64 as in the graph, found 32 in the manifest" in line


def test_a_bundle_for_another_engine(unbuilt: Path) -> None:
    change_manifest(unbuilt, lambda fields: fields.update(target="onnxruntime"))
    line = error_of(dynexport("build", unbuilt, *RTX))
    assert "expected a bundle for tensorrt, found one for onnxruntime; make one with: dynexport convert" in line
    assert not (unbuilt / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing option '--backend'"),
        (["--backend", "tensorr"], "'tensorr' is not one of 'tensorrt', 'tensorrt-rtx'"),
        ([*RTX, "--compute-capability", "9.0"], "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; found 9.0"),
        ([*RTX, "--compute-capability", "8.0,sm89"], "such as 8.0,8.9; found 'sm89'"),
        ([*RTX, "--compute-capability", ""], "such as 8.0,8.9; found ''"),
        ([*RTX, "--plugins", "--plugin-library", "x.so"], "expected --plugins or --plugin-library, found both"),
        (
            [*RTX, "--plugin-library", "/no/such.so"],
            "/no/such.so: expected a plugin library, found none; compile it first",
        ),
    ],
)
def test_bad_arguments(unbuilt: Path, arguments: list[str], expected: str) -> None:
    assert expected in error_of(dynexport("build", unbuilt, *arguments))


def test_tensorrt_that_is_not_installed(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    line = error_of(dynexport("build", unbuilt, "--backend", "tensorrt"))
    assert "tensorrt is needed to build and run engines and is not installed: pip install 'dynexport[tensorrt]'" in line


def test_a_graph_that_is_cut(unbuilt: Path, rtx: Backend) -> None:
    model = onnx.load(unbuilt / "model.onnx", load_external_data=False)
    del model.graph.node[3:]
    replace_file(unbuilt, "model.onnx", model.SerializeToString())
    with pytest.raises(DynexportError, match=r"model.onnx: tensorrt-rtx cannot build an engine: \S") as caught:
        build(unbuilt, rtx)
    assert str(caught.value).isprintable()


# Plugins and functions

TWICE = """
def register(trt):
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Twice(*interfaces):
        def __init__(self):
            for interface in interfaces:
                interface.__init__(self)
            self.plugin_namespace, self.plugin_name, self.plugin_version, self.num_outputs = "", "Twice", "1", 1

        def get_capability_interface(self, kind):
            return self

        def get_output_data_types(self, inputs):
            return inputs[:1]

        def get_output_shapes(self, inputs, shape_inputs, builder):
            return [inputs[0]]

        def supports_format_combination(self, position, tensors, inputs):
            return True

        def get_fields_to_serialize(self):
            return trt.PluginFieldCollection([])

        def get_valid_tactics(self):
            return [1]

        def clone(self):
            return Twice()

        def configure_plugin(self, inputs, outputs): ...
        def on_shape_change(self, inputs, outputs): ...
        def set_tactic(self, tactic): ...

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self):
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = "Twice", "", "1"
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name, fields, phase):
            return Twice()

    global creator
    creator = Creator()
    trt.get_plugin_registry().register_creator(creator, "")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], PluginLibrary]:
    """Makes a plugin module that this process and the builder can import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, source: str) -> PluginLibrary:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return PluginLibrary.from_module(name)

    return make


def test_a_function_is_built_by_its_body_or_by_a_plugin(
    tmp_path: Path, rtx: Backend, module: Callable[[str, str], PluginLibrary]
) -> None:
    bundle = tensorrt_bundle(tmp_path / "bundle", model=doubling_model(has_body=True))
    plain = build(bundle, rtx)
    plugged = build(bundle, rtx, plugins=module("twice_plugin", TWICE))
    alike = plain.stored.read() == plugged.stored.read()
    assert not alike and plain.stored.path != plugged.stored.path and build(bundle, rtx).cached


def test_an_operator_of_a_plugin_alone(
    tmp_path: Path, rtx: Backend, module: Callable[[str, str], PluginLibrary]
) -> None:
    """Also: the ONNX parser finds its library although the wheel has it under another name only."""
    bundle = tensorrt_bundle(tmp_path / "bundle", model=doubling_model(has_body=False))
    with pytest.raises(DynexportError, match=r"node double \(Twice\): "):
        build(bundle, rtx)
    assert not build(bundle, rtx, plugins=module("lonely_plugin", TWICE)).cached


def doubling_model(*, has_body: bool) -> onnx.ModelProto:
    """The layer, with an operator before the logits that is a function or only a plugin's."""
    model = with_logits(
        helper.make_node("Twice", ["merged"], ["doubled"], "double", domain="dynexport"),
        helper.make_node("MatMul", ["doubled", "head"], ["logits"], "logits"),
    )
    model.opset_import.append(helper.make_opsetid("dynexport", 1))
    if has_body:
        body = [helper.make_node("Add", ["x", "x"], ["y"])]
        function = helper.make_function("dynexport", "Twice", ["x"], ["y"], body, [helper.make_opsetid("", 24)])
        model.functions.append(function)
    return model


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\ndef register(trt): os.abort()", r"the builder ended by signal SIGABRT$"),
        (
            "import os, signal\ndef register(trt): os.kill(os.getpid(), signal.SIGKILL)",
            "killed, most likely out of memory",
        ),
        (
            "import os, sys\ndef register(trt): print('gone', file=sys.stderr); os._exit(3)",
            "ended with exit code 3: gone",
        ),
        ("def register(trt): raise OSError('libneeded.so is missing')", "cannot be loaded: libneeded.so is missing"),
        ("", "has no attribute 'register'"),
    ],
    ids=["abort", "killed", "exit", "not loadable", "no plugins"],
)
def test_a_builder_that_dies(
    unbuilt: Path, rtx: Backend, module: Callable[[str, str], PluginLibrary], source: str, expected: str
) -> None:
    with pytest.raises(DynexportError, match=expected):
        build(unbuilt, rtx, plugins=module(f"dying_{abs(hash(source))}", source))
    assert not list((unbuilt / "engines").iterdir())


def test_one_process_builds_until_it_dies(
    unbuilt: Path, rtx: Backend, module: Callable[[str, str], PluginLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(*arguments, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(builder_module, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
    with Builder() as builder:
        first, second = (build(unbuilt, rtx, force=True, builder=builder).stored.record.engine for _ in range(2))
        assert first.bytes == second.bytes and len(started) == 1
        with pytest.raises(DynexportError, match="the builder ended with exit code 3"):
            build(unbuilt, rtx, plugins=module("dying", "import os\ndef register(trt): os._exit(3)"), builder=builder)
        assert build(unbuilt, rtx, force=True, builder=builder).stored.record.engine.bytes == first.bytes
    assert len(started) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_file_that_is_no_library(unbuilt: Path) -> None:
    line = error_of(dynexport("build", unbuilt, *RTX, "--plugin-library", unbuilt / "model.onnx"))
    assert "the plugins cannot be loaded: " in line and "invalid ELF header" in line


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(DynexportError, match=r"no\.such\.module: expected a Python module with TensorRT plugins"):
        PluginLibrary.from_module("no.such.module")


SLOW = "import pathlib, time\ndef register(trt):\n    pathlib.Path({started!r}).touch(); time.sleep({seconds})"
SCRIPT = """
import sys
from dynexport.exporter.cli import build
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
build.PluginLibrary = type("Slow", (), {"from_file": lambda path: PluginLibrary.from_module("slow_plugin")})
from dynexport.exporter.cli.main import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_killed_while_building(
    unbuilt: Path,
    tmp_path: Path,
    rtx: Backend,
    module: Callable[[str, str], PluginLibrary],
    number: signal.Signals,
    code: int,
) -> None:
    started = tmp_path / "started"
    module("slow_plugin", SLOW.format(started=str(started), seconds=2 if number == signal.SIGKILL else 600))
    before = contents(unbuilt)
    arguments = ["build", str(unbuilt), *RTX, "--plugin-library", "slow"]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in error
    left = {name: content for name, content in contents(unbuilt).items() if not name.endswith(".part")}
    assert left == before
    if number == signal.SIGKILL:
        build(unbuilt, rtx)
    assert not list((unbuilt / "engines").glob(".*"))
