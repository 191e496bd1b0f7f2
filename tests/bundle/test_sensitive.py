"""int4 bundles whose most sensitive matrices stay in 8 bits: which ones, of every strategy, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE
from safetensors.numpy import load_file, save_file

pytest.importorskip("transformers")

from dynexport.exporter.bundle.conversion import Conversion, convert
from dynexport.exporter.parity import verify
from dynexport.exporter.quantise.sensitivity import lost_products
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 60, 512)]


def converted(model: Path, bundle: Path, share: float, **options: Any) -> Conversion:
    how = {"precision": "int4", "quantiser": "gptq", "quantiser_text": TEXT, "sensitive": share, "golden": False}
    return convert(model, bundle, **{**how, **options})


def told(done: Conversion) -> str:
    (note,) = (note for note in done.notes if note.startswith("sensitive: "))
    return note


def bits(bundle: Path) -> dict[str, int]:
    """Bits of every product of a layer, by the name of its integers."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    inner = [node for outer in graph.node for attribute in outer.attribute for node in attribute.g.node]
    products = [node for node in (*graph.node, *inner) if node.op_type == "MatMulNBits"]
    found = {node.input[1]: next(a.i for a in node.attribute if a.name == "bits") for node in products}
    return {name.removesuffix("_quantized"): count for name, count in found.items() if ".layers." in name}


def test_the_matrices_that_lose_most_stay(tmp_path: Path) -> None:
    """All others are integers of 4 bits times a scale, so they lose nothing; one of the two is part of a product."""
    model = tmp_path / "model"
    shutil.copytree(CONFORMANCE / "dense", model)
    tensors, generator = load_file(model / "model.safetensors"), np.random.default_rng(1)
    for name, values in tensors.items():
        if ".layers." in name and values.ndim == 2 and "2.self_attn.v_" not in name and "1.mlp.down_" not in name:
            integers = generator.integers(-7, 9, values.shape)
            integers[:, 0::32], integers[:, 1::32] = -7, 8
            tensors[name] = (0.03 * integers).astype(np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    layers = {name: value for name, value in tensors.items() if ".layers." in name and value.ndim == 2}
    wanted = sum(layers[name].size for name in layers if "layers.2.self_attn.v" in name or "layers.1.mlp.down" in name)
    done = converted(model, tmp_path / "bundle", 1.001 * wanted / sum(value.size for value in layers.values()))
    assert f"2 of {len(layers)} matrices stay in 8 bits" in told(done)
    assert "v_proj of layers 2" in told(done) and "down_proj of layers 1" in told(done)
    found = bits(tmp_path / "bundle")
    assert {name for name, count in found.items() if count == 8} == {
        "model.layers.2.self_attn.qkv_proj.weight.1",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert found["model.layers.2.self_attn.qkv_proj.weight.0"] == 4
    report = verify(Bundle.open(tmp_path / "bundle"), model, prompts=[[3, 14, 15, 42, 45, 35]], new_tokens=2)
    assert report.passed, [check.name for check in report.checks if not check.passed]


@pytest.mark.parametrize("name", ["skip-2x", "mod-router", "radial-own-routers", "early-exit-prompt-exit"])
def test_every_strategy(name: str, tmp_path: Path) -> None:
    done = converted(CONFORMANCE / name, tmp_path / "bundle", 0.3)
    assert "matrices stay in 8 bits" in told(done) and " 0 of " not in told(done)
    report = verify(Bundle.open(tmp_path / "bundle"), CONFORMANCE / name, prompts=[[3, 14, 15, 42, 45]], new_tokens=2)
    assert report.passed, [check.name for check in report.checks if not check.passed]


def test_lost_products_are_those_of_inputs() -> None:
    """Rows whose errors meet large inputs lose more; without inputs nothing is lost."""
    generator = np.random.default_rng(2)
    weight = generator.standard_normal((6, 64)).astype(np.float32)
    inputs = generator.standard_normal((100, 64)).astype(np.float32) * np.linspace(0, 3, 64, dtype=np.float32)
    lost, whole = lost_products(weight, inputs.T @ inputs, 32)
    np.testing.assert_allclose(whole, ((inputs @ weight.T) ** 2).sum(axis=0), rtol=1e-4)
    assert ((lost > 0) & (lost < 0.05 * whole)).all()
    lost, whole = lost_products(weight, np.zeros((64, 64), np.float32), 32)
    assert not lost.any() and not whole.any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantiser": "search", "quantiser_text": None}, "sensitive: expected with the quantiser gptq, found search"),
        ({"sensitive": 1.5}, "sensitive: expected a share of the weights above 0 and below 1, found 1.5"),
        ({"sensitive": True}, "sensitive: expected a share of the weights above 0 and below 1, found True"),
    ],
)
def test_options_are_refused(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=expected):
        converted(CONFORMANCE / "dense", tmp_path / "bundle", 0.1, **options)
