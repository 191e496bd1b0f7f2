"""What a conversion can be asked for: as one object, by name, or both; and what is refused before a file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.bundle.options import ConvertOptions
from dynexport.runtime.bundle.errors import DynexportError


def test_names_go_on_top_of_options(tmp_path: Path) -> None:
    options = ConvertOptions(strategy="dense", precision="int8", max_length=24, golden=False)
    done = convert(CONFORMANCE / "dense", tmp_path / "bundle", options, precision="fp32")
    manifest = done.manifest
    assert (manifest.precision, manifest.model.max_length, done.golden) == ("fp32", 24, 0)


def test_a_name_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'precison'"):
        convert(CONFORMANCE / "dense", tmp_path / "bundle", precison="int8")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "fp8"}, "precision: expected one of auto, fp32"),
        ({"target": "openvino"}, "target: expected one of onnxruntime"),
        ({"max_batch": 0}, "max_batch: expected with the target tensorrt"),
        ({"max_prompt": 8}, "max_prompt: expected with the target tensorrt"),
        ({"precision": "bf16"}, "for ONNX Runtime, found bf16, .*use dynexport's operators"),
        ({"target": "tensorrt", "max_batch": 0}, "max_batch: expected at least 1 row, found 0"),
        ({"options": {"precision": "int8"}}, "options: expected ConvertOptions, found"),
    ],
)
def test_options_are_refused_before_the_model_is_read(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=expected):
        convert(tmp_path / "nowhere", tmp_path / "bundle", **options)
