"""int4 and int8 bundles are judged by their arithmetic, with the weights as they are rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import copied, replace_file
from safetensors.numpy import load_file

pytest.importorskip("transformers")

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.parity import Report, verify
from dynexport.exporter.reference.dequantised import DequantisedWeights
from dynexport.runtime.bundle.bundle import Bundle

SavedModel = Callable[[str], Path]
LAYER = 1


@pytest.fixture(scope="module", params=["int4", "int8"])
def bundle(request: pytest.FixtureRequest, saved_model: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / request.param
    convert(saved_model("llama"), directory, precision=request.param)
    return directory


def verified(bundle: Path, against: Path | None = None) -> Report:
    prompts = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [46, 26, 43]]
    return verify(Bundle.open(bundle), against, prompts=prompts, new_tokens=2)


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def without_mlp(graph: Any) -> None:
    """A layer whose MLP adds nothing."""
    (node,) = (node for node in graph.node if f"hidden_states.{LAYER}" in node.output)
    node.op_type = "Identity"
    del node.input[1:]


def with_another_theta(graph: Any) -> None:
    """A layer whose queries and keys are rotated by other angles."""
    faster = onnx.helper.make_node("Mul", ["v_Mul_5", "faster"], ["other_angles"])
    parts = [onnx.helper.make_node(kind, ["other_angles"], [f"other_{kind}"]) for kind in ("Cos", "Sin")]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 1.2, 1.4, 1.6]), "faster"))
    rotary = [n for n in graph.node if n.op_type == "RotaryEmbedding" and f"layers.{LAYER}." in n.output[0]]
    for node in rotary:
        node.input[1:] = ["other_Cos", "other_Sin"]
    nodes = list(graph.node)
    place = next(i for i, node in enumerate(nodes) if "v_Mul_5" in node.output) + 1
    del graph.node[:]
    graph.node.extend([*nodes[:place], faster, *parts, *nodes[place:]])


@pytest.mark.parametrize("plant", [without_mlp, with_another_theta])
def test_a_planted_fault_fails(
    plant: Callable[[Any], None], bundle: Path, saved_model: SavedModel, tmp_path: Path
) -> None:
    broken = copied(bundle, tmp_path / "broken")
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    plant(model.graph)
    replace_file(broken, "model.onnx", model.SerializeToString())
    assert {"arithmetic/golden/full/33", "arithmetic/golden/full/7"} <= failed(verified(broken))
    report = verified(broken, saved_model("llama"))
    assert {"arithmetic/prompt/10", "arithmetic/greedy/full"} <= failed(report)
    assert report.first_departing_layer == LAYER


def test_a_right_bundle_passes_with_float32_s_limits(bundle: Path, saved_model: SavedModel) -> None:
    """And how far it is from the checkpoint is told, without being judged."""
    for against in (None, saved_model("llama")):
        report = verified(bundle, against)
        assert report.passed
        judged = [check for check in report.checks if check.kind == "arithmetic"]
        assert judged and all(check.metrics["max_abs"] < 1e-4 for check in judged)
        assert max(check.metrics["max_abs"] for check in report.checks if check.kind == "reference") > 1e-2


@pytest.mark.parametrize("family", ["phi3", "bloom", "gpt2"])
def test_matrices_are_found_by_their_values(family: str, saved_model: SavedModel, tmp_path: Path) -> None:
    """Packed queries, keys and values, and heads in another order, stand for parameters of other shapes."""
    done = convert(saved_model(family), tmp_path / "bundle", precision="int8", golden=False)
    stored = DequantisedWeights(tmp_path / "bundle", done.manifest)
    for name, weight in load_file(saved_model(family) / "model.safetensors").items():
        found = stored.stored(name, weight)
        if weight.ndim == 2:
            assert 0 < np.abs(found - weight).max() < np.abs(weight).max() / 100, name
        else:
            np.testing.assert_array_equal(found, weight)


def test_a_matrix_that_the_bundle_does_not_hold_stays_the_checkpoint_s(bundle: Path, saved_model: SavedModel) -> None:
    stored = DequantisedWeights(bundle, Bundle.open(bundle).manifest)
    weight = load_file(saved_model("llama") / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert np.any(stored.stored("model.layers.1.mlp.up_proj.weight", weight) != weight)
    other = weight[::-1] * np.float32(1.5)
    assert stored.stored("model.layers.1.mlp.up_proj.weight", other) is other
