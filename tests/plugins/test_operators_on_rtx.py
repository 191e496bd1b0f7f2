"""Engines with the operators, built by TensorRT-RTX without a GPU: by body, by plugin, and where only a plugin can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from operator_models import BY_NAME

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SCRIPT = Path(__file__).parent / "build_with_rtx.py"


def script(*arguments: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return script()


@pytest.mark.parametrize("name", BY_NAME)
def test_body_and_plugin_build_for_every_type_and_target(report: dict[str, Any], name: str) -> None:
    for form, plugins in (("body", 0), ("plugin", 1)):
        builds = {case: build for case, build in report[form].items() if case.startswith(name)}
        assert len(builds) == 5
        assert {case: build for case, build in builds.items() if "error" in build} == {}
        assert {build["plugins"] for build in builds.values()} == {plugins}


def test_a_capacity_above_the_limit_builds_with_the_plugin_alone(report: dict[str, Any]) -> None:
    assert "K exceeds the maximum value allowed (3840)" in report["large by body"]["error"]
    assert (report["large"]["plugins"], "error" in report["large"]) == (1, False)


def test_a_routed_layer_whose_capacity_follows_its_length(report: dict[str, Any]) -> None:
    assert (report["routed layer"]["plugins"], "error" in report["routed layer"]) == (2, False)


def test_working_in_place_has_to_be_allowed(report: dict[str, Any]) -> None:
    assert "kALIASED_PLUGIN_IO_10_03 not enabled" in report["not allowed"]["error"]


def test_a_wrong_rank_fails_and_does_not_end_the_process(report: dict[str, Any]) -> None:
    assert "output shape computation failed" in report["wrong rank"]["error"]


def test_without_creators_the_same_file_builds_by_body(report: dict[str, Any]) -> None:
    assert (report["unregistered"]["plugins"], "error" in report["unregistered"]) == (0, False)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("ScatterElements add", "Unsupported reduction type"),
        ("ScatterND add", "ScatterND with reduction is not supported"),
        ("TensorScatter of a computed cache", "The cache tensor must be a network input"),
        ("TensorScatter of a cache that grows", "must have a static sequence length"),
    ],
)
def test_what_is_built_in_is_refused(report: dict[str, Any], node: str, said: str) -> None:
    assert said in report["built in"][node]["error"]


def test_loading_it_elsewhere_first_is_told_in_one_line(report: dict[str, Any]) -> None:
    assert report["problem"] is None
    problem = script("too early")["problem"]
    # None where the installation has the name after all.
    assert problem is None or ("dynexport.plugins.rtx.load" in problem and "\n" not in problem)
