"""The CI of code forges: it runs what `.ci/run` does, on every supported Python, with pinned actions and no rights."""

from __future__ import annotations

import re
import tomllib

import yaml
from house import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_every_supported_python_is_tested() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [line.split(" :: ")[-1] for line in classifiers if re.search(r"Python :: 3\.\d+$", line)]
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [entry["python"] for entry in matrix] == versions
    assert matrix[0]["run"] == "bash .ci/run" and {entry["run"].split()[0] for entry in matrix[1:]} == {"make"}


def test_actions_are_pinned_and_may_only_read() -> None:
    used = [step["uses"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())
