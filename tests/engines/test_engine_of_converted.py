"""From a checkpoint to an engine: what convert writes for TensorRT is what TensorRT-RTX builds."""

from __future__ import annotations

from pathlib import Path

from bundles import CONFORMANCE, dynexport

from dynexport.runtime.engines.tensorrt.plugins import our_plugins


def test_convert_then_build_then_inspect(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    options = ["--target", "tensorrt", "--precision", "fp16", "--max-batch", 2, "--max-length", 64, "--no-golden"]
    converted = dynexport("convert", CONFORMANCE / "dense", *options, "-o", bundle)
    assert converted.code == 0, converted.err
    built = dynexport("build", bundle, "--backend", "tensorrt-rtx", "--compute-capability", "8.0", "--json", "-")
    assert built.code == 0, built.err
    for engine in built.report["engines"]:
        assert {profile["name"] for profile in engine["profiles"]} <= {"prefill", "decode"}
        assert engine["profiles"][0]["ranges"]["B"] == [1, 1, 2]
    shown = dynexport("inspect", bundle, "--engine", "--json", "-")
    assert [engine["key"] for engine in shown.report["engines"]] == [e["key"] for e in built.report["engines"]]
    assert dynexport("inspect", bundle).code == 0


def test_our_plugins_are_built_where_they_are_called(unbuilt: Path, tmp_path: Path) -> None:
    """A ranked prompt calls one; a graph that calls none is built as without."""
    bundle, found = tmp_path / "bundle", []
    options = ["--target", "tensorrt", "--plugins", "--static", "--max-batch", 2, "--max-length", 64, "--no-golden"]
    converted = dynexport("convert", CONFORMANCE / "mod-topk", *options, "-o", bundle)
    assert converted.code == 0, converted.err
    for path in (bundle, unbuilt):
        build = ["build", path, "--backend", "tensorrt-rtx", "--compute-capability", "8.0", "--plugins", "--json", "-"]
        (engine,) = dynexport(*build).report["engines"]
        content = (path / "engines" / engine["file"]).read_bytes()
        found.append((engine["recipe"]["plugins_sha256"], b"CapacityTopK" in content))
        assert dynexport(*build).report["engines"][0]["cached"]
    assert found == [(our_plugins().sha256, True), (None, False)]
