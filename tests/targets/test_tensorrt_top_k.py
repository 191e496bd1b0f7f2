"""Top-k of long prompts: TensorRT's own TopK has a limit, which `convert` names; our plugin has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from bundles import CONFORMANCE, dynexport
from rtx_builds import report

TOKENS = 65_536
CHOSEN = TOKENS // 8
OPTIONS = ("--target", "tensorrt", "--precision", "fp16", "--max-batch", 1, "--max-prompt", TOKENS, "--no-golden")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two routed layers, each for an eighth of a prompt of 65,536 tokens."""
    path = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(CONFORMANCE / "mod-topk", path)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = TOKENS
    config["dynexport"]["capacity"] = 0.125
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """With calls of CapacityTopK."""
    path = checkpoint.parent / "bundle"
    ran = dynexport("convert", checkpoint, "-o", path, *OPTIONS, "--plugins")
    assert ran.code == 0, ran.err
    return path


def test_without_plugins_convert_names_the_limit_and_the_remedy(checkpoint: Path, tmp_path: Path) -> None:
    ran = dynexport("convert", checkpoint, "-o", tmp_path / "bundle", *OPTIONS)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert all(part in ran.err for part in ("3840", f"{CHOSEN} = 0.125 * {TOKENS}", "--plugins", "--max-prompt"))
    assert not (tmp_path / "bundle").exists()


def test_with_plugins_every_ranked_layer_calls_one(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    called = [node.op_type for node in model.graph.node]
    assert called.count("CapacityTopK") == 2 and "TopK" not in called
    assert called.count("GatedScatterAdd") == 2
    assert sorted(function.name for function in model.functions) == ["CapacityTopK", "GatedScatterAdd"]


def test_the_plugin_builds_what_the_body_cannot(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    by_plugin = report(bundle, "model", "--plugins")
    assert (by_plugin["plugins"], "error" in by_plugin) == (4, False)
    assert (
        f"K exceeds the maximum value allowed (3840). Condition '<' violated: {CHOSEN}"
        in report(bundle, "model")["error"]
    )
