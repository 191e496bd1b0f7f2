"""int4 bundles of all families and strategies by gptq, options that are refused, and a fault that verify finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE, copied, replace_file
from tiny_models import EXEMPLARS

pytest.importorskip("transformers")

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.cli.main import cli
from dynexport.exporter.parity import verify
from dynexport.exporter.reference.dequantised import DequantisedWeights
from dynexport.exporter.reference.loading import load_pretrained
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError

SavedModel = Callable[[str], Path]
TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 60, 512)]


def embedding_error(model: Path, bundle: Path) -> float:
    manifest = Bundle.open(bundle).manifest
    loaded = load_pretrained(open_checkpoint(model))
    weight = loaded.get_output_embeddings().weight.numpy()
    names = [name for name, _ in loaded.named_parameters(remove_duplicate=False)]
    name = next(name for name in names if loaded.get_parameter(name) is loaded.get_output_embeddings().weight)
    found = DequantisedWeights(bundle, manifest).stored(name, weight)
    return float(np.abs(found - weight).max() / np.abs(weight).max())


@pytest.mark.parametrize("family", EXEMPLARS)
def test_every_family_by_gptq(family: str, saved_model: SavedModel, tmp_path: Path) -> None:
    model = saved_model(family)
    convert(model, tmp_path / "bundle", precision="int4", quantiser="gptq", quantiser_text=TEXT, golden=False)
    report = verify(Bundle.open(tmp_path / "bundle"), model, prompts=[[3, 14, 15, 62, 65, 35]], new_tokens=2, threads=1)
    assert report.passed, [check.name for check in report.checks if not check.passed]
    assert 0 < embedding_error(model, tmp_path / "bundle") < 0.01


@pytest.mark.parametrize("name", ["skip-2x", "mod-router", "mod-topk", "radial-own-routers", "early-exit-prompt-exit"])
def test_every_strategy_by_gptq(name: str, tmp_path: Path) -> None:
    model = CONFORMANCE / name
    convert(model, tmp_path / "bundle", precision="int4", quantiser="gptq", quantiser_text=TEXT, golden=False)
    report = verify(Bundle.open(tmp_path / "bundle"), model, prompts=[[3, 14, 15, 42, 45, 35]], new_tokens=2, threads=1)
    assert report.passed, [check.name for check in report.checks if not check.passed]
    graphs = [onnx.load(path, load_external_data=False).graph for path in (tmp_path / "bundle").glob("*.onnx")]
    kinds = {tensor.name: tensor.data_type for graph in graphs for tensor in graph.initializer}
    kept = {part: kind for part, kind in kinds.items() if "router" in part or "norm" in part}
    assert len(kept) > 4 and set(kept.values()) == {onnx.TensorProto.FLOAT}


def test_moments_are_measured_in_groups_that_fit(saved_model: SavedModel, tmp_path: Path, monkeypatch: Any) -> None:
    """And the bundle is the same."""
    for name, held in (("at once", 1 << 29), ("one by one", 1)):
        monkeypatch.setattr("dynexport.exporter.bundle.calibrated._HELD_BYTES", held)
        options = {"precision": "int4", "quantiser": "gptq", "quantiser_text": TEXT, "head_bits": 4, "golden": False}
        convert(saved_model("llama"), tmp_path / name, **options)
    stored = [(tmp_path / name / "model.data").read_bytes() for name in ("at once", "one by one")]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantiser": "awq"}, "quantiser: expected one of auto, nearest, search, gptq, found 'awq'"),
        ({"quantiser": "gptq", "precision": "int8"}, "quantiser: expected with precision int4 and the target onnxru"),
        ({"head_bits": 4, "precision": "fp32"}, "head_bits: expected with precision int4 and the target onnxruntime"),
        ({"head_bits": 6}, "head_bits: expected 8 or 4, found 6"),
        ({"quantiser": "search", "target": "tensorrt"}, "quantiser: expected with .* found int4 and tensorrt"),
        ({"quantiser_text": TEXT}, "quantiser_text: expected with the quantiser gptq, found auto"),
        ({"quantiser": "gptq"}, "quantiser_text: expected tokenizer.json to read the text, found none"),
        ({"quantiser": "gptq", "quantiser_text": TEXT[:10]}, "text: expected at least one window of 256 tokens"),
    ],
)
def test_options_are_refused(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=expected):
        convert(CONFORMANCE / "dense", tmp_path / "bundle", **{"precision": "int4", **options})
    assert not (tmp_path / "bundle").exists()


def test_the_head_takes_the_bits_that_were_asked_for(tmp_path: Path) -> None:
    sizes = {}
    for bits in ("8", "4"):
        arguments = ["convert", str(CONFORMANCE / "dense"), "--precision", "int4", "--quantiser", "nearest"]
        arguments += ["--head-bits", bits, "--no-golden", "-o", str(tmp_path / bits)]
        cli.main(arguments, standalone_mode=False)
        sizes[bits] = Bundle.open(tmp_path / bits).manifest.cost.shared
    elements = 89 * 32
    assert sizes["8"] - sizes["4"] == elements // 2


def test_zero_points_of_other_blocks_fail(tmp_path: Path) -> None:
    """Dequantised weights are read by other code, so a fault in them shows as a matrix that is not the checkpoint's."""
    model = CONFORMANCE / "dense"
    convert(model, tmp_path / "right", precision="int4")
    broken = copied(tmp_path / "right", tmp_path / "broken")
    graph = onnx.load(broken / "model.onnx", load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "MatMulNBits" and "layers.1" in n.input[1])
    del node.input[3:]  # symmetric integers were meant, then
    replace_file(broken, "model.onnx", graph.SerializeToString())
    report = verify(Bundle.open(broken), prompts=[[3, 14, 15]], new_tokens=2)
    assert "arithmetic/golden/full/33" in {check.name for check in report.checks if not check.passed}
