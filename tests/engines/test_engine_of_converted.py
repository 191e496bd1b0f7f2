"""From a checkpoint to an engine: what convert writes for TensorRT is what TensorRT-RTX builds."""

from __future__ import annotations

from pathlib import Path

from bundles import CONFORMANCE, dynexport


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
